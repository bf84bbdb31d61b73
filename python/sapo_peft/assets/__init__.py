"""Data that comes with the package: six small tasks and the tiny base, so that everything runs with no download.

`BUNDLED_DIR` has the layout of a data folder: `SUPERNI/instructions.json`,
`SUPERNI/<task>/{train,dev,test}.json`, `paraphrases.json` and
`CL_configs/order/<order>/<n>-<task>/{train,dev,test}_tasks.json`.
"""

import json
from pathlib import Path

BUNDLED_DIR: Path = Path(__file__).resolve().parent / "bundled"
TINY_BASE_DIR: Path = Path(__file__).resolve().parent / "tiny_base"


def task_names() -> list[str]:
    """Names of the bundled tasks, in the order of `SUPERNI/instructions.json`."""
    text = (BUNDLED_DIR / "SUPERNI" / "instructions.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def tiny_base_folder() -> Path:
    """The folder of the shipped base, readable by `from_pretrained`."""
    return TINY_BASE_DIR
