"""Random jobs for the planner, with numbers and arrays that do not fit: the compiled one and numpy say the same."""

from __future__ import annotations

import numpy as np

from sapo_kernels import native
from sapo_kernels.trie.numpy_planner import plan_numpy

INTEGERS = np.asarray([0, 1, 2, 3, 5, -1, -2, 2**31, -(2**31), 2**32, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)])


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
    ours, expected = results
    if isinstance(ours, str):
        assert ours == expected, f"compiled: {ours}; numpy: {expected}"
        return "raised"
    assert not isinstance(expected, str), f"compiled took what numpy refuses: {expected}"
    for name, value in expected.items():
        assert np.array_equal(ours[name], value), name
    return "compared"
