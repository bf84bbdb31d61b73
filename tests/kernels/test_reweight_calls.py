"""reweight_ as an operator and as a public function: calls that are refused, tracing, threads, the GPU."""

from __future__ import annotations

import math
import re
import threading

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.reweight.torch import reweight_torch
from tests.kernels.test_reweight import assert_close
from tests.native_cases import (
    POOLS,
    QUICK,
    SMALLEST,
    TENSORS,
    WRITTEN,
    Implementation,
    assert_same_bits,
    check_who_serves_the_operators,
    everywhere,
    losses,
    needs_compiled,
    needs_cuda_kernels,
    new_state,
    on_cpu,
    on_device,
    played,
    refusal,
    rounds,
    run_without_compiled,
    scenario,
    storage_bytes,
    strided,
)

op = torch.ops.sapo_kernels.reweight_
plain = Implementation("plain", "cpu")


def arguments(device="cpu", pools=3, prompts=40) -> dict:
    """A call in the middle of a run."""
    rng = np.random.default_rng(0)
    state = [value.to(device) for value in new_state(pools, prompts)]
    step = [value.to(device) for value in losses(rng, pools, prompts, bad=0.0)]
    plain_now = Implementation("plain", device)
    plain_now.reweight_(*state, *step, 1.0, 0.5, 0.0)
    step = [value.to(device) for value in losses(rng, pools, prompts)]
    return {**dict(zip(TENSORS, (*state, *step), strict=True)), "decay": 0.9, "temperature": 0.1, "floor": 0.05}


def number_text(name: str, high: str, got: str) -> str:
    return rf"{name}: expected a number from 0 to {re.escape(high)}, got {re.escape(got)}$"


def shared(a: dict, written: str, other: str) -> dict:
    """`other` lies in the memory of `written`, byte by byte from its beginning."""
    size = max(a[name].numel() * a[name].element_size() for name in (written, other))
    memory = torch.zeros(size, dtype=torch.uint8)
    return {
        name: memory[: a[name].numel() * a[name].element_size()].view(a[name].dtype).view(a[name].shape)
        for name in (written, other)
    }


# What is wrong with a call, and what is said of it. Where memory begins and ends is tested with accumulate_.
REFUSED = {
    **{
        f"{name} {dtype}".replace("torch.", ""): (
            lambda a, name=name, dtype=dtype: {name: a[name].to(dtype)},
            f"{name}: expected {right}, got {str(dtype).removeprefix('torch.')}",
        )
        for name, right, dtype in (
            ("mean", "float64", torch.float32),
            ("weight", "float64", torch.int64),
            ("probs", "float64", torch.bfloat16),
            ("best", "int64", torch.int32),
            ("effective", "float64", torch.float32),
            ("live", "bool", torch.int64),
            ("nll", "float64", torch.float16),
            ("tokens", "int64", torch.float64),
        )
    },
    "mean 1-d": (lambda a: {"mean": a["mean"][0]}, r"mean: expected \[pools, prompts\], got 1 dimensions"),
    **{
        f"{name} of one pool less": (
            lambda a, name=name: {name: a[name][1:]},
            rf"{name}: expected shape \[3(, 40)?\], got \[2(, 40)?\]",
        )
        for name in TENSORS[1:]
    },
    "one prompt less": (lambda a: {"nll": a["nll"][:, 1:].clone()}, r"nll: expected shape \[3, 40\], got \[3, 39\]"),
    "best 2-d": (lambda a: {"best": a["best"][:, None]}, r"best: expected shape \[3\], got \[3, 1\]"),
    **{
        f"{name} strided": (
            lambda a, name=name: {name: strided(a[name])},
            rf"{name}: expected contiguous strides, got \[",
        )
        for name in TENSORS
    },
    **{
        f"{other} in {written}": (
            lambda a, written=written, other=other: shared(a, written, other),
            f"{other}: expected memory of its own, got some of {written}'s",
        )
        for i, written in enumerate(WRITTEN)
        for other in TENSORS[i + 1 :]
    },
    "decay below 0": (lambda a: {"decay": -1e-9}, number_text("decay", "1", "-1e-09")),
    "decay just above 1": (lambda a: {"decay": math.nextafter(1, 2)}, number_text("decay", "1", "1")),
    "decay NaN": (lambda a: {"decay": math.nan}, number_text("decay", "1", "nan")),
    "temperature infinite": (lambda a: {"temperature": math.inf}, number_text("temperature", "1.79769e+308", "inf")),
    "temperature just below 0": (
        lambda a: {"temperature": -SMALLEST},
        number_text("temperature", "1.79769e+308", "-4.94066e-324"),
    ),
    "floor above 1": (lambda a: {"floor": 1.01}, number_text("floor", "1", "1.01")),
    "floor minus infinite": (lambda a: {"floor": -math.inf}, number_text("floor", "1", "-inf")),
}


def wrong(name: str) -> list:
    given = arguments()
    given.update(REFUSED[name][0](given))
    return list(given.values())


@everywhere
@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(impl, name):
    assert re.search(f"^reweight_: {REFUSED[name][1]}", refusal(impl.reweight_, on_device(wrong(name), impl.device)))


@needs_compiled
@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse_in_the_same_words(name):
    texts = {refusal(Implementation(which, "cpu").reweight_, wrong(name)) for which in ("compiled", "plain")}
    assert len(texts) == 1, texts


@pytest.mark.parametrize("name", TENSORS[1:])
def test_another_device_is_refused_by_the_plain_one(name):
    given = arguments()
    given[name] = given[name].to("meta")
    text = refusal(reweight_torch, given.values())
    assert text == f"reweight_: {name}: expected it on the device of the other arguments, cpu, got meta"


@pytest.mark.gpu
@needs_cuda_kernels
@pytest.mark.parametrize("name", TENSORS)
def test_a_cpu_tensor_among_gpu_tensors_is_refused(name):
    given = arguments("cuda")
    given[name] = given[name].cpu()
    assert "expected it on the device of the other arguments" in refusal(op, given.values())


@everywhere
def test_inputs_are_not_written_and_may_share_memory(impl):
    given = arguments(impl.device)
    shared = given["nll"].clone()
    given["nll"], given["tokens"] = shared, shared.view(torch.int64)
    before = [given[name].clone() for name in ("live", "nll", "tokens")]
    impl.reweight_(*given.values())
    assert_same_bits([given[name] for name in ("live", "nll", "tokens")], before)


@everywhere
def test_arguments_that_touch_share_no_memory(impl):
    given, wanted = arguments(impl.device), arguments()
    whole = torch.cat([given[name].flatten() for name in ("mean", "nll", "weight", "effective", "probs")])
    for name, part in zip(
        ("mean", "nll", "weight", "effective", "probs"), whole.split([120, 120, 120, 3, 120]), strict=True
    ):
        given[name] = part.view(given[name].shape)
    impl.reweight_(*given.values())
    reweight_torch(*wanted.values())
    assert_close([given[n] for n in WRITTEN], [wanted[n] for n in WRITTEN])
    assert_same_bits([given[n] for n in TENSORS[5:]], [wanted[n] for n in TENSORS[5:]])


def pool_state(pools=2, prompts=33, device=None) -> sk.PromptState:
    return sk.PromptState(pools, prompts, device)


def step(seed=0, pools=2, prompts=33):
    _, nll, tokens = losses(np.random.default_rng(seed), pools, prompts)
    return nll, tokens


def tensors_of(state: sk.PromptState) -> list[torch.Tensor]:
    return [getattr(state, name) for name in (*WRITTEN, "live")]


# name: (error, what is changed of (nll, tokens, options), text)
PUBLIC = {
    "nll float32": (TypeError, lambda n, t: (n.float(), t, {}), "expected nll float64 and tokens int64, got .*float32"),
    "tokens int32": (TypeError, lambda n, t: (n, t.int(), {}), "expected nll float64 .* torch.int32"),
    "prompts": (ValueError, lambda n, t: (n[:, 1:], t[:, 1:], {}), r"\[pools, prompts\] \[2, 33\], got \[2, 32\]"),
    "tokens of one pool": (ValueError, lambda n, t: (n, t[:1], {}), r"got \[2, 33\] and \[1, 33\]"),
    "one dimension": (ValueError, lambda n, t: (n[0], t[0], {}), r"expected \[pools, prompts\] \[2, 33\], got \[33\]"),
    "nll on another device": (ValueError, lambda n, t: (n.to("meta"), t, {}), "state's device cpu, got meta and cpu"),
    "tokens elsewhere": (ValueError, lambda n, t: (n, t.to("meta"), {}), "state's device cpu, got cpu and meta"),
    **{
        f"{name}={value}": (ValueError, lambda n, t, o={name: value}: (n, t, o), f"got .*{name}={value}")
        for name, value in (("decay", 1.1), ("decay", math.nan), ("floor", -0.1), ("temperature", math.inf))
    },
    "decay None": (TypeError, lambda n, t: (n, t, {"decay": None}), "NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_operator_behind_the_public_function_is_not_reached_by(name):
    error, change, text = PUBLIC[name]
    state = pool_state()
    sk.reweight_(state, *step(), decay=0.9, temperature=0.1)
    nll, tokens, options = change(*step(1))
    before = storage_bytes([*tensors_of(state), nll, tokens])
    with pytest.raises(error, match=text):
        sk.reweight_(state, nll, tokens, **options)
    assert storage_bytes([*tensors_of(state), nll, tokens]) == before


def test_operator_refuses_a_state_that_does_not_fit():
    for name, value in (("live", torch.ones(2, 33)), ("probs", torch.ones(2, 32).double()), ("best", torch.ones(2))):
        state = pool_state()
        setattr(state, name, value)
        assert re.match(
            f"reweight_: {name}: expected", refusal(lambda *_, s=state: sk.reweight_(s, *step()), tensors_of(state))
        )
    state = pool_state()
    text = refusal(lambda *_: sk.reweight_(state, state.mean, step()[1]), tensors_of(state))
    assert text == "reweight_: nll: expected memory of its own, got some of mean's"


@pytest.mark.parametrize("pools, prompts", [(1, 7), (4, 33), (0, 3), (2, 0)])
def test_operator_behind_the_public_function(pools, prompts):
    """Defaults, one pool in one dimension, strided losses, losses with a gradient: all the plain result."""
    for layout in ("dense", "strided", "gradient", "flat"):
        state, wanted = pool_state(pools=pools, prompts=prompts), pool_state(pools=pools, prompts=prompts)
        for seed in range(3):
            nll, tokens = step(seed, pools, prompts)
            reweight_torch(*tensors_of(wanted), nll, tokens, 1.0, 0.0, 0.0)
            if layout == "strided":
                nll, tokens = strided(nll), strided(tokens)
            if layout == "gradient":
                nll.requires_grad_()
            if layout == "flat" and pools == 1:
                nll, tokens = nll[0], tokens[0]
            assert sk.reweight_(state, nll, tokens) is None
            assert_close(tensors_of(state)[:5], tensors_of(wanted)[:5])
            assert not state.mean.requires_grad


def test_operator_is_served_by_the_right_kernels():
    check_who_serves_the_operators()


@pytest.mark.parametrize("temperature", [0.0, 0.5])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_passes_opcheck(temperature, device):
    given = {**arguments(device), "temperature": temperature}
    done = torch.library.opcheck(op.default, tuple(given.values()))
    assert set(done.values()) == {"SUCCESS"} and len(done) == 4, done


@pytest.mark.parametrize("name", TENSORS)
def test_operator_refuses_a_meta_tensor_among_others(name):
    given = arguments()
    given[name] = given[name].to("meta")
    assert re.match(r"reweight_: \w+: expected it on the device of the other", refusal(op, given.values()))


def test_operator_does_nothing_on_meta_tensors():
    given = arguments()
    assert op(*(given[name].to("meta") for name in TENSORS), 0.9, 0.1, 0.05) is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_operator_compiles_without_a_graph_break(dynamic, device):
    def two_steps(state, nll, tokens):
        sk.reweight_(state, nll, tokens, decay=0.9, temperature=0.25, floor=0.1)
        between = state.probs * 2
        sk.reweight_(state, nll / 2, tokens, decay=0.5)
        return between, state.best + 1

    torch.compiler.reset()
    compiled = torch.compile(two_steps, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for pools, prompts in ((2, 33), (5, 8)):
        ours, wanted = (pool_state(pools=pools, prompts=prompts, device=device) for _ in range(2))
        for seed in range(3):
            nll, tokens = (v.to(device) for v in step(seed, pools, prompts))
            assert_same_bits(compiled(ours, nll, tokens), two_steps(wanted, nll, tokens))
            assert_same_bits(tensors_of(ours), tensors_of(wanted))


def test_everything_about_the_operator_holds_without_the_module():
    run_without_compiled(__file__)


@on_cpu
def test_threads_with_states_of_their_own(impl):
    """The bits of a sequence are those it has alone, whatever other threads do."""
    seeds = range(6)
    wanted, failed = {seed: played(impl.reweight_, seed) for seed in seeds}, []
    barrier = threading.Barrier(len(seeds))

    def work(seed):
        try:
            barrier.wait(60)
            for _ in range(rounds(20)):
                for a, b in zip(played(impl.reweight_, seed), wanted[seed], strict=True):
                    assert_same_bits(a, b)
        except BaseException as error:
            failed.append((seed, error))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@needs_compiled
@pytest.mark.skipif(QUICK, reason="times mean nothing under a sanitizer")
def test_ten_times_faster_than_eager_torch():
    """The best of many short interleaved bursts of each, which other work on the machine can only slow down."""
    from benchmarks.ops.reweight import reweight
    from benchmarks.registry import Setting
    from benchmarks.timing import Turns

    turns = Turns(reweight.build("8x32", Setting()))
    for _ in range(60):
        turns.turn()
    best = {name: min(found) for name, found in turns.seconds.items()}
    assert best["composed"] / best["ours"] >= 10, best


@pytest.mark.gpu
@needs_cuda_kernels
def test_a_thousand_runs_on_the_gpu_have_the_same_bits():
    wanted = played(reweight_torch, 7)[0]
    live, nll, tokens, *rest = scenario(7)[1][0]
    inputs = [v.cuda() for v in (live, nll, tokens)]
    first = None
    for _ in range(1000):
        state = new_state(*live.shape, "cuda")
        op(*state, *inputs, *rest)
        first = first or state
        assert_same_bits(state, first)
    assert_close(first, wanted)


@pytest.mark.gpu
@needs_cuda_kernels
def test_in_a_cuda_graph():
    prompts, steps = scenario(5)
    ours, wanted = new_state(POOLS, prompts, "cuda"), new_state(POOLS, prompts)
    inputs, rest = [v.cuda() for v in steps[0][:3]], (0.9, 0.1, 0.05)
    op(*[v.clone() for v in ours], *inputs, *rest)
    # Captured on a stream of its own: a kernel on another one would not be in the graph.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        op(*ours, *inputs, *rest)
    for one in steps:
        for place, value in zip(inputs, one[:3], strict=True):
            place.copy_(value)
        graph.replay()
        reweight_torch(*wanted, *one[:3], *rest)
        assert_close(ours, wanted)


@pytest.mark.gpu
@needs_cuda_kernels
def test_one_kernel_a_call_and_no_wait():
    from torch.profiler import ProfilerActivity, profile

    state = pool_state(pools=8, prompts=40, device="cuda")
    nll, tokens = (v.cuda() for v in step(0, 8, 40))
    sk.reweight_(state, nll, tokens)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(10):
            sk.reweight_(state, nll, tokens, 0.9, 0.1, 0.1)
        torch.cuda.synchronize()
    names = [event.name for event in trace.events()]
    on_gpu = [e.name for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    on_gpu = [name for name in on_gpu if name != "Activity Buffer Request"]  # the profiler's own
    assert len(on_gpu) == 10 and all("reweight_kernel" in name for name in on_gpu), on_gpu
    # The wait at the end of the block goes by another name.
    assert not set(names) & {"cudaStreamSynchronize", "cudaMemcpy", "cudaMemcpyAsync"}, names
