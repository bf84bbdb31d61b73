"""The compiled modules: which exist, whether they fit, and why not.

`_C` and `_C_cuda` hold the CPU and CUDA kernels of ``accumulate_`` and ``reweight_`` on LibTorch's stable ABI, so one
binary serves every torch from 2.10 on; `_planner` holds the token-trie planner and knows no torch. All are optional:
without them the same operators run in plain torch and numpy, slower, with the same bits.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import struct
from functools import cache
from pathlib import Path

import torch

logger = logging.getLogger("sapo_kernels")

# Raised when an operator's arguments change. It is part of the file names, so that a module compiled for other
# arguments (a checkout pulled without building it again) is not found instead of being called wrongly.
ABI = 3
FOLDER = Path(__file__).resolve().parent


def library_path(name: str) -> Path:
    """Path of the stable-ABI library `name` (``_C`` or ``_C_cuda``) if it was built."""
    return FOLDER / f"{name}.abi{ABI}.so"


def _cut_off(path: Path) -> str:
    """Why the file is no whole ELF object; empty if it is. To map a part of one would kill the process."""
    with open(path, "rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return f"{path.name} is no 64-bit ELF file"
    # The table of sections stands at the end of the file.
    (table,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    expected, got = table + entry * count, path.stat().st_size
    return f"{path.name} is cut off: expected {expected} bytes, got {got}" if got < expected else ""


def _refused(name: str, reason: str, instead: str) -> str:
    reason = f"does not load: {reason[:300]}"
    logger.warning("%s %s; %s is used instead, slower, with the same results", name, reason, instead)
    return reason


@cache
def load(name: str) -> str:
    """Load ``_C`` or ``_C_cuda`` once; "loaded", or why it was not."""
    path = library_path(name)
    if not path.is_file():
        return "not built"
    if name == "_C_cuda" and torch.version.cuda is None:
        return "this torch has no CUDA"
    try:
        broken = _cut_off(path)
        if broken:
            return _refused(name, broken, "plain torch")
        torch.ops.load_library(path)
        # A driver that is too old, or a device that nothing was compiled for, must not lose what plain torch can do.
        reason = _register_cuda(path) if name == "_C_cuda" else ""
    except (OSError, AttributeError) as error:
        return _refused(name, str(error), "plain torch")
    return _refused(name, reason, "plain torch") if reason else "loaded"


def _register_cuda(path: Path) -> str:
    """Let the library register its kernels; why it did not, empty if it did."""
    register = ctypes.CDLL(str(path)).sapo_kernels_register_cuda
    register.restype = ctypes.c_char_p
    return register().decode("utf-8", "replace")


@cache
def _import_planner():
    spec = importlib.util.find_spec(f"{__package__}._planner")
    # An editable installation may point to a module of another copy of the package.
    if spec is None or Path(spec.origin).resolve().parent != FOLDER:
        return None, "not built"
    try:
        broken = _cut_off(Path(spec.origin))
        if broken:
            return None, _refused("_planner", broken, "numpy")
        module = importlib.import_module(spec.name)
    except (ImportError, OSError) as error:
        return None, _refused("_planner", str(error), "numpy")
    if module.ABI != ABI:
        return None, f"built for interface {module.ABI}, expected {ABI}: build it again"
    return module, "loaded"


def planner():
    """The compiled planner module, or None."""
    return _import_planner()[0]


def status() -> dict[str, str]:
    """Each compiled module and "loaded" or the reason why it is not in use."""
    return {"_C": load("_C"), "_C_cuda": load("_C_cuda"), "_planner": _import_planner()[1]}
