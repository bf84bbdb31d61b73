"""accumulate_, compiled and plain: sums that depend on nothing but their own rows."""

from __future__ import annotations

import pytest
import torch

from sapo_kernels.accumulate.reference import accumulate_reference
from tests.kernels.test_in_place import TOP, int64
from tests.native_cases import (
    Implementation,
    Job,
    accumulated,
    assert_same_bits,
    everywhere,
    needs_cuda_kernels,
)


def float64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@everywhere
def test_a_cell_has_its_own_bits_whatever_is_around_it(impl):
    """500 random selections and orders of cells, numberings of targets and cuts: the left-to-right sum every time.

    And a row that is not finite is in the sums of its own cells only.
    """
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
        bad = int(job.rng.integers(len(logprob)))
        logprob[bad] = (torch.nan, torch.inf, -torch.inf)[seed % 3]
        sick, _ = accumulated(impl, logprob, lists, cuts)
        owners = torch.tensor([bad in part for part in lists[0].tensor_split(lists[1][1:-1])])
        assert_same_bits([sick[~owners], sick[owners]], [nll[~owners], torch.full_like(nll[owners], -logprob[bad])])
        seed += 1


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
            torch.ops.sapo_kernels.accumulate_(nll, tokens, late, *lists, 0)
        # What the other stream still reads may not be let go, or its memory is used again.
        results.append((nll, tokens, late, expected, lists))
    torch.cuda.synchronize()
    for (*got, _, _, _), (_, logprob, lists, _) in zip(results, jobs, strict=True):
        assert_same_bits(got, accumulated(Implementation("plain", "cpu"), logprob, lists, [0, len(logprob)]))
