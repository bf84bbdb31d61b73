"""Several processes of one command: one asks for paraphrases, and one speaks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from sapo_peft.assets import BUNDLED_DIR
from tests.paraphrase.bad_server import BadServer, fresh
from tests.trainer.training_helpers import environment

# Seconds until the processes must have ended; they need about 20 on two busy cores.
DEADLINE = 240
TASK = "task01_product_note_polarity"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch was built without gloo",
)


def torchrun(*words: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1",
               "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", *words]  # fmt: skip
    kept = {name: value for name, value in environment().items() if not name.upper().endswith("_PROXY")}
    return subprocess.run(command, env={**kept, **variables}, capture_output=True, text=True, timeout=DEADLINE)


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
