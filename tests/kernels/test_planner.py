"""The compiled planner against numpy, bit for bit: tries, errors, memory, threads."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from sapo_kernels import native, plan_trie
from sapo_kernels.trie.numpy_planner import plan_numpy
from tests.kernels.test_trie import JOBS, REFUSED
from tests.native.fuzz_native import fuzz_planner
from tests.oracles import flatten, random_cells

# What stands for the tokens 0, 1, 2, ... of a small vocabulary; ascending, so that siblings keep their order.
POOLS = {
    "small": np.arange(300),
    "2^31": 2**31 - 3 + np.arange(300),
    "2^32": 2**32 - 3 + np.arange(300),
    "2^40": 2**40 - 3 + np.arange(300),
    "2^63": 2**63 - 300 + np.arange(300, dtype=np.uint64).astype(np.int64),
    "every byte": np.sort(
        np.concatenate([[d << s for d in range(1, 38)] for s in range(0, 64, 8)] + [2**50 + np.arange(4)])
    ),
    "the middle": np.sort((np.arange(300) % 17 << 41) + (np.arange(300) // 17 << 17)),
}
KINDS = ("random", "shared", "equal", "distinct", "prefixes", "comb")


@pytest.fixture(scope="module")
def compiled():
    module = native.planner()
    if module is None:
        pytest.skip(f"the compiled planner is {native.status()['_planner']}")
    return module


def int64(*arrays):
    return tuple(np.ascontiguousarray(a, dtype=np.int64) for a in arrays)


def make_job(rng, kind: str, cells: int, longest: int, vocabulary: int):
    """(ids, offsets, context_lengths) of `cells` sequences of 2 to `longest` tokens."""
    base = rng.integers(0, vocabulary, longest + cells)
    length = rng.integers(2, longest + 1, cells)
    if kind == "random":
        sequences = [rng.integers(0, vocabulary, n) for n in length]
    elif kind == "shared":
        heads = [rng.integers(0, vocabulary, rng.integers(1, longest)) for _ in range(1 + cells // 5)]
        sequences = [
            np.append(heads[rng.integers(len(heads))], rng.integers(0, vocabulary, 1 + n // 3)) for n in length
        ]
    elif kind == "equal":
        sequences = [base[: length[0]]] * cells
    elif kind == "distinct":
        sequences = [np.append(c % 300, rng.integers(0, vocabulary, n - 1)) for c, n in enumerate(length)]
    elif kind == "prefixes":
        sequences = [base[:n] for n in length]
    else:
        sequences = [np.append(base[: 1 + c], rng.integers(0, vocabulary, 1 + c % 3)) for c in rng.permutation(cells)]
    offsets = np.cumsum([0, *map(len, sequences)])
    full = np.diff(offsets)
    shortest, longest_context = [(1, full), (1, np.full(cells, 2)), (full - 1, full)][rng.integers(3)]
    contexts = rng.integers(shortest, longest_context)
    pool = list(POOLS.values())[rng.integers(len(POOLS))]
    return int64(pool[np.concatenate(sequences) % len(pool)], offsets, contexts)


def check_same(ours: dict, expected: dict) -> None:
    assert list(ours) == list(expected)
    for name, value in expected.items():
        if name == "dense_tokens":
            assert type(ours[name]) is int and ours[name] == value
            continue
        assert ours[name].dtype == value.dtype == np.int64 and ours[name].shape == value.shape, name
        assert np.array_equal(ours[name], value), name


def check(compiled, job) -> None:
    check_same(compiled.plan(*job), plan_numpy(*job))


@pytest.mark.parametrize("kind", KINDS)
def test_small_and_medium_jobs(compiled, kind):
    """Also enough members for the radix sort, and prefixes longer than a stride of the comparison."""
    rng = np.random.default_rng(KINDS.index(kind))
    for _ in range(600):
        cells, longest, vocabulary = rng.integers(1, 14), rng.integers(2, 16), rng.integers(1, 6)
        check(compiled, make_job(rng, kind, int(cells), int(longest), int(vocabulary)))
    for _ in range(25):
        cells, longest, vocabulary = rng.integers(40, 300), rng.integers(2, 120), rng.choice([1, 2, 30, 300])
        check(compiled, make_job(rng, kind, int(cells), int(longest), int(vocabulary)))


@pytest.mark.parametrize("pool", POOLS)
def test_every_order_of_first_tokens(compiled, pool):
    """One group of many different tokens, so a digit that is skipped or swapped shows."""
    tokens = POOLS[pool][np.random.default_rng(0).permutation(300)]
    ids = np.stack([tokens, tokens[::-1], tokens], axis=1).ravel()
    check(compiled, int64(ids, np.arange(0, 901, 3), np.ones(300)))


@pytest.mark.parametrize("length", [*range(2, 21), 63, 64, 65, 66])
def test_where_two_sequences_part(compiled, length):
    for at in range(1, length):
        a, b = np.arange(length), np.arange(length)
        b[at] += 100
        start = a[: at + 1]
        offsets = np.cumsum([0, length, length, len(start)])
        check(compiled, int64(np.concatenate([a, b, start]), offsets, [1, length - 1, 1]))


def test_named_and_smallest_jobs(compiled):
    for job in JOBS.values():
        check(compiled, int64(*flatten(job)))
    check(compiled, int64([], [0], []))
    check(compiled, int64([7, 7], [0, 2], [1]))
    check(compiled, int64([2**63 - 1, 0] * 3, [0, 2, 4, 6], [1, 1, 1]))
    long = np.random.default_rng(0).integers(0, 50_000, 100_000)
    check(compiled, int64(np.concatenate([long, long[:-1], [1]]), [0, 100_000, 200_000], [1, 99_999]))


def nested(cells: int, order):
    """Sequence n is n + 1 ones, so each is a prefix of the next; in the given order."""
    lengths = np.arange(2, cells + 2)[order]
    return int64(np.ones(lengths.sum()), np.cumsum([0, *lengths]), np.ones(cells))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["shortest first", "longest first"])
def test_deep_tries(compiled, order):
    check(compiled, nested(300, order))
    # 4.5 M tokens, 3,000 nodes deep: recursion could end the process, and comparing each group anew takes 1.7 s.
    job, seconds = nested(3000, order), []
    for _ in range(3):
        started = time.perf_counter()
        plan = compiled.plan(*job)
        seconds.append(time.perf_counter() - started)
        if seconds[-1] < 0.7:
            break
    assert min(seconds) < 0.7, "0.05 s when this was written"
    assert plan["depth"].tolist() == list(range(3000)) and plan["node_end"].tolist() == [3000] * 3000
    assert len(plan["targets"]) == 3000 and plan["node_parent"].tolist() == list(range(-1, 2999))


@pytest.mark.parametrize("name", REFUSED)
def test_the_same_words_refuse_the_same_arrays(compiled, name):
    job, expected = REFUSED[name]
    said = set()
    for plan in (compiled.plan, plan_numpy, plan_trie):
        with pytest.raises(ValueError, match=expected) as caught:
            plan(*int64(*job))
        said.add(str(caught.value))
    assert len(said) == 1


def test_garbage_is_refused_or_planned_alike(compiled):
    """Ids, offsets and contexts at the ends of their range, of other dtypes and layouts; see the fuzzer."""
    ended = [fuzz_planner(np.random.default_rng([0, case])) for case in range(3000)]
    assert 500 < ended.count("raised") < 2500


WRONG = {
    "a list": lambda a: a.tolist(),
    "uint64": lambda a: a.astype(np.uint64),
    "float64": lambda a: a.astype(np.float64),
    "another byte order": lambda a: a.astype(">i8"),
    "two dimensions": lambda a: a[:, None],
    "every other element": lambda a: np.repeat(a, 2)[::2],
    "backwards": lambda a: a[::-1],
    "stride 0": lambda a: np.broadcast_to(a[:1], a.shape),
    "not aligned": lambda a: np.frombuffer(b"\0" + a.tobytes(), np.uint8)[1:].view(np.int64),
}


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_converted_silently(compiled, name, which):
    arguments = list(int64([1, 2, 3, 4], [0, 2, 4], [1, 1]))
    arguments[which] = WRONG[name](arguments[which])
    with pytest.raises(TypeError, match=f"^{('ids', 'offsets', 'context_lengths')[which]}: expected a C-contiguous"):
        compiled.plan(*arguments)


@pytest.mark.parametrize("name", [n for n in WRONG if n not in ("float64", "two dimensions", "backwards", "stride 0")])
def test_plan_trie_takes_every_layout_and_does_without_the_module(compiled, name, monkeypatch):
    job = int64(*flatten(random_cells(5)))
    expected = plan_numpy(*job)
    for planner in (native.planner, lambda: None):
        monkeypatch.setattr(native, "planner", planner)
        trie = plan_trie(*map(WRONG[name], job))
        check_same({field: getattr(trie, field) for field in expected}, expected)


def test_results_own_their_memory(compiled):
    rng = np.random.default_rng(3)
    job = make_job(rng, "shared", 200, 80, 30)
    expected = plan_numpy(*job)
    given = [a.copy() for a in job]
    for array in given:
        array.flags.writeable = False  # reading is enough
    ours = compiled.plan(*given)
    for name in expected.keys() - {"dense_tokens"}:
        assert not any(np.may_share_memory(ours[name], other) for other in given)
    del given
    gc.collect()
    # Whatever was freed is handed out again and overwritten.
    rubbish = [np.full(n, -1) for n in (10, 100, 1000, 10_000) for _ in range(20)]
    check_same(ours, expected)
    kept = ours["tokens"][3:9]
    del ours, rubbish
    gc.collect()
    assert np.array_equal(kept, expected["tokens"][3:9])


@contextlib.contextmanager
def beside(work):
    """`work` again and again in another thread."""
    stop = threading.Event()

    def loop():
        while not stop.is_set():
            work()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_other_threads_run_meanwhile(compiled):
    """A second thread takes the time while a long job is planned; with the GIL held it could not."""
    sequences = 400_000
    ids = np.random.default_rng(0).integers(0, 2**62, 3 * sequences)
    job = int64(ids, np.arange(0, 3 * sequences + 1, 3), np.ones(sequences))
    seen = []
    with beside(lambda: (seen.append(time.perf_counter()), time.sleep(0.0005))):
        for _ in range(10):
            started = time.perf_counter()
            plan = compiled.plan(*job)
            took = time.perf_counter() - started
            # Not the edges: the GIL may change hands just before and after.
            inside = [t for t in list(seen) if 0.2 < (t - started) / took < 0.8]
            if inside:
                break
    assert inside and len(plan["leaf"]) == sequences


def test_threads_plan_at_the_same_time(compiled):
    rng = np.random.default_rng(4)
    jobs = [make_job(rng, kind, 200, 60, 30) for kind in KINDS]
    expected, failed = [plan_numpy(*job) for job in jobs], []

    def work(i):
        for _ in range(20):
            try:
                check_same(compiled.plan(*jobs[i]), expected[i])
            except AssertionError as error:
                failed.append((KINDS[i], error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_arrays_that_change_meanwhile_do_no_harm(compiled):
    """The result is then anything, but no memory beyond the arrays is touched and the call returns."""
    rng = np.random.default_rng(5)
    ids, offsets, contexts = make_job(rng, "shared", 3000, 60, 2)
    given = (ids % 2, offsets.copy(), contexts.copy())
    changes = [(rng.integers(0, len(ids), 5000), rng.integers(0, 2, 5000)) for _ in range(8)]

    def disturb():
        for where, tokens in changes:
            given[0][where] = tokens
        given[1][1:-1], given[2][:] = 2**40, -5
        given[1][:], given[2][:] = offsets, contexts

    with beside(disturb):
        for _ in range(100):
            try:
                assert len(compiled.plan(*given)["leaf"]) == len(contexts)
            except ValueError as error:
                assert str(error).startswith("sequence ")


def test_ten_million_tokens_need_less_than_1_2_gib(compiled):
    """The peak of a fresh process that makes the job and plans it."""
    code = """
import re, numpy as np
from sapo_kernels import plan_trie
ids = np.tile(np.arange(200), 50_000)
ids.reshape(50_000, 200)[:, 60:] += np.arange(50_000)[:, None]
trie = plan_trie(ids, np.arange(50_001) * 200, np.full(50_000, 195))
# Not ru_maxrss: it remembers the size of the process that started this one.
print(trie.dense_tokens, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    tokens, peak = map(int, done.stdout.split())
    assert tokens == 50_000 * 199 and peak < 1.2 * 2**20, f"{peak} KiB"
