"""score_prompts on a model that FSDP2 has sharded over two ranks (gloo, CPU), before and after a step of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_a_sharded_model_is_scored_as_the_whole_one(tmp_path):
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m",
         "tests.scoring.fsdp_child", str(tmp_path)],
        cwd=ROOT, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for found in ranks:
        assert found["kinds"] == ["DTensor"], "nothing was sharded"
        for (path, whole), (other, sharded) in zip(found["whole"], found["sharded"], strict=True):
            assert path == other == "tree"
            assert torch.allclose(torch.tensor(whole), torch.tensor(sharded), rtol=0, atol=1e-5)
        assert found["whole"][0][1] != found["whole"][1][1], "the step changed nothing"
    assert ranks[0]["sharded"] == ranks[1]["sharded"]
