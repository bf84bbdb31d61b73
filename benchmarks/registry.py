"""Every operation that is measured: its cases (the lines of a table) and its providers (the columns).

A case more is one line in `cpu` or `gpu` of its `Op`. A provider more is one function, which gets what the op's `make`
gave and returns the call to time; what it does before it returns is not timed:

    @linear_logprob.provider("liger", needs="liger_kernel", on="cuda")
    def liger(x):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as head

        return lambda: -head(x.hidden, x.weight, x.targets, reduction="none")

An operation more is an `Op` in `benchmarks/ops` that is imported there. A backward pass is an operation of its own: its
`make` has inputs that require gradients, and its providers return what `gradients` gives. No time is kept of an output
that the case's own check refuses (`timing.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .timing import Case, Provider
from .workload import data_folder

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Setting:
    """Where and how large to measure.

    toy: sizes that take seconds; their times mean nothing. data: folder of tasks. scale: times as many examples as
    usual. impl: of our operators. base: a real model for the races (`workload.load_pretrained`).
    """

    device: str = "cpu"
    toy: bool = False
    data: Path = field(default_factory=data_folder)
    scale: float = 1.0
    impl: str = "auto"
    base: str | None = None

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device == "cuda" else torch.float32


def not_installed(packages: Sequence[str]) -> str:
    """Those of some packages that are missing here, in one text."""
    return ", ".join(name for name in packages if importlib.util.find_spec(name) is None)


@dataclass(frozen=True)
class Entry:
    """How a provider is made, the packages it needs, the one device it is for (None: any)."""

    prepare: Callable[[Any], Callable[[], Any] | Provider]
    needs: tuple[str, ...] = ()
    on: str | None = None

    def missing(self, device: str) -> str:
        """Why it cannot run on `device`, or ""."""
        if lacking := not_installed(self.needs):
            return f"{lacking} is not installed"
        return f"it runs on {self.on} only" if self.on not in (None, device) else ""


OPS: dict[str, Op] = {}


class Op:
    """One operation; making it registers it.

    make: ``make(setting, name, *shape)`` gives (a `Case` without providers, what the providers are made of). cpu, gpu:
    the shapes of the cases of each device by name. toy: the one shape of toy size. share: of the time of
    ``python -m benchmarks``. names: the cases where they depend on the setting.
    """

    def __init__(self, name: str, make, *, cpu=None, gpu=None, toy: tuple = (), share: float = 0.02, names=None):
        self.name, self.make, self.toy, self.share = name, make, toy, share
        self.cases = {"cpu": cpu or {}, "cuda": gpu or {}}
        self._names = names
        self.providers: dict[str, Entry] = {}
        OPS[name] = self

    def provider(self, name: str, *, needs: str = "", on: str | None = None):
        """Decorator: see the module."""

        def register(prepare):
            self.providers[name] = Entry(prepare, tuple(needs.split()), on)
            return prepare

        return register

    def names(self, setting: Setting) -> list[str]:
        """The cases for a device, in their order; of toys, which are all of one size, the first."""
        found = self._names(setting) if self._names else list(self.cases[setting.device])
        return found[:1] if setting.toy else found

    def left_out(self, device: str) -> dict[str, str]:
        """The providers that cannot run on `device`, and why."""
        return {name: why for name, entry in self.providers.items() if (why := entry.missing(device))}

    def build(self, name: str, setting: Setting, only: Sequence[str] | None = None, shape: tuple | None = None) -> Case:
        """A case with the providers that can run here. only: these; shape: instead of the one registered."""
        if shape is None:
            shape = self.toy if setting.toy else self.cases[setting.device].get(name, ())
        case, made = self.make(setting, name, *shape)
        for provider, entry in self.providers.items():
            if (only is None or provider in only) and not entry.missing(setting.device):
                found = entry.prepare(made)
                case.providers[provider] = found if isinstance(found, Provider) else Provider(found)
        return case


def gradients(call: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor], upstream: torch.Tensor):
    """A call that goes forward and backward and gives the gradients of `inputs` in one flat tensor."""

    def run() -> torch.Tensor:
        found = torch.autograd.grad(call(), inputs, upstream)
        return torch.cat([gradient.flatten() for gradient in found])

    return run
