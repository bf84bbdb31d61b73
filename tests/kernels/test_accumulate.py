"""accumulate_, compiled and plain: sums that depend on nothing but their own rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sapo_kernels.accumulate.reference import accumulate_reference
from tests.kernels.test_in_place import LOW, TOP, accumulate, int64
from tests.native_cases import (
    Implementation,
    Job,
    accumulated,
    assert_same_bits,
    everywhere,
    needs_compiled,
    needs_cuda_kernels,
    same_bits,
    storage_bytes,
)

op = torch.ops.sapo_kernels.accumulate_


def float64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@everywhere
def test_a_cell_has_its_own_bits_whatever_is_around_it(impl):
    """500 random selections and orders of cells, numberings of targets and cuts: the left-to-right sum every time."""
    done = seed = 0
    while done < 500:
        job = Job(seed, (torch.float32, torch.float64)[seed % 2])
        exact = float64(*(job.exact(c) for c in range(len(job.cells))))
        for _ in range(25):
            chosen, logprob, lists, cuts = job.composition()
            nll, tokens = accumulated(impl, logprob, lists, cuts)
            assert_same_bits([nll, tokens], [exact[chosen], lists[1].diff()], f"seed {seed}, cuts {cuts}:")
            done += 1
        oracle = [torch.zeros_like(nll), torch.zeros_like(tokens)]
        for begin, end in zip(cuts, cuts[1:], strict=False):
            accumulate_reference(*oracle, logprob[begin:end], *lists, begin)
        assert_same_bits([nll, tokens], oracle)
        seed += 1


def test_the_inputs_tell_orders_apart():
    """The test above would see another order: most cells have other bits from right to left, and in float32."""
    cells = [(job, c) for job in map(Job, range(20)) for c in range(len(job.cells)) if len(job.cells[c]) > 5]
    other = narrow = 0
    for job, c in cells:
        values = job.logprob[job.cells[c]]
        other += float(-values.double().flip(0).cumsum(0)[-1]) != job.exact(c)
        narrow += float(-values.float().cumsum(0)[-1]) != job.exact(c)
    assert len(cells) > 30 and other > len(cells) / 2 and narrow > len(cells) / 2


@everywhere
def test_sums_go_on_from_what_is_there(impl):
    given = accumulate(device=impl.device)
    impl.accumulate_(*given.values())
    row = [float(v) for v in given["logprob"]]
    expected = float64(0.25 - row[0] - row[2] - row[5], -0.0, 3.0 - row[2] - row[4])
    assert_same_bits([given["nll"], given["tokens"]], [expected, int64(3, 0, 3)])
    assert_same_bits([given[n] for n in ("logprob", "cell_target", "cell_ptr")],
                     [accumulate()[n] for n in ("logprob", "cell_target", "cell_ptr")])  # fmt: skip


@everywhere
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_poisons_its_own_cells_only(impl, value):
    for seed in range(200, 210):
        job = Job(seed)
        chosen, logprob, lists, cuts = job.composition()
        clean, _ = accumulated(impl, logprob, lists, cuts)
        bad = int(job.rng.integers(len(logprob)))
        logprob[bad] = value
        nll, tokens = accumulated(impl, logprob, lists, cuts)
        owners = torch.tensor([bad in part for part in lists[0].tensor_split(lists[1][1:-1])])
        assert same_bits(nll[~owners], clean[~owners]) and torch.equal(tokens, lists[1].diff())
        assert same_bits(nll[owners], torch.full_like(nll[owners], -value))


@everywhere
def test_rows_that_were_added_are_not_added_again(impl):
    """A piece given twice, pieces that overlap and earlier pieces change nothing."""
    for seed in range(300, 315):
        job = Job(seed)
        _, logprob, lists, cuts = job.composition()
        expected = accumulated(impl, logprob, lists, cuts)
        lists, logprob = [v.to(impl.device) for v in lists], logprob.to(impl.device)
        nll, tokens = (torch.zeros_like(v, device=impl.device) for v in expected)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            for back in (0, 0, int(job.rng.integers(begin + 1))):
                impl.accumulate_(nll, tokens, logprob[begin - back : end], *lists, begin - back)
            now = nll.clone(), tokens.clone()
            impl.accumulate_(nll, tokens, logprob[:end], *lists, 0)
            assert_same_bits([nll, tokens], now)
        assert_same_bits([nll, tokens], expected)


@everywhere
def test_smallest_calls(impl):
    empty = torch.zeros(0, device=impl.device)
    none, zero = empty.long(), torch.zeros(1, dtype=torch.int64, device=impl.device)
    impl.accumulate_(empty.double(), none, empty, none, zero, 0)  # no cells
    nll, tokens = empty.double().new_full((2,), 0.5), none.new_zeros(2)
    impl.accumulate_(nll, tokens, empty, none, zero.repeat(3), 0)  # cells without targets
    impl.accumulate_(nll, tokens, empty, zero, none.new_tensor([0, 0, 1]), 0)  # a piece without rows
    assert_same_bits([nll, tokens], [float64(0.5, 0.5), int64(0, 0)])
    far = none.new_tensor([TOP - 1, TOP])  # the ends of the range that targets have
    impl.accumulate_(nll, tokens, empty.new_tensor([-1.0, -2.0]), far, none.new_tensor([0, 1, 2]), TOP - 1)
    assert_same_bits([nll, tokens], [float64(1.5, 2.5), int64(1, 1)])
    impl.accumulate_(nll, tokens, empty.new_tensor([-1.0]), far, none.new_tensor([0, 1, 2]), TOP)
    assert_same_bits([nll, tokens], [float64(1.5, 2.5), int64(1, 1)])


@needs_compiled
def test_lists_of_garbage():
    """Any numbers anywhere: both refuse it and write nothing, or both give the same sums."""
    rng, refused = np.random.default_rng(0), 0
    wild = np.asarray([0, 1, 2, 3, 6, -1, 2**31, 2**62, TOP, LOW])
    for _ in range(400):
        results, spoiled = [], {}
        for name in ("tokens", "cell_target", "cell_ptr"):
            value = accumulate()[name]
            put = torch.from_numpy(rng.choice(wild, len(value)))
            spoiled[name] = torch.where(torch.from_numpy(rng.random(len(value)) < 0.05), put, value)
        for which in ("compiled", "plain"):
            given = {**accumulate(), **{name: value.clone() for name, value in spoiled.items()}, "start": 0}
            before = storage_bytes(given.values())
            try:
                Implementation(which, "cpu").accumulate_(*given.values())
            except RuntimeError:
                assert storage_bytes(given.values()) == before
                given = None
            results.append(given)
        ours, other = results
        assert (ours is None) == (other is None), spoiled
        refused += ours is None
        if ours:
            assert_same_bits([ours["nll"], ours["tokens"]], [other["nll"], other["tokens"]])
    assert 100 < refused < 300


@pytest.mark.gpu
@needs_cuda_kernels
def test_on_two_streams():
    """Each call runs on the stream that is current, behind what that stream still has to do."""
    jobs, results, streams = [Job(5).composition() for _ in range(2)], [], [torch.cuda.Stream() for _ in range(2)]
    for (_, logprob, lists, _), stream in zip(jobs, streams, strict=True):
        lists, expected = [v.cuda() for v in lists], logprob.cuda()
        nll = torch.zeros(len(lists[1]) - 1, dtype=torch.float64, device="cuda")
        tokens, late = torch.zeros_like(nll, dtype=torch.int64), torch.zeros_like(expected)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(expected)
            op(nll, tokens, late, *lists, 0)
        # What the other stream still reads may not be let go, or its memory is used again.
        results.append((nll, tokens, late, expected, lists))
    torch.cuda.synchronize()
    for (*got, _, _, _), (_, logprob, lists, _) in zip(results, jobs, strict=True):
        assert_same_bits(got, accumulated(Implementation("plain", "cpu"), logprob, lists, [0, len(logprob)]))
