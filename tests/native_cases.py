"""What the tests of accumulate_ and reweight_ share: implementations, inputs, ways to compare."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from sapo_kernels import native
from sapo_kernels.accumulate.torch import accumulate_torch
from sapo_kernels.reweight.torch import reweight_torch

MODULES = {"cpu": "_C", "cuda": "_C_cuda"}


@dataclass(frozen=True)
class Implementation:
    """One way to run the two operators. "compiled" is what the dispatcher takes, "plain" what it would take without."""

    name: str
    device: str

    @staticmethod
    def available(name: str) -> bool:
        """On the CPU."""
        return name == "plain" or native.load("_C") == "loaded"

    def accumulate_(self, *arguments) -> None:
        run = torch.ops.sapo_kernels.accumulate_ if self.name == "compiled" else accumulate_torch
        run(*arguments)

    def reweight_(self, *arguments) -> None:
        run = torch.ops.sapo_kernels.reweight_ if self.name == "compiled" else reweight_torch
        run(*arguments)


def _parameter(name: str, device: str):
    marks = [pytest.mark.gpu] if device == "cuda" else []
    state = native.load(MODULES[device]) if name == "compiled" else "loaded"
    if state != "loaded":
        marks.append(pytest.mark.skip(reason=f"{MODULES[device]} is {state}"))
    return pytest.param(Implementation(name, device), id=f"{name}-{device}", marks=marks)


everywhere = pytest.mark.parametrize(
    "impl", [_parameter(name, device) for device in MODULES for name in ("compiled", "plain")]
)
needs_compiled = pytest.mark.skipif(native.load("_C") != "loaded", reason=f"_C is {native.load('_C')}")
needs_cuda_kernels = pytest.mark.skipif(
    native.load("_C_cuda") != "loaded", reason=f"_C_cuda is {native.load('_C_cuda')}"
)


def same_bits(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal dtype, shape and bits, -0.0 apart from 0.0; NaN is one value, as its payload differs between devices."""
    if got.dtype != expected.dtype or got.shape != expected.shape:
        return False
    got, expected = got.detach().cpu(), expected.detach().cpu()
    if not got.is_floating_point():
        return torch.equal(got, expected)
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    both_nan = got.isnan() & expected.isnan()
    return bool(((got.contiguous().view(integer) == expected.contiguous().view(integer)) | both_nan).all())


def assert_same_bits(got, expected, what="") -> None:
    """All tensors of `got` against those of `expected`, in their order."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"{what} tensor {i}: got {a}, expected {b}"


def storage_bytes(arguments) -> list[bytes]:
    """Every byte behind every tensor of `arguments`, also those that a view leaves out."""
    found = []
    for value in arguments:
        if isinstance(value, torch.Tensor) and not value.is_meta:
            storage = value.untyped_storage()
            found.append(torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage).cpu().numpy().tobytes())
    return found


def refusal(run, arguments) -> str:
    """The RuntimeError text of `run`; every byte of every argument is as before."""
    before = storage_bytes(arguments)
    with pytest.raises(RuntimeError) as caught:
        run(*arguments)
    assert storage_bytes(arguments) == before, "written before the check"
    return str(caught.value).split("\n")[0]


def misaligned(values: torch.Tensor) -> torch.Tensor:
    """The same values at an address that is no multiple of their size."""
    size = values.element_size()
    buffer = torch.zeros(values.numel() * size + 1, dtype=torch.uint8).numpy()
    buffer[1:] = values.contiguous().view(-1).view(torch.uint8).numpy()
    # Through numpy, as torch itself makes no such tensor.
    moved = torch.from_numpy(buffer[1:].view(values.numpy().dtype)).view(values.shape)
    assert moved.data_ptr() % size
    return moved


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same values, every other element of the last dimension of a larger tensor."""
    return torch.stack([values, values], -1)[..., 0]


class Job:
    """Targets with log-probabilities and cells made of them, for accumulate_."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32):
        self.rng = rng = np.random.default_rng(seed)
        targets = int(rng.integers(1, 500))
        longest = min(targets, 200 if seed % 5 == 0 else 25)
        lengths = rng.choice([0, 1, 2, longest // 3, longest], int(rng.integers(1, 12)))
        self.cells = [np.sort(rng.choice(targets, min(n, targets), replace=False)) for n in lengths]
        # Magnitudes far apart, so that another order of the sum has other bits, also where the rows are float32.
        values = -rng.exponential(2.0, targets) * 10.0 ** rng.integers(-14, 5, targets)
        self.logprob = torch.from_numpy(values).to(dtype)

    def exact(self, cell: int) -> float:
        """The sum of a cell strictly from left to right, in Python's doubles."""
        total = 0.0
        for value in self.logprob[self.cells[cell]].tolist():
            total -= value
        return total

    def composition(self):
        """Some cells in some order, among targets of which some belong to none: (chosen, logprob, lists, cuts)."""
        rng, total = self.rng, len(self.logprob)
        chosen = rng.permutation(len(self.cells))[: rng.integers(1, len(self.cells) + 1)]
        keep = rng.random(total) < rng.random()
        for c in chosen:
            keep[self.cells[c]] = True
        number = np.cumsum(keep) - 1
        lists = [number[self.cells[c]] for c in chosen]
        cell_target = torch.from_numpy(np.concatenate([*lists, np.zeros(0, np.int64)]).astype(np.int64))
        cell_ptr = torch.from_numpy(np.cumsum([0, *map(len, lists)]))
        logprob = self.logprob[torch.from_numpy(keep)]
        # Cuts may coincide: empty pieces, also the first and the last.
        cuts = np.sort(rng.integers(0, len(logprob) + 1, rng.choice([0, 1, 2, 7])))
        return chosen.tolist(), logprob, (cell_target, cell_ptr), [0, *cuts.tolist(), len(logprob)]


def accumulated(impl, logprob, lists, cuts):
    """(nll, tokens) on the CPU of a whole job, piece by piece."""
    lists, logprob = [v.to(impl.device) for v in lists], logprob.to(impl.device)
    cells = len(lists[1]) - 1
    nll = torch.zeros(cells, dtype=torch.float64, device=impl.device)
    tokens = torch.zeros(cells, dtype=torch.int64, device=impl.device)
    for begin, end in zip(cuts, cuts[1:], strict=False):
        impl.accumulate_(nll, tokens, logprob[begin:end], *lists, begin)
    return nll.cpu(), tokens.cpu()


WRITTEN = ("mean", "weight", "probs", "best", "effective")
TENSORS = (*WRITTEN, "live", "nll", "tokens")


def new_state(pools: int, prompts: int, device: str = "cpu") -> list[torch.Tensor]:
    """mean, weight, probs, best, effective of pools that were never scored; odd values where nothing may be written."""
    shape = (pools, prompts)
    return [
        torch.full(shape, torch.nan, dtype=torch.float64, device=device),
        torch.zeros(shape, dtype=torch.float64, device=device),
        torch.full(shape, 0.123, dtype=torch.float64, device=device),
        torch.full((pools,), -7, dtype=torch.int64, device=device),
        torch.full((pools,), -0.5, dtype=torch.float64, device=device),
    ]


def losses(rng, pools: int, prompts: int, bad: float = 0.03):
    """(live, nll, tokens) of one step: ragged live prompts, some not scored, a share `bad` of losses not usable."""
    shape = (pools, prompts)
    live = np.arange(prompts) < rng.integers(0, prompts + 1, (pools, 1))
    live &= rng.random(shape) < 0.95
    tokens = rng.integers(1, 400, shape)
    nll = tokens * (0.5 + 2 * rng.random(shape))
    tokens[rng.random(shape) < 0.3] = 0
    nll[(tokens == 0) & (rng.random(shape) < 0.5)] = np.nan
    where = rng.random(shape) < bad
    nll[where] = rng.choice([np.nan, np.inf, -np.inf], int(where.sum()))
    tokens[rng.random(shape) < bad / 4] = -3
    return torch.from_numpy(live), torch.from_numpy(nll), torch.from_numpy(tokens)


# Sequences of updates: what the values and the GPU tests of reweight_ run.
LARGEST, SMALLEST = sys.float_info.max, 5e-324
SIZES = (1, 2, 5, 31, 32, 33, 64, 65, 20, 97)
TEMPERATURES = (0.0, 1.0, 0.05, 1e-4, SMALLEST, 1e-300, 1e300, LARGEST, 0.3, 10.0)
POOLS, STEPS = 100, 4


def numbers(rng) -> tuple[float, float, float]:
    """decay, temperature, floor of one step."""
    decay = float(rng.choice([0.0, 1.0, 0.9, 0.5, rng.random()]))
    floor = float(rng.choice([0.0, 1.0, 0.1, rng.random()]))
    return decay, float(rng.choice(TEMPERATURES)), floor


def scenario(seed: int):
    """The steps of POOLS sequences at once: (prompts, [(live, nll, tokens, decay, temperature, floor)])."""
    rng = np.random.default_rng(seed)
    prompts = SIZES[seed % len(SIZES)]
    return prompts, [(*losses(rng, POOLS, prompts), *numbers(rng)) for _ in range(STEPS)]


def played(run, seed: int, device: str = "cpu") -> list[list[torch.Tensor]]:
    """The five written tensors on the CPU after each step."""
    prompts, steps = scenario(seed)
    state, seen = new_state(POOLS, prompts, device), []
    for live, nll, tokens, *rest in steps:
        run(*state, live.to(device), nll.to(device), tokens.to(device), *rest)
        seen.append([value.clone().cpu() for value in state])
    return seen
