"""The bundled tasks: sizes, prompts, clean splits, and labels worked out again without the generator."""

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
PARAPHRASES = load("paraphrases.json")
ROWS = {task: {split: load(f"SUPERNI/{task}/{split}.json") for split in SIZES} for task in TASKS}


def normal(text):
    return " ".join(text.lower().split())


def all_rows(task):
    return [row for split in SIZES for row in ROWS[task][split]]


def named(part):
    """The one task with this word in its name."""
    (task,) = [task for task in TASKS if part in task]
    return task


def test_there_are_six_tasks_and_nothing_else():
    assert len(TASKS) >= 6
    assert sorted(path.name for path in (BUNDLED_DIR / "SUPERNI").iterdir() if path.is_dir()) == sorted(TASKS)
    assert sorted(PARAPHRASES) == sorted(TASKS)
    assert sum(path.stat().st_size for path in BUNDLED_DIR.rglob("*.json")) < 2.5 * 2**20


@pytest.mark.parametrize("task", TASKS)
def test_prompts(task):
    entry, prompts = INSTRUCTIONS[task], PARAPHRASES[task]
    assert set(entry) == {"instruction", "suffix", "labels", "size"} and entry["size"] == list(SIZES.values())
    assert entry["instruction"].strip() and entry["suffix"].strip() and len(prompts) >= 20
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    assert len({normal(prompt) for prompt in [*prompts, entry["instruction"]]}) == len(prompts) + 1
    assert not any(normal(entry["suffix"]) in normal(prompt) for prompt in prompts)
    for label in entry["labels"]:
        if label in entry["instruction"]:
            assert all(re.search(rf"\b{re.escape(label)}\b", prompt) for prompt in prompts), label
    # Wording and form vary: from one short line to several sentences or a list.
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 70 and lengths[-1] > 200 and len({prompt.split()[0] for prompt in prompts}) >= 12
    assert any("\n" in prompt for prompt in prompts) and any("?" in prompt for prompt in prompts)


@pytest.mark.parametrize("task", TASKS)
def test_rows(task):
    """Complete, with known labels in like numbers, and no input twice: neither duplicates nor leaks nor conflicts."""
    assert {split: len(rows) for split, rows in ROWS[task].items()} == SIZES
    labels = INSTRUCTIONS[task]["labels"]
    for row in all_rows(task):
        assert set(row) == {"sentence", "label"} and all(text == text.strip() and text for text in row.values())
        assert not re.search(r"[{}]|  ", row["sentence"] + row["label"]), "an unfilled or empty template field"
        assert not labels or row["label"] in labels
    for split, rows in ROWS[task].items() if labels else ():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(labels) and min(counts.values()) > 0.8 * len(rows) / len(labels), split
    assert max(Counter(normal(row["sentence"]) for row in all_rows(task)).values()) == 1


def test_no_set_of_items_twice():
    """The same words or items in another order, layout or direction would be a leak too."""
    for task in (named("odd_one"), named("order")):
        counts = Counter(tuple(sorted(re.findall(r"[\w$°.:-]+", row["sentence"]))) for row in all_rows(task))
        assert max(counts.values()) == 1
    sets = [frozenset(row["label"].split(", ")) for row in all_rows(named("order"))]
    assert len(set(sets)) == len(sets)


def test_task_orders():
    folders = [path for path in (BUNDLED_DIR / "CL_configs" / "order").iterdir() if path.is_dir()]
    orders = set()
    for folder in folders:
        trained = []
        for number, step in enumerate(sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[0])), start=1):
            place = step.relative_to(BUNDLED_DIR)
            (entry,), dev, test = (load(place / f"{split}_tasks.json") for split in SIZES)
            assert entry["sampling strategy"] == "full" and dev == []
            assert step.name == f"{number}-{entry['dataset_name'].split('_')[0]}"
            trained.append(entry["dataset_name"])
        assert sorted(trained) == sorted(TASKS) and [entry["dataset_name"] for entry in test] == trained
        orders.add(tuple(trained))
    assert len(folders) == len(orders) == 2


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
