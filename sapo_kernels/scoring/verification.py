"""Every call verifies itself: one or two of its own cells go alone through the unmodified model.

The model runs on the whole sequence (L tokens, its own attention, hooks and all), and its logits at the response rows
are what the scoring path must have at the same rows, entry by entry. In float32 they agree within 1e-4 nats; in low
precision within what the plain model errs itself, measured against the same forward computed in float32.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..widened import LOW, in_float32
from . import model_support
from .response_cache import ResponseCache

# Nats in float32 or better: of a predicted token; and how an entry of a logit row may grow with its size.
TOLERANCE = 1e-4
RELATIVE = 1e-5
# Times the plain model's own error in low precision, of nine rows in ten: a row's mean square (two independent
# errors: 1.4), and the largest entry.
ROOT_MEAN_SQUARE, LARGEST = 2.5, 4.0
USUAL_ROWS = 0.9
# What that is taken for where it cannot be measured, and at most: a router that flips, or weights gone wild, make rows
# differ by nats, and are no measure.
UNMEASURED = (0.1, 0.5)
# Rows in front of the response that the model's own error in low precision is measured on too.
MORE_ROWS = 64
# Logits that are compared at a time.
_COMPARED_BYTES = 32 << 20


class Disagreement(RuntimeError):
    """A scoring path and the plain model differ on a cell; the message says by how much."""


@dataclass
class Check:
    """A cell by the plain model, and how far a scoring path is from it.

    Attributes:
        cell: its flat number in the cache.
        logits: [n, V] the model's own, at the n response rows, in its dtype.
        head: whether these are what `HeadReader` makes of the hidden states under them; None if the model's forward
            does not go through its output head.
        nll: the plain negative log-likelihood, nats.
        noise: (root mean square of a row, largest entry) of the plain model's own error, which nine rows in ten stay
            below; None in float32.
        worst: the largest difference seen, nats; of the compared rows.
    """

    cell: int
    logits: torch.Tensor
    head: bool | None
    nll: float
    noise: tuple[float, float] | None
    worst: float = 0.0
    _found: list[torch.Tensor] = field(default_factory=list, repr=False)
    _seen: set[int] = field(default_factory=set, repr=False)

    @property
    def finite(self) -> bool:
        return np.isfinite(self.nll)

    def begin(self) -> None:
        """Forget what an earlier path had."""
        self._found, self._seen, self.worst = [], set(), 0.0

    def compare(self, rows: torch.Tensor, logits: torch.Tensor) -> None:
        """What the path has for some rows of the cell, [m] on the CPU and [m, V]; does not wait for the device."""
        size = max(1, _COMPARED_BYTES // (4 * logits.shape[-1]))
        for first in range(0, len(rows), size):
            mine = rows[first : first + size]
            own = self.logits[mine.to(self.logits.device)].to(logits.device)
            self._found.append(_distances(logits[first : first + size], own))
        self._seen.update(rows.tolist())

    @property
    def bound(self) -> float:
        """What the largest difference may be, nats."""
        return TOLERANCE if self.noise is None else max(LARGEST * self.noise[1], TOLERANCE)

    @property
    def complete(self) -> bool:
        return len(self._seen) == len(self.logits)

    def judge(self) -> None:
        """Raise `Disagreement` if a compared row differs by more than rounding."""
        excess, square, largest = torch.stack(self._found).amax(0).tolist()
        self.worst = max(self.worst, largest)
        if self.noise is None:
            wrong = not excess <= 1.0
        else:
            rough = square <= max(ROOT_MEAN_SQUARE * self.noise[0], TOLERANCE) and largest <= self.bound
            wrong = not (excess <= 1.0 or rough)
        if wrong:
            raise Disagreement(f"it differs from the plain model by {largest:.3g} nats")

    def judge_sum(self, nll: float) -> None:
        """Raise `Disagreement` if the summed loss of the cell is not that of its rows."""
        if self.finite and not abs(nll - self.nll) <= self.bound * len(self.logits):
            raise Disagreement(f"its loss is {nll:.6g} nats, the plain model's {self.nll:.6g}")


def _distances(got: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """[3]: the largest excess over the float32 bounds, root mean square of the worst row, largest, of log-softmax."""
    wide = torch.float64 if got.dtype == torch.float64 else torch.float32
    got, own = torch.log_softmax(got.to(wide), -1), torch.log_softmax(own.to(wide), -1)
    # Masked logits are -inf and sick ones NaN on both sides; on one side only is as far as can be.
    distance = torch.where((got == own) | (got.isnan() & own.isnan()), 0.0, (got - own).abs()).nan_to_num(torch.inf)
    size = own.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0)
    excess = (distance / (TOLERANCE + RELATIVE * size)).amax()
    return torch.stack([excess, distance.square().mean(-1).sqrt().amax(), distance.amax()])


@contextlib.contextmanager
def exact_products():
    """Every operation in float32, and products in full precision; yields the mode that sees to it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with in_float32() as mode:
            yield mode
    finally:
        torch.set_float32_matmul_precision(before)


class PlainModel:
    """The unmodified model on one sequence at a time.

    keep_rows: ask for the logits of the last rows only, where the forward offers that and the head is a plain matrix;
    one with activations in int8 gives others for other rows beside them.
    """

    def __init__(self, model: nn.Module, inner: nn.Module, device: torch.device, keep_rows: bool):
        self.model, self.device = model, device
        offered = "logits_to_keep" in inspect.signature(inner.forward).parameters
        self.keep_rows = keep_rows and offered and model_support.plain_head(inner.get_output_embeddings())
        self.options = model_support.forward_options(inner)
        self.precise = torch.get_float32_matmul_precision() == "highest"

    def _logits(self, ids: np.ndarray, rows: int) -> torch.Tensor:
        inputs = {"input_ids": torch.from_numpy(ids)[None].to(self.device), **self.options}
        if self.keep_rows:
            inputs["logits_to_keep"] = rows + 1
        return self.model(**inputs).logits[0, -rows - 1 : -1]

    def score(self, cache: ResponseCache, cell: int, more_rows: int = 0) -> tuple[torch.Tensor, float]:
        """(logits [n, V] at the response rows of a whole cell and `more_rows` in front, its loss in nats)."""
        ids = cache.ids[cache.offsets[cell] : cache.offsets[cell + 1]]
        count = int(cache.response_lengths[cell])
        logits = self._logits(ids, min(len(ids) - 1, count + more_rows))
        targets = torch.from_numpy(ids[-count:]).to(logits.device)
        wide = logits[-count:] if logits.dtype == torch.float64 else logits[-count:].float()
        logprob = torch.log_softmax(wide, -1).gather(-1, targets[:, None])
        return logits, -float(logprob.double().sum())

    def check(self, cache: ResponseCache, cell: int, observed: Callable, noise: tuple[float, float] | None) -> Check:
        """One cell, to compare with.

        observed: ``HeadReader.observed``. noise: the known error in low precision; None: measure it.
        """
        count = int(cache.response_lengths[cell])
        with observed(count) as seen:
            own, nll = self.score(cache, cell)
        low = not self.precise or own.dtype in LOW or any(dtype in LOW for _, dtype in seen)
        if low and noise is None:
            noise = self._noise(cache, cell)
        head = agree(seen[-1][0], own, low) if seen else None
        return Check(cell, own, head, nll, noise if low else None)

    def _noise(self, cache: ResponseCache, cell: int) -> tuple[float, float]:
        logits = self.score(cache, cell, MORE_ROWS)[0]
        try:
            with exact_products():
                exact = self.score(cache, cell, MORE_ROWS)[0]
            pairs = zip(logits.split(1), exact.split(1), strict=True)
            _, square, largest = torch.stack([_distances(a, b) for a, b in pairs]).nanquantile(USUAL_ROWS, 0).tolist()
        except Exception:  # kernels that know low precision only
            return UNMEASURED
        return min(square, UNMEASURED[0]), min(largest, UNMEASURED[1])


def agree(got: torch.Tensor, own: torch.Tensor, low: bool) -> bool:
    """Whether two computations of the same logits from the same hidden states agree, entry by entry."""
    got, own = got.to(own.device), own.to(got.dtype)
    slack = 0.05 + 0.02 * own.abs() if low else TOLERANCE + 2 * RELATIVE * own.abs()
    return bool(((got == own) | ((got - own).abs() <= slack) | (got.isnan() & own.isnan())).all())


def chosen_cells(cache: ResponseCache, count: int) -> list[int]:
    """`count` different cells to verify: the longest, the shortest, then others evenly by length."""
    cells = cache.by_length
    places = np.linspace(0, len(cells) - 1, max(2, min(count, len(cells)))).round().astype(int)
    order = dict.fromkeys([0, len(cells) - 1, *places.tolist()])
    return [int(cells[place]) for place in order][:count]
