"""The bundled tasks: what the generator makes, complete and with known labels."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sapo_peft.assets import BUNDLED_DIR, task_names
from tests.conftest import ROOT
from tools.bundled_tasks import make_tasks

SIZES = {"train": 1000, "dev": 100, "test": 200}
TASKS = task_names()


def load(path):
    return json.loads((BUNDLED_DIR / path).read_text(encoding="utf-8"))


INSTRUCTIONS = load("SUPERNI/instructions.json")
ROWS = {task: {split: load(f"SUPERNI/{task}/{split}.json") for split in SIZES} for task in TASKS}


def all_rows(task):
    return [row for split in SIZES for row in ROWS[task][split]]


@pytest.mark.parametrize("task", TASKS)
def test_rows(task):
    """Complete, with known labels in like numbers; that nothing repeats is seen where the orders are read."""
    assert {split: len(rows) for split, rows in ROWS[task].items()} == SIZES
    labels = INSTRUCTIONS[task]["labels"]
    for row in all_rows(task):
        assert set(row) == {"sentence", "label"} and all(text == text.strip() and text for text in row.values())
        assert not re.search(r"[{}]|  ", row["sentence"] + row["label"]), "an unfilled or empty template field"
        assert not labels or row["label"] in labels
    for split, rows in ROWS[task].items() if labels else ():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(labels) and min(counts.values()) > 0.8 * len(rows) / len(labels), split


def test_generator_reproduces_the_files():
    command = [sys.executable, "-m", "tools.bundled_tasks.make_tasks", "--check"]
    paths = os.pathsep.join((str(ROOT), str(Path(BUNDLED_DIR).parents[2])))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_changes(tmp_path, capsys):
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    assert make_tasks.main(["--out", str(tmp_path), "--check"]) == 0
    path = tmp_path / "SUPERNI" / TASKS[0] / "dev.json"
    path.write_bytes(path.read_bytes() + b"\n")
    (tmp_path / "SUPERNI" / TASKS[1] / "test.json").unlink()
    (tmp_path / "CL_configs" / "order" / "extra.json").write_text("[]")
    capsys.readouterr()
    assert make_tasks.main(["--out", str(tmp_path), "--check"]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"differs: SUPERNI/{TASKS[0]}/dev.json",
        f"missing: SUPERNI/{TASKS[1]}/test.json",
        "not generated: CL_configs/order/extra.json",
    ]
