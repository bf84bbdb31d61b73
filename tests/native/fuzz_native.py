"""Throw random arguments at the compiled operators and the compiled planner; compare with the plain ones: accumulate_
and the planner bit for bit, reweight_ within rounding (each has its own exponential and order of sums).

    python -m tests.native.fuzz_native --seconds 60 --seed 0
    python -m tests.native.fuzz_native --seed 0 --case 1234      # one case again

Shapes, dtypes, strides, storage offsets, views that overlap, addresses that are not aligned, numbers at the ends of
their range, lists of garbage. A call must raise and leave every byte alone, or give what the plain one gives.
tests/sanitize.py runs this on a build that also sees every read and write out of place.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from sapo_kernels import native
from sapo_kernels.accumulate.torch import accumulate_torch
from sapo_kernels.reweight.torch import reweight_torch
from sapo_kernels.trie.numpy_planner import plan_numpy
from tests.native_cases import TENSORS, same_bits

FLOATS = np.asarray([0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1e-308, 1e300, -1e308, 1.7976931348623157e308, 0.5, np.nan,
                     np.inf, -np.inf])  # fmt: skip
INTEGERS = np.asarray([0, 1, 2, 3, 5, -1, -2, 2**31, -(2**31), 2**32, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)])
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
          torch.uint8, torch.bool, torch.complex64)  # fmt: skip


@dataclass
class Place:
    """Where a tensor lies: elements of a buffer, or contiguous from some byte of it on if `byte` is given."""

    buffer: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int = 0
    byte: int | None = None


def _bytes(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.uint8)


def dense(shape) -> tuple[int, ...]:
    stride, step = [], 1
    for n in reversed(shape):
        stride.append(step)
        step *= max(n, 1)
    return tuple(reversed(stride))


class Call:
    """Arguments as bytes and places, so that the same call, shared memory and all, can be made twice."""

    def __init__(self, rng, values: dict, numbers: tuple):
        self.rng, self.numbers = rng, numbers
        self.buffers, self.places = [], []
        for value in values.values():
            value = torch.from_numpy(np.ascontiguousarray(value))
            self.places.append(Place(len(self.buffers), value.dtype, tuple(value.shape), dense(value.shape)))
            self.buffers.append(value.view(-1).view(torch.uint8).clone() if value.numel() else _bytes(0))

    def disturb(self) -> None:
        """One random change of where an argument lies or how it looks."""
        rng = self.rng
        one = self.places[rng.integers(len(self.places))]
        size = torch.empty(0, dtype=one.dtype).element_size()
        count = int(np.prod(one.shape))
        kind = rng.integers(8)
        if kind == 0:  # another dtype, on memory that is large enough for it
            one.dtype = DTYPES[rng.integers(len(DTYPES))]
            self.buffers[one.buffer] = torch.cat([self.buffers[one.buffer], _bytes(count * 16)])
        elif kind == 1:  # another shape
            shape = list(one.shape)
            change = rng.integers(4)
            if change == 0:
                shape.insert(int(rng.integers(len(shape) + 1)), int(rng.integers(3)))
            elif change == 1 and shape:
                shape.pop(int(rng.integers(len(shape))))
            elif shape:
                at = int(rng.integers(len(shape)))
                shape[at] = max(0, shape[at] + int(rng.choice([-2, -1, 1, 2, 7])))
            one.shape, one.stride = tuple(shape), dense(shape)
        elif kind == 2 and one.shape:  # other strides
            one.stride = tuple(int(rng.choice([0, 1, 2, 3, s, s + 1])) for s in one.stride)
        elif kind == 3 and len(one.shape) > 1:
            one.shape, one.stride = one.shape[::-1], one.stride[::-1]
        elif kind == 4:  # further in
            before = int(rng.integers(1, 9))
            self.buffers[one.buffer] = torch.cat([_bytes(before * size), self.buffers[one.buffer]])
            one.offset += before
        elif kind == 5:  # not aligned
            one.byte, one.stride = int(rng.integers(0, 9)), dense(one.shape)
        else:  # in the memory of another argument, from side by side to right on top
            other = self.places[rng.integers(len(self.places))]
            room = len(self.buffers[other.buffer])
            one.buffer, one.offset = other.buffer, int(rng.integers(0, max(room // size, 0) + 1))
        # What is now addressed has to exist; usually not a byte more, so that a step beyond it shows.
        need = self._end(one)
        missing = need - len(self.buffers[one.buffer])
        if missing > 0:
            self.buffers[one.buffer] = torch.cat([self.buffers[one.buffer], _bytes(missing)])

    @staticmethod
    def _end(place: Place) -> int:
        size = torch.empty(0, dtype=place.dtype).element_size()
        if 0 in place.shape:
            return place.offset * size + (place.byte or 0)
        stride = place.stride if place.byte is None else dense(place.shape)
        last = sum((n - 1) * s for n, s in zip(place.shape, stride, strict=True))
        return (place.offset + last + 1) * size + (place.byte or 0)

    def make(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(buffers, arguments), each time in fresh memory."""
        buffers, made = [b.clone() for b in self.buffers], []
        for place in self.places:
            whole = buffers[place.buffer]
            if place.byte is not None and place.dtype != torch.bfloat16 and 0 not in place.shape:
                raw = whole.numpy()[place.byte :]
                kind = torch.empty(0, dtype=place.dtype).numpy().dtype
                count = int(np.prod(place.shape))
                made.append(torch.from_numpy(raw[: count * kind.itemsize].view(kind)).view(place.shape))
            else:
                tensor = torch.empty(0, dtype=place.dtype)
                made.append(tensor.set_(whole.untyped_storage(), place.offset, place.shape, place.stride))
        return buffers, made


def reweight_call(rng) -> Call:
    pools, prompts = int(rng.choice([0, 1, 1, 2, 3, 5])), int(rng.choice([0, 1, 2, 5, 31, 32, 33, 63, 64, 65, 100]))
    shape = (pools, prompts)

    def floats(low, high):
        wild = rng.random() < 0.3
        usual = low + (high - low) * rng.random(shape)
        return np.where(rng.random(shape) < (0.5 if wild else 0.02), rng.choice(FLOATS, shape), usual)

    counts = rng.integers(0, 50, shape)
    if rng.random() < 0.3:
        counts = np.where(rng.random(shape) < 0.5, rng.choice(INTEGERS, shape), counts)
    values = dict(
        mean=floats(0, 3), weight=floats(0, 100), probs=floats(0, 1), best=rng.integers(-1, 5, pools),
        effective=rng.random(pools), live=rng.random(shape) < 0.8, nll=floats(0, 50), tokens=counts,
    )  # fmt: skip
    assert tuple(values) == TENSORS

    def number(high):
        return float(rng.choice([0.0, high, high * rng.random()]) if rng.random() < 0.9 else rng.choice(FLOATS))

    return Call(rng, values, (number(1.0), number(2.0), number(1.0)))


def accumulate_call(rng) -> Call:
    cells, count = int(rng.choice([0, 1, 2, 3, 10])), int(rng.choice([0, 1, 2, 7, 30]))
    start = int(rng.choice([0, 0, 1, 5]))
    lengths = rng.integers(0, 6, cells)
    target = np.concatenate([np.sort(rng.integers(start, start + count + 3, n)) for n in lengths] + [np.zeros(0, int)])
    pointer = np.cumsum([0, *lengths])
    tokens = np.zeros(cells, np.int64)
    if rng.random() < 0.3:
        target = np.where(rng.random(target.shape) < 0.2, rng.choice(INTEGERS, target.shape), target)
    if rng.random() < 0.2:
        pointer = np.where(rng.random(pointer.shape) < 0.3, rng.choice(INTEGERS, pointer.shape), pointer)
    if rng.random() < 0.2:
        tokens = np.where(rng.random(cells) < 0.5, rng.choice(INTEGERS, cells), rng.integers(0, 3, cells))
    if rng.random() < 0.1:
        start = int(rng.choice(INTEGERS))
    logprob = -rng.exponential(1, count) * 10.0 ** rng.integers(-9, 9, count)
    logprob = np.where(rng.random(count) < 0.05, rng.choice(FLOATS, count), logprob)
    with np.errstate(over="ignore"):
        logprob = logprob.astype(rng.choice([np.float32, np.float64]))
    values = dict(nll=rng.random(cells), tokens=tokens.astype(np.int64), logprob=logprob,
                  cell_target=target.astype(np.int64), cell_ptr=pointer.astype(np.int64))  # fmt: skip
    return Call(rng, values, (start,))


def text_of(run, arguments) -> str | None:
    try:
        run(*arguments)
    except RuntimeError as error:
        return str(error).split("\n")[0]
    return None


def same_text(a: str, b: str) -> bool:
    # csrc knows fewer dtypes by name. What is wrong with the contents of several lists is found in another order.
    lists = ("accumulate_: cell_ptr: cell", "accumulate_: tokens: cell", "accumulate_: cell_target: cell")
    head = b.rsplit(", got ", 1)[0]
    return a == b or a == f"{head}, got another dtype" or (a.startswith(lists) and b.startswith(lists))


def fuzz_operator(make, compiled, plain, rng, alike=same_bits) -> str:
    """ "raised" or "compared"; AssertionError if the two are not alike."""
    call = make(rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        call.disturb()
    (ours, given), (theirs, wanted) = call.make(), call.make()
    got, text = text_of(compiled, (*given, *call.numbers)), text_of(plain, (*wanted, *call.numbers))
    assert (got is None) == (text is None), f"compiled: {got}; plain: {text}"
    if got is not None:
        assert same_text(got, text), f"compiled: {got}; plain: {text}"
        for after in (ours, theirs):
            assert all(map(torch.equal, after, call.buffers)), f"written before it raised: {got}"
        return "raised"
    # NaN may have more than one spelling.
    for i, (a, b) in enumerate(zip(given, wanted, strict=True)):
        assert alike(a, b), f"argument {i}: compiled {a}, plain {b}"
        if a.is_floating_point():
            b.copy_(a)
    assert all(map(torch.equal, ours, theirs)), "written beside the arguments"
    return "compared"


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of an exponential and of sums."""
    return torch.allclose(a, b, rtol=1e-12, atol=1e-300, equal_nan=True) if a.is_floating_point() else torch.equal(a, b)


def fuzz_planner(rng) -> str:
    cells = int(rng.integers(0, 6))
    lengths = rng.integers(2, 9, cells)
    offsets, size = np.cumsum([0, *lengths]), int(lengths.sum())
    ids = rng.integers(0, int(rng.choice([1, 2, 3, 1000])), size)
    contexts = np.ones(cells, np.int64)
    if rng.random() < 0.5:
        contexts = rng.integers(1, lengths)
    if rng.random() < 0.1:
        contexts = rng.integers(0, 8, cells)
    if rng.random() < 0.2:
        ids = np.where(rng.random(size) < 0.3, rng.choice(INTEGERS, size), ids)
    if rng.random() < 0.2:
        offsets = np.where(rng.random(cells + 1) < 0.4, rng.choice(INTEGERS, cells + 1), offsets)
    if rng.random() < 0.1:
        contexts = rng.choice(INTEGERS, cells)
    if rng.random() < 0.1:
        offsets = offsets[: rng.integers(cells + 2)]
    job = [np.ascontiguousarray(a, dtype=np.int64) for a in (ids, offsets, contexts)]
    odd = rng.random() < 0.15
    if odd:
        i = rng.integers(3)
        job[i] = [
            lambda a: a.astype(rng.choice([np.int32, np.uint64, np.float64, np.int8])), lambda a: a[:, None],
            lambda a: np.repeat(a, 2)[::2], lambda a: a[::-1], lambda a: a.astype(">i8"), lambda a: a.tolist(),
            lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(np.int64), lambda a: None,
        ][rng.integers(8)](job[i])  # fmt: skip
    results = []
    for run in (native.planner().plan, plan_numpy):
        try:
            results.append(run(*job))
        except (ValueError, TypeError) as error:
            if isinstance(error, TypeError):
                assert odd, f"refused: {error}"
                return "raised"
            results.append(str(error))
        except Exception:
            if odd and run is plan_numpy:
                return "compared"  # numpy itself refuses what the compiled one was able to read
            raise
    ours, wanted = results
    if isinstance(ours, str):
        assert ours == wanted, f"compiled: {ours}; numpy: {wanted}"
        return "raised"
    assert not isinstance(wanted, str), f"compiled took what numpy refuses: {wanted}"
    for name, value in wanted.items():
        assert np.array_equal(ours[name], value), name
    return "compared"


def targets() -> dict:
    found = {}
    if native.load("_C") == "loaded":
        ops = torch.ops.sapo_kernels
        found["accumulate_"] = lambda rng: fuzz_operator(accumulate_call, ops.accumulate_, accumulate_torch, rng)
        found["reweight_"] = lambda rng: fuzz_operator(reweight_call, ops.reweight_, reweight_torch, rng, close)
    if native.planner() is not None:
        found["plan"] = fuzz_planner
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    args = parser.parse_args()

    torch.set_num_threads(1)
    found = targets()
    for module, state in native.status().items():
        print(f"{module}: {state}")
    if not found:
        sys.exit("nothing is compiled, so there is nothing to compare")
    counts = {name: Counter() for name in found}
    deadline, case = time.monotonic() + args.seconds, args.case or 0
    while time.monotonic() < deadline:
        for i, (name, run) in enumerate(found.items()):
            try:
                counts[name][run(np.random.default_rng([args.seed, case, i]))] += 1
            except Exception as error:
                sys.exit(f"FOUND: {name}, --seed {args.seed} --case {case}: {type(error).__name__}: {error}")
        if args.case is not None:
            break
        case += 1
    for name, count in counts.items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(count.items()))
        print(f"{name}: {sum(count.values())} calls fuzzed: {kinds}")
        if args.case is None and args.seconds >= 5:
            assert count["raised"] > 50 and count["compared"] > 50, "the fuzzer is blind on one side"


if __name__ == "__main__":
    main()
