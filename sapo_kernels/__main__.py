"""``python -m sapo_kernels``: versions, devices, and which backend each operator will use here and why."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import __version__, native
from .ops import BACKENDS, resolve_impl, triton_status

LIBRARIES = ("torch", "numpy", "triton", "transformers", "peft", "accelerate", "trl")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[torch.device, str]]:
    found = [(torch.device("cpu"), f"{torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        found.append((torch.device("cuda", i), f"{torch.cuda.get_device_name(i)}, capability {major}.{minor}"))
    return found


def report() -> str:
    """The text that `python -m sapo_kernels` prints."""
    lines = [
        f"sapo_kernels {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    ]
    lines += ["", "libraries", *(f"  {name:<14}{_version(name)}" for name in LIBRARIES)]
    lines += ["", "native modules", *(f"  {name:<14}{why}" for name, why in native.status().items())]
    for device, what in _devices():
        lines += ["", f"{device} ({what})"]
        usable, why = triton_status(device)
        for op, backends in BACKENDS.items():
            chosen = resolve_impl(op, "auto", device)
            names = [name for name in backends if name != "triton" or usable]
            because = (
                why if chosen == "triton" or not usable else "the interpreter is for tests: only with impl='triton'"
            )
            lines.append(f"  {op:<16}{chosen:<10} {because}; available: {', '.join(names)}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
