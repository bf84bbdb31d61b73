"""Six small, self-written tasks that come with the package, so that everything runs with no download.

`BUNDLED_DIR` has the layout of a data folder: `SUPERNI/instructions.json`,
`SUPERNI/<task>/{train,dev,test}.json`, `paraphrases.json` and
`CL_configs/order/<order>/<n>-<task>/{train,dev,test}_tasks.json`.
`python -m sapo_peft.bundled.make_tasks` writes them; with `--check` it tells whether they are up to date.
"""

import json
import pathlib

BUNDLED_DIR: pathlib.Path = pathlib.Path(__file__).resolve().parent


def task_names() -> list[str]:
    """Names of the bundled tasks, in the order of `SUPERNI/instructions.json`."""
    text = (BUNDLED_DIR / "SUPERNI" / "instructions.json").read_text(encoding="utf-8")
    return list(json.loads(text))


__all__ = ["BUNDLED_DIR", "task_names"]
