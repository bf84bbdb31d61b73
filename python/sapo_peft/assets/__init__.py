"""Data that comes with the package: six small tasks and the tiny base, so that everything runs with no download.

`BUNDLED_DIR` has the layout of a data folder: `SUPERNI/instructions.json`,
`SUPERNI/<task>/{train,dev,test}.json`, `paraphrases.json` and
`CL_configs/order/<order>/<n>-<task>/{train,dev,test}_tasks.json`.
"""

import hashlib
import json
from pathlib import Path

from sapo_kernels.files import DataError, read_bytes, read_json

BUNDLED_DIR: Path = Path(__file__).resolve().parent / "bundled"
TINY_BASE_DIR: Path = Path(__file__).resolve().parent / "tiny_base"
# Names every other file of a base and its SHA-256.
MANIFEST = "made_by.json"


def task_names() -> list[str]:
    """Names of the bundled tasks, in the order of `SUPERNI/instructions.json`."""
    text = (BUNDLED_DIR / "SUPERNI" / "instructions.json").read_text(encoding="utf-8")
    return list(json.loads(text))


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    return hashlib.sha256(read_bytes(path, max_bytes=2**31)).hexdigest()


def faults(folder: Path) -> list[str]:
    """What is wrong with a stored base, one line each: no manifest, a file that is missing, torn or changed."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = manifest["files"]
        if manifest["version"] != 1 or "model.safetensors" not in files:
            return [f"{folder / MANIFEST}: expected version 1 with model.safetensors"]
        named = {str(name): str(digest) for name, digest in files.items()}
    except (OSError, DataError, KeyError, TypeError, AttributeError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    found = []
    for name, digest in named.items():
        try:
            # Names come from a file: one that leads out of the folder is no name of a part of the base.
            got = None if Path(name).name != name else file_digest(folder / name)
        except (OSError, DataError):
            got = None
        if got != digest:
            found.append(f"{folder / name}: expected the file named in {MANIFEST}, got {'another' if got else 'none'}")
    return found


def tiny_base_folder() -> Path:
    """The folder of the shipped base, readable by `from_pretrained`; `DataError` if a file of it is damaged."""
    if wrong := faults(TINY_BASE_DIR):
        raise DataError(f"the tiny base that ships with the package is damaged: {wrong[0]}")
    return TINY_BASE_DIR
