"""What the launchers of all Triton kernels share."""

from __future__ import annotations

import contextlib

import torch
import triton

# What the kernels compute in; they accumulate in float32.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The interpreter is in the compiler's place (TRITON_INTERPRET=1). It computes garbage on bfloat16 without an error, so
# kernels then cast right after the load, which is exact; and tiles are small, so that small tests cross their borders.
INTERPRET = triton.knobs.runtime.interpret


def capability(device: torch.device) -> int:
    """10 * major + minor of an NVIDIA GPU, else 0."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_device(t: torch.Tensor):
    """A launch inside goes to the device of `t`."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
