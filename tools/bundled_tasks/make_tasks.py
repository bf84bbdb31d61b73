"""Write the rows and orders of the bundled tasks, or check that the files on disk are what this generator writes.

    python -m tools.bundled_tasks.make_tasks           # write
    python -m tools.bundled_tasks.make_tasks --check   # compare; exit status 1 on any difference

Every text comes from seeded draws over hand-written templates and word lists, so each label is right by
construction: the generator decides on the answer, or computes it, and then renders the input.
"""

import argparse
import json
import pathlib
import sys

from sapo_peft.assets import BUNDLED_DIR
from tools.bundled_tasks.common import TaskRecipe, make_splits
from tools.bundled_tasks.tasks_arithmetic import ARITHMETIC
from tools.bundled_tasks.tasks_extract import EXTRACT
from tools.bundled_tasks.tasks_odd_one import ODD_ONE
from tools.bundled_tasks.tasks_order import ORDER
from tools.bundled_tasks.tasks_passive import PASSIVE
from tools.bundled_tasks.tasks_polarity import POLARITY

TASKS: tuple[TaskRecipe, ...] = (POLARITY, ODD_ONE, EXTRACT, PASSIVE, ARITHMETIC, ORDER)
ORDERS = {
    "bundled_a": (POLARITY, EXTRACT, ARITHMETIC, ODD_ONE, PASSIVE, ORDER),
    "bundled_b": (ORDER, PASSIVE, ODD_ONE, ARITHMETIC, EXTRACT, POLARITY),
}
# Patterns of generated files; another one that fits is reported by --check.
GENERATED = ("SUPERNI/*/*", "CL_configs/**/*")


def _rows_json(rows: list[dict[str, str]]) -> str:
    """A JSON list with one row per line, which keeps diffs readable and the file small."""
    return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def _order_entry(task: TaskRecipe) -> dict[str, str]:
    return {"sampling strategy": "full", "dataset_name": task.name}


def build_files() -> dict[str, bytes]:
    """Every generated file: relative path (with `/`) -> content, in UTF-8 with `\\n` line ends."""
    files = {}
    for task in TASKS:
        for split, rows in make_splits(task).items():
            files[f"SUPERNI/{task.name}/{split}.json"] = _rows_json(rows)
    for order, tasks in ORDERS.items():
        for number, task in enumerate(tasks, start=1):
            folder = f"CL_configs/order/{order}/{number}-{task.name.split('_')[0]}"
            files[f"{folder}/train_tasks.json"] = _json([_order_entry(task)])
            files[f"{folder}/dev_tasks.json"] = _json([])
            files[f"{folder}/test_tasks.json"] = _json([_order_entry(each) for each in tasks])
    return {path: text.encode("utf-8") for path, text in files.items()}


def write(folder: pathlib.Path) -> int:
    """Write every data file under `folder`; returns the number of bytes."""
    files = build_files()
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return sum(map(len, files.values()))


def differences(folder: pathlib.Path) -> list[str]:
    """What is wrong with the data files under `folder`, one line each; empty when they are byte-identical."""
    files = build_files()
    problems = []
    for path, content in files.items():
        target = folder / path
        if not target.is_file():
            problems.append(f"missing: {path}")
        elif target.read_bytes() != content:
            problems.append(f"differs: {path}")
    for target in sorted(target for pattern in GENERATED for target in folder.glob(pattern)):
        path = target.relative_to(folder).as_posix()
        if target.is_file() and path not in files:
            problems.append(f"not generated: {path}")
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bundled_tasks.make_tasks", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="compare with the files on disk and write nothing")
    parser.add_argument("--out", type=pathlib.Path, default=BUNDLED_DIR, help="data folder (default: the package's)")
    options = parser.parse_args(arguments)
    if options.check:
        problems = differences(options.out)
        print("\n".join(problems) if problems else f"{options.out}: up to date")
        return 1 if problems else 0
    print(f"{options.out}: {write(options.out)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
