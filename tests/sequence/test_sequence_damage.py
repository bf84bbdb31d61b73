"""Whatever is damaged in a run's folder is found before anything is built on it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sapo_kernels.files import DataError
from sapo_kernels.manifest import MANIFEST
from sapo_peft.report import write_report
from sapo_peft.sequence import load_adapters
from sapo_peft.sequence import runner as runner_module
from tests.sequence.sequence_helpers import everything, model_and_tokenizer, run_begun, run_small, small_tasks

OPTIONS = {"max_steps": 2, "generate": False}
PAIR, TASKS = model_and_tokenizer(), small_tasks(3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three tasks."""
    path = tmp_path_factory.mktemp("damage") / "run"
    run_small(path, model=PAIR, tasks=TASKS, **OPTIONS)
    return path


@pytest.fixture(scope="module", params=["done", "running"])
def folder(request, finished, tmp_path_factory):
    """A run of three tasks; or one that was stopped in its third."""
    if request.param == "done":
        return finished
    path = tmp_path_factory.mktemp("damage") / "run"
    run_begun(path, 2, model=PAIR, tasks=TASKS, **OPTIONS)
    return path


# What happens to a file, by name; True if it did.


def flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def overwrite(path: Path, draw: random.Random) -> None:
    data, size = bytearray(path.read_bytes()), draw.randint(1, 64)
    place = draw.randrange(len(data))
    data[place : place + size] = bytes(size)
    path.write_bytes(data)


def edit(path: Path, draw: random.Random) -> None:
    """Another number or word somewhere in a JSON file, as an editor would write it."""
    content = json.loads(path.read_text())
    places = []

    def walk(value):
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                places.append((value, key, item))
                walk(item)

    walk(content)
    at, key, value = draw.choice([one for one in places if not isinstance(one[2], (dict, list))])
    at[key] = not value if isinstance(value, bool) else value + 1 if isinstance(value, (int, float)) else f"{value}x"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def retouch(path: Path, draw: random.Random) -> None:
    """One tensor is missing, has a new number, or another name."""
    tensors, kind = load_file(path), draw.choice(("drop", "nan", "rename", "change"))
    name = draw.choice(sorted(tensors))
    tensor = tensors.pop(name)
    if kind == "rename":
        tensors[name.replace("lora", "Lora")] = tensor
    elif kind != "drop":
        tensor.view(-1)[draw.randrange(tensor.numel())] = float("nan") if kind == "nan" else 1.5
        tensors[name] = tensor
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES = {
    "flip": flip,
    "overwrite": overwrite,
    "truncate": lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)]),
    "append": lambda path, draw: path.write_bytes(path.read_bytes() + draw.choice((b" ", b"\0", b"\n"))),
    "delete": lambda path, draw: path.unlink(),
    "edit": edit,
    "retouch": retouch,
    "add": lambda path, draw: (path.parent / f"{path.stem}-{draw.randrange(9)}{path.suffix}").write_bytes(b"{}"),
    "folder": lambda path, draw: shutil.rmtree(path.parent),
    "link": lambda path, draw: (path.rename(path.with_name(".kept")), path.symlink_to(".kept")),
}


def damage(folder: Path, draw: random.Random) -> str:
    """Do one damage and say which; what is not part of the run, a note beside it, is none."""
    kind = draw.choice(sorted(DAMAGES))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    if kind in ("add", "folder", "link"):
        files = [path for path in files if path.parent != folder]
    if kind in ("edit", "retouch"):
        files = [path for path in files if path.suffix == (".json" if kind == "edit" else ".safetensors")]
    path = draw.choice(files)
    DAMAGES[kind](path, draw)
    return f"{kind} {path.relative_to(folder)}"


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_every_damage_is_found_on_resume(folder, tmp_path, monkeypatch, count):
    draw, missed, kinds = random.Random(11), [], {}
    monkeypatch.setattr(runner_module, "train_task", None)
    monkeypatch.setattr(runner_module._Start, "_warn", lambda self, notes: None)
    work = tmp_path / "run"
    for number in range(count):
        shutil.copytree(folder, work)
        told = damage(work, draw)
        kinds[told.split()[0]] = kinds.get(told.split()[0], 0) + 1
        before = everything(work) if number % 20 == 0 and "json" not in told else None
        try:
            run_small(work, model=PAIR, tasks=TASKS, **OPTIONS)
            missed.append(f"{number}: {told}")
        except (DataError, OSError) as error:
            assert str(work) in str(error), told
        except TypeError:  # training begins: nothing was noticed
            missed.append(f"{number}: {told}")
        # Nothing is repaired or removed in silence.
        assert before is None or everything(work) == before
        shutil.rmtree(work)
    print(f"\n{count} damages, {count - len(missed)} found: {dict(sorted(kinds.items()))}")
    assert not missed and len(kinds) == len(DAMAGES)


@pytest.mark.parametrize("name, old, new, words", [
    ("run.json", '"seed": 3', '"seed": 4', "run.json: expected sha256"),
    ("before.json", '"examples": [', '"examples": [9,', "before.json: expected size"),
    ("tasks/01-colours1/metrics.json", '"loss": [\n   ', '"loss": [\n   1', "01-colours1/metrics.json: expected size"),
    ("tasks/02-colours2/adapter/adapter_config.json", "32", "64", "adapter_config.json: expected sha256"),
    (MANIFEST, '"size"', '"site"', MANIFEST + ": expected an unchanged manifest"),
])  # fmt: skip
def test_damage_of_a_finished_run_is_named(finished, tmp_path, name, old, new, words):
    work = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("A file beside those of the run is nobody's business.")
    load_adapters(model_and_tokenizer()[0], work)
    text = (work / name).read_text()
    assert old in text
    (work / name).write_text(text.replace(old, new, 1))
    for read in (lambda: load_adapters(model_and_tokenizer()[0], work), lambda: write_report(work)):
        with pytest.raises(DataError) as error:
            read()
        assert words in str(error.value) and str(work) in str(error.value)
