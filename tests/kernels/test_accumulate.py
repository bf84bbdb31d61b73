"""accumulate_, compiled and plain: sums that depend on nothing but their own rows, and calls that are refused."""

from __future__ import annotations

import re

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.accumulate.reference import accumulate_reference
from tests.native_cases import (
    Implementation,
    Job,
    accumulated,
    assert_same_bits,
    check_who_serves_the_operators,
    everywhere,
    misaligned,
    needs_compiled,
    needs_cuda_kernels,
    on_cpu,
    on_device,
    refusal,
    rounds,
    run_without_compiled,
    same_bits,
    strided,
)

op = torch.ops.sapo_kernels.accumulate_
LOW, TOP = -(2**63), 2**63 - 1


def int64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def float64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def arguments(dtype=torch.float32, device="cpu") -> dict:
    """A call with everything in it: a shared target, an empty cell, sums begun before."""
    values = {
        "nll": float64(0.25, -0.0, 3.0),
        "tokens": int64(0, 0, 1),
        "logprob": torch.tensor([-0.1, -2.0, -0.3, -1e-3, -5.0, -0.7], dtype=dtype),
        "cell_target": int64(0, 2, 5, 1, 2, 4),
        "cell_ptr": int64(0, 3, 3, 6),
    }
    return {**{name: value.to(device) for name, value in values.items()}, "start": 0}


def parts(buffer: torch.Tensor, *lengths: int) -> list[torch.Tensor]:
    """Slices of one tensor, end to end."""
    return list(buffer[: sum(lengths)].split(list(lengths)))


@everywhere
def test_a_cell_has_its_own_bits_whatever_is_around_it(impl):
    """1,000 random selections and orders of cells, numberings of targets and cuts: the left-to-right sum every time."""
    done = seed = 0
    while done < rounds(1000):
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
    given = arguments(device=impl.device)
    impl.accumulate_(*given.values())
    row = [float(v) for v in given["logprob"]]
    wanted = float64(0.25 - row[0] - row[2] - row[5], -0.0, 3.0 - row[2] - row[4])
    assert_same_bits([given["nll"], given["tokens"]], [wanted, int64(3, 0, 3)])
    assert_same_bits([given[n] for n in ("logprob", "cell_target", "cell_ptr")],
                     [arguments()[n] for n in ("logprob", "cell_target", "cell_ptr")])  # fmt: skip


@everywhere
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_poisons_its_own_cells_only(impl, value):
    for seed in range(200, 200 + rounds(20)):
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
    for seed in range(300, 300 + rounds(60)):
        job = Job(seed)
        _, logprob, lists, cuts = job.composition()
        wanted = accumulated(impl, logprob, lists, cuts)
        lists, logprob = [v.to(impl.device) for v in lists], logprob.to(impl.device)
        nll, tokens = (torch.zeros_like(v, device=impl.device) for v in wanted)
        for begin, end in zip(cuts, cuts[1:], strict=False):
            for back in (0, 0, int(job.rng.integers(begin + 1))):
                impl.accumulate_(nll, tokens, logprob[begin - back : end], *lists, begin - back)
            now = nll.clone(), tokens.clone()
            impl.accumulate_(nll, tokens, logprob[:end], *lists, 0)
            assert_same_bits([nll, tokens], now)
        assert_same_bits([nll, tokens], wanted)


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


@everywhere
def test_slices_of_larger_tensors_side_by_side(impl):
    """Arguments that touch share no memory, and nothing is written beside them."""
    floats, integers = torch.full((13,), 9.0).double().to(impl.device), torch.full((16,), 9).to(impl.device)
    given, (_, nll, logprob, _) = arguments(torch.float64), parts(floats, 2, 3, 6, 2)
    _, target, tokens, pointer, _ = parts(integers, 2, 6, 3, 4, 1)
    for to, name in ((nll, "nll"), (logprob, "logprob"), (target, "cell_target"), (tokens, "tokens")):
        to.copy_(given[name])
    pointer.copy_(given["cell_ptr"])
    before = floats.clone(), integers.clone()
    impl.accumulate_(nll, tokens, logprob, target, pointer, 0)
    Implementation("plain", "cpu").accumulate_(*given.values())
    assert_same_bits([nll, tokens], [given["nll"], given["tokens"]])
    nll.copy_(before[0][2:5])
    tokens.copy_(before[1][8:11])
    assert_same_bits([floats, integers], before)


def own(name: str, other: str) -> str:
    return f"{name}: expected memory of its own, got some of {other}'s"


# What is wrong with a call, and what is said of it.
REFUSED = {
    "nll float32": (lambda a: {"nll": a["nll"].float()}, "nll: expected float64, got float32"),
    "tokens int32": (lambda a: {"tokens": a["tokens"].int()}, "tokens: expected int64, got int32"),
    "logprob float16": (lambda a: {"logprob": a["logprob"].half()}, "logprob: expected float32, got float16"),
    "cell_target int32": (lambda a: {"cell_target": a["cell_target"].int()}, "cell_target: expected int64, got int32"),
    "cell_ptr bool": (lambda a: {"cell_ptr": a["cell_ptr"].bool()}, "cell_ptr: expected int64, got bool"),
    "nll 0-d": (lambda a: {"nll": a["nll"][0]}, "nll: expected 1 dimension, got 0"),
    "logprob 2-d": (lambda a: {"logprob": a["logprob"][:, None]}, "logprob: expected 1 dimension, got 2"),
    "tokens short": (lambda a: {"tokens": a["tokens"][:2]}, r"tokens: expected shape \[3\], got \[2\]"),
    "cell_ptr short": (lambda a: {"cell_ptr": a["cell_ptr"][:3]}, r"cell_ptr: expected shape \[4\], got \[3\]"),
    **{
        f"{name} strided": (
            lambda a, name=name: {name: strided(a[name])},
            rf"{name}: expected contiguous strides, got \[2\]",
        )
        for name in ("nll", "tokens", "logprob", "cell_target", "cell_ptr")
    },
    "nll as tokens": (
        lambda a: {"tokens": a["nll"].zero_().view(torch.int64)},
        own("tokens", "nll"),
    ),
    "the last of nll is the first of logprob": (
        lambda a: {"nll": (f := torch.zeros(8).double())[:3], "logprob": f[2:]},
        own("logprob", "nll"),
    ),
    "the first of nll is the last of logprob": (
        lambda a: {"logprob": (f := torch.zeros(8).double())[:6], "nll": f[5:]},
        own("logprob", "nll"),
    ),
    "the last half of nll's last is logprob's": (
        lambda a: {"nll": (f := torch.zeros(20))[:6].view(torch.float64), "logprob": f[5:11]},
        own("logprob", "nll"),
    ),
    "the last token is the first of cell_target": (
        lambda a: {"tokens": (i := torch.zeros(8, dtype=torch.int64))[:3], "cell_target": i[2:]},
        own("cell_target", "tokens"),
    ),
    "the first token is the last of cell_ptr": (
        lambda a: {"cell_ptr": (i := torch.zeros(6, dtype=torch.int64))[:4], "tokens": i[3:]},
        own("cell_ptr", "tokens"),
    ),
    "start -1": (lambda a: {"start": -1}, "start: expected at least 0, got -1"),
    "start at the bottom": (lambda a: {"start": LOW}, f"start: expected at least 0, got {LOW}"),
}
# Not seen on the host where the lists are on another device: there such a cell becomes NaN.
UNREADABLE = {
    "cell_ptr below 0": (lambda a: {"cell_ptr": int64(-1, 3, 3, 6)}, "cell_ptr: cell 0: .* 6 entries, got -1 to 3"),
    "cell_ptr descends": (lambda a: {"cell_ptr": int64(0, 3, 2, 6)}, "cell_ptr: cell 1: .* got 3 to 2"),
    "cell_ptr past the end": (lambda a: {"cell_ptr": int64(0, 3, 3, 7)}, "cell_ptr: cell 2: .* got 3 to 7"),
    "tokens below 0": (
        lambda a: {"tokens": int64(0, 0, -1)},
        "tokens: cell 2: expected from 0 to its 3 entries, got -1",
    ),
    "tokens one too many": (lambda a: {"tokens": int64(0, 1, 0)}, "tokens: cell 1: .* its 0 entries, got 1"),
    "tokens at the top": (lambda a: {"tokens": int64(0, 0, TOP)}, f"tokens: cell 2: .* its 3 entries, got {TOP}"),
    "a target below 0": (
        lambda a: {"cell_target": int64(0, 2, 5, 1, -2, 4)},
        "cell_target: cell 2: .* begins at 0, or after it, got -2: a piece was left out",
    ),
    "a target at the bottom": (
        lambda a: {"cell_target": int64(0, 2, 5, 1, LOW, 4), "start": 2, "tokens": int64(1, 0, 1)},
        f"cell_target: cell 2: .* begins at 2, or after it, got {LOW}: a piece was left out",
    ),
    "the first piece left out": (
        lambda a: {"start": 1},
        "cell_target: cell 0: .* begins at 1, or after it, got 0: a piece was left out",
    ),
    "a target after one that is here": (
        lambda a: {"cell_target": int64(3, 2, 5, 2, 3, 4), "start": 3, "tokens": int64(0, 0, 1)},
        "cell_target: cell 0: .* begins at 3, or after it, got 2: a piece was left out",
    ),
}


def wrong(name: str) -> list:
    given = arguments()
    given.update({**REFUSED, **UNREADABLE}[name][0](given))
    return list(given.values())


def told(name: str) -> str:
    return f"^accumulate_: {({**REFUSED, **UNREADABLE})[name][1]}"


@on_cpu
@pytest.mark.parametrize("name", [*REFUSED, *UNREADABLE])
def test_refused_before_anything_is_written(impl, name):
    assert re.search(told(name), refusal(impl.accumulate_, wrong(name)))


@needs_compiled
@pytest.mark.parametrize("name", [*REFUSED, *UNREADABLE])
def test_both_refuse_in_the_same_words(name):
    texts = {refusal(Implementation(which, "cpu").accumulate_, wrong(name)) for which in ("compiled", "plain")}
    assert len(texts) == 1, texts


@on_cpu
@pytest.mark.parametrize("name", ["nll", "tokens", "logprob", "cell_target", "cell_ptr"])
def test_memory_that_is_not_aligned_is_refused(impl, name):
    given = arguments()
    given[name] = misaligned(given[name])
    assert re.match(f"accumulate_: {name}: expected memory aligned", refusal(impl.accumulate_, given.values()))


@pytest.mark.gpu
@needs_cuda_kernels
@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_the_gpu(name):
    assert re.search(told(name), refusal(op, on_device(wrong(name), "cuda")))


@pytest.mark.gpu
@needs_cuda_kernels
@pytest.mark.parametrize("name", UNREADABLE)
def test_lists_that_do_not_fit_make_nan_on_the_gpu(name):
    given = on_device(wrong(name), "cuda")
    kept = [value.clone() for value in given[2:5]]
    op(*given)
    bad = int(re.search(r"cell (\d)", told(name))[1])
    assert given[0][bad].isnan() and not given[0].isnan().all()
    assert_same_bits(given[2:5], kept)


def test_operator_is_served_by_the_right_kernels():
    check_who_serves_the_operators()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_passes_opcheck(dtype, device):
    done = torch.library.opcheck(op.default, tuple(arguments(dtype, device).values()))
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


def test_operator_is_the_public_function():
    given, wanted = arguments(), arguments()
    assert sk.accumulate_(*given.values()) is None
    Implementation("plain", "cpu").accumulate_(*wanted.values())
    assert_same_bits([given["nll"], given["tokens"]], [wanted["nll"], wanted["tokens"]])


@pytest.mark.parametrize("name", ["nll", "tokens", "logprob", "cell_target", "cell_ptr"])
def test_operator_refuses_a_meta_tensor_among_others(name):
    given = arguments()
    given[name] = given[name].to("meta")
    assert re.match(r"accumulate_: \w+: expected it on the device of the other", refusal(op, given.values()))


def test_operator_does_nothing_on_meta_tensors():
    assert op(*arguments(device="meta").values()) is None


def test_operator_takes_lazily_negated_values():
    given, wanted = arguments(), arguments()
    given["logprob"] = torch._neg_view(-given["logprob"])
    assert given["logprob"].is_neg()
    op(*given.values())
    op(*wanted.values())
    assert_same_bits([given["nll"], given["tokens"]], [wanted["nll"], wanted["tokens"]])


@pytest.mark.parametrize("dynamic", [False, True])
def test_operator_compiles_without_a_graph_break(dynamic):
    def sums(logprob, cell_target, cell_ptr, cut: int):
        nll = logprob.new_zeros(cell_ptr.shape[0] - 1, dtype=torch.float64)
        tokens = torch.zeros_like(nll, dtype=torch.int64)
        op(nll, tokens, logprob[:cut], cell_target, cell_ptr, 0)
        half = nll * 1
        op(nll, tokens, logprob[cut:], cell_target, cell_ptr, cut)
        return nll, tokens, half

    torch.compiler.reset()
    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for seed in (1, 2, 3):
        _, logprob, lists, _ = Job(seed).composition()
        inputs = (logprob, *lists, len(logprob) // 2)
        assert_same_bits(compiled(*inputs), sums(*inputs))


def test_everything_about_the_operator_holds_without_the_module():
    run_without_compiled(__file__)


@pytest.mark.gpu
@needs_cuda_kernels
def test_in_a_cuda_graph():
    _, logprob, lists, _ = Job(5).composition()
    lists = [v.cuda() for v in lists]
    place = torch.zeros_like(logprob, device="cuda")
    nll = torch.zeros(len(lists[1]) - 1, dtype=torch.float64, device="cuda")
    tokens = torch.zeros_like(nll, dtype=torch.int64)
    op(nll, tokens, place, *lists, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nll.zero_()
        tokens.zero_()
        op(nll, tokens, place, *lists, 0)
    for factor in (1.0, 3.0, 0.1):
        place.copy_(logprob * factor)
        graph.replay()
        values = (logprob.cuda() * factor).cpu()
        wanted = accumulated(Implementation("plain", "cpu"), values, [v.cpu() for v in lists], [0, len(values)])
        assert_same_bits([nll, tokens], wanted)


@pytest.mark.gpu
@needs_cuda_kernels
def test_on_two_streams():
    """Each call runs on the stream that is current, behind what that stream still has to do."""
    jobs, results, streams = [Job(5).composition() for _ in range(2)], [], [torch.cuda.Stream() for _ in range(2)]
    for (_, logprob, lists, _), stream in zip(jobs, streams, strict=True):
        lists, wanted = [v.cuda() for v in lists], logprob.cuda()
        nll = torch.zeros(len(lists[1]) - 1, dtype=torch.float64, device="cuda")
        tokens, late = torch.zeros_like(nll, dtype=torch.int64), torch.zeros_like(wanted)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            late.copy_(wanted)
            op(nll, tokens, late, *lists, 0)
        # What the other stream still reads may not be let go, or its memory is used again.
        results.append((nll, tokens, late, wanted, lists))
    torch.cuda.synchronize()
    for (*got, _, _, _), (_, logprob, lists, _) in zip(results, jobs, strict=True):
        assert_same_bits(got, accumulated(Implementation("plain", "cpu"), logprob, lists, [0, len(logprob)]))
