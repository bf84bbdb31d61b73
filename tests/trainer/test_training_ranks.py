"""Several processes: all must have been given the same, one asks for paraphrases, and one speaks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.trainer import ranks as _ranks
from tests.paraphrase.bad_server import BadServer, fresh
from tests.trainer.training_helpers import environment

# Seconds until the processes must have ended; they need about 20 on two busy cores.
DEADLINE = 240
TASK = "task01_product_note_polarity"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)


def torchrun(*words: str, ranks: int = 2, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_addr=127.0.0.1",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", *words]  # fmt: skip
    kept = {name: value for name, value in environment().items() if not name.upper().endswith("_PROXY")}
    return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, timeout=DEADLINE)


def test_alone_there_is_nothing_to_compare():
    values = torch.tensor([1.5, 2.5])
    assert not _ranks.several() and _ranks.first_of(values, torch.device("cpu")) is values
    assert _ranks.summed([1.0, 2.0], torch.device("cpu")) == ([1.0, 2.0], 1)
    _ranks.check_same({"pools": "00" * 32}, torch.device("cpu"))
    _ranks.leave()


CHILD = """
import json, os, sys, torch
import torch.distributed as dist
from sapo_peft.trainer import ranks as _ranks
from sapo_peft.trainer.run_state import hashed

dist.init_process_group("gloo")
rank, cpu = dist.get_rank(), torch.device("cpu")
made = {"first": _ranks.first_of(torch.tensor([1.0 + rank, 2.0]), cpu).tolist(),
        "sums": _ranks.summed([float(rank), 1.0], cpu), "errors": []}
same = {"pools": hashed("a"), "template": hashed("b"), "probe": hashed("c")}
_ranks.check_same(same, cpu)
for other in ({"pools": hashed("x")}, {"probe": hashed("x"), "template": hashed("y")}):
    try:
        _ranks.check_same({**same, **(other if rank == 2 else {})}, cpu)
    except ValueError as error:
        made["errors"].append(str(error))
open(f"{sys.argv[1]}/rank{rank}.json", "w").write(json.dumps(made))
_ranks.leave()
assert not dist.is_initialized()
"""


def test_a_rank_with_other_pools_is_named_on_every_rank(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    done = torchrun(str(tmp_path / "child.py"), str(tmp_path), ranks=3)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(3):
        made = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert made["first"] == [1.0, 2.0] and made["sums"] == [[3.0, 3.0], 3]
        assert made["errors"] == [
            "rank 2: expected the pools of rank 0, got others",
            "rank 2: expected the template and probe of rank 0, got others",
        ]


def test_one_process_asks_and_speaks(tmp_path):
    """`sapo train` in two processes: an endpoint that never gives the same answer twice is asked by one alone."""
    pytest.importorskip("openai")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"prompts": ["Is it positive, negative or mixed?"]}))
    data = str(BUNDLED_DIR / "SUPERNI" / TASK)
    words = ["--data", data, "--prompts", str(prompts), "--output", str(tmp_path / "out"), "--max-steps", "2",
             "--examples", "8", "--probe-examples", "2", "--batch-size", "2", "--device", "cpu",
             "--paraphrases", "3", "--paraphrase-model", "m", "--save-steps", "1"]  # fmt: skip
    with BadServer(fresh()) as server:
        done = torchrun("-m", "sapo_peft.cli", "train", *words, "--paraphrase-with", server.url, OPENAI_API_KEY="k")
        assert done.returncode == 0, done.stderr[-3000:]
        asked = len(server.questions)
    alone = len(json.loads((tmp_path / "out" / "sapo_pool.json").read_text())["prompts"])
    assert alone == 4 and 1 <= asked <= 3, asked
    record = json.loads((tmp_path / "out" / "sapo_prompts.json").read_text())
    assert [entry["prompts"] for entry in record["tasks"].values()] == [4]
    assert (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").is_file(), "there were two"
    for line in ("trained with prompt", "SAPO: 1 scorings took", "Adapter, sapo_prompts.json and model card are in"):
        assert done.stdout.count(line) == 1, done.stdout
