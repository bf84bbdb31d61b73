"""tree_logprobs on a model whose parameters two ranks share out (FSDP2) gives the gradients of the whole one."""

from __future__ import annotations

import json

import pytest

from tests.trainer.test_training_ranks import pytestmark as needs_gloo
from tests.trainer.test_training_ranks import torchrun

CHILD = """
import json, os, sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
torch.set_num_threads(1)
import sapo_kernels as sk
from tests.training.test_tree_logprobs import BATCH, SEQUENCES, alone
from tests.oracles import small_qwen3

dist.init_process_group("gloo")
whole = small_qwen3()
wanted = -alone(whole).sum()
wanted.backward()
model = small_qwen3()
if sys.argv[2] == "checkpoint":
    model.train()
    model.gradient_checkpointing_enable()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard(model)
worst = {}
with sk.use_tree_attention(model):
    for _ in range(2):
        # Each rank has the same batch, and gradients are averaged.
        loss = -sk.tree_logprobs(model, BATCH).sum()
        loss.backward()
        for (name, p), q in zip(model.named_parameters(), whole.parameters(), strict=True):
            worst[name] = float((p.grad.full_tensor() - q.grad).norm() / q.grad.norm())
        model.zero_grad()
if dist.get_rank() == 0:
    made = {"loss": abs(float(loss - wanted)), "worst": max(worst.values()), "count": len(worst)}
    open(sys.argv[1] + "/made.json", "w").write(json.dumps(made))
dist.destroy_process_group()
"""


@needs_gloo
@pytest.mark.parametrize("kind", ["plain", "checkpoint"])
def test_gradients_of_a_sharded_model(tmp_path, kind):
    (tmp_path / "child.py").write_text(CHILD)
    done = torchrun(str(tmp_path / "child.py"), str(tmp_path), kind)
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads((tmp_path / "made.json").read_text())
    assert made["count"] > 10 and made["loss"] < 1e-3 and made["worst"] < 1e-4
