"""Small jobs of the command line: their words, what lies there before, and what they end with but for times."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapo_kernels.files import read_json
from sapo_peft.assets import BUNDLED_DIR
from tests.sequence.sequence_helpers import everything, without_times

TASK = "task02_odd_one_out"
DATA = f"{BUNDLED_DIR}/SUPERNI/{TASK}"
SMALL = ("--probe-examples", "2", "--lora-r", "2", "--batch-size", "2", "--lr", "1e-2", "--device", "cpu")
# Tasks of a run that export and report begin with.
RUN = ("sequence", "--output", "{run}", "--tasks", f"{TASK},task03_message_field", "--train-examples", "4",
       "--test-examples", "2", "--max-steps", "2", "--max-new-tokens", "3", *SMALL)  # fmt: skip
# One of them twice, one that the pool has, one that is refused; long enough for several pages of a disk.
PARAPHRASES = [f"Which of the words is the odd one, {'please, ' * 150}number {i}?" for i in range(16)]
PARAPHRASES[9:9] = [PARAPHRASES[2], "Which is the odd one out?", "Name the one that does not belong.", "a\x07b"]


@dataclass(frozen=True)
class Job:
    """words: of the command, with {here} for the folder; result: what it ends with. needs_run: begins with a run."""

    words: tuple[str, ...]
    result: Callable[[Path], Any]
    needs_run: bool = False


def _hashes(folder: Path, *patterns: str) -> dict[str, str]:
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _trained(here: Path) -> Any:
    names = ("adapter_*", "README.md", "sapo_prompts.json")
    return _hashes(here / "out", *names, *(f"checkpoint-*/{name}" for name in names), "checkpoint-*/optimizer.pt")


def _scored(here: Path) -> Any:
    found = without_times(json.loads((here / "s.json").read_text()))
    found["stats"] = {name: found["stats"][name] for name in ("dense_tokens", "path")}
    return found


JOBS = {
    "train": Job(
        ("train", "--model", "tiny", "--data", DATA, "--prompts", "{here}/p.json", "--output", "{here}/out",
         "--examples", "8", "--max-steps", "4", "--save-steps", "2", "--every-steps", "2", "--resume", *SMALL),
        _trained,
    ),
    "sequence": Job(tuple(word.replace("{run}", "{here}/out") for word in RUN), lambda here: everything(here / "out")),
    "score": Job(
        ("score", "--model", "tiny", "--data", DATA, "--prompts", "{here}/p.json", "--examples", "200",
         "--max-source", "64", "--out", "{here}/s.json", "--resume", "--quiet"),
        _scored,
    ),
    "paraphrase": Job(
        ("paraphrase", "--prompts", "{here}/p.json", "--from", "{here}/more.json", "--out", "{here}/pool.json"),
        lambda here: read_json(here / "pool.json"),
    ),
    "export": Job(("export", "{run}", "--out", "{here}/one"), lambda here: _hashes(here / "one", "*"), needs_run=True),
    "report": Job(
        ("report", "{run}", "--out", "{here}/r.html"), lambda here: len((here / "r.html").read_text()), needs_run=True
    ),
}  # fmt: skip


def prepare(here: Path) -> None:
    """The inputs of all jobs."""
    here.mkdir(exist_ok=True)
    (here / "p.json").write_text(json.dumps(["Which is the odd one out?", "Name the one that does not belong."]))
    (here / "more.json").write_text(json.dumps(PARAPHRASES))


def words_of(name: str, here: Path, run: Path) -> list[str]:
    return [word.replace("{here}", str(here)).replace("{run}", str(run)) for word in JOBS[name].words]


def left_over(here: Path) -> list[str]:
    """What a job should not leave behind: temporary and partial files."""
    return sorted(str(path.relative_to(here)) for path in here.rglob("*") if path.name.endswith((".tmp", ".part")))
