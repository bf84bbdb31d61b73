"""Several processes of one command: one speaks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sapo_peft.assets import BUNDLED_DIR
from tests.trainer.training_helpers import environment

# Seconds until the processes must have ended; they need about 20 on two busy cores.
DEADLINE = 240

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)


def torchrun(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", *words]  # fmt: skip
    kept = {name: value for name, value in environment().items() if not name.upper().endswith("_PROXY")}
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=DEADLINE)


def test_one_process_speaks(tmp_path):
    """`sapo train` in two processes."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"prompts": ["Is it positive, negative or mixed?"]}))
    words = ["--data", str(BUNDLED_DIR / "SUPERNI" / "task01_product_note_polarity"), "--prompts", str(prompts),
             "--output", str(tmp_path / "out"), "--max-steps", "2", "--examples", "8", "--probe-examples", "2",
             "--batch-size", "2", "--device", "cpu", "--save-steps", "1"]  # fmt: skip
    done = torchrun("-m", "sapo_peft.cli", "train", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "checkpoint-2" / "rng_state_1.pth").is_file(), "there were two"
    for line in ("trained with prompt", "SAPO: 1 scorings took", "Adapter, sapo_prompts.json and model card are in"):
        assert done.stdout.count(line) == 1, done.stdout
