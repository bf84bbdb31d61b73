"""PromptState: construction, sampling, moving, and the round trip through files."""

from __future__ import annotations

import math

import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.reweight.prompt_state import DTYPES, PER_POOL
from tests.native_cases import assert_same_bits, storage_bytes

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def tensors(state: sk.PromptState) -> list[torch.Tensor]:
    return [getattr(state, name) for name in DTYPES]


def scored(seed=0, counts=(7, 33, 0, 1), device="cpu") -> sk.PromptState:
    """A ragged state in the middle of a run: a pool without prompts, losses that are not finite."""
    state = sk.PromptState(len(counts), counts, device)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3):
        tokens = torch.randint(0, 50, state.mean.shape, generator=generator)
        nll = tokens * torch.rand(state.mean.shape, generator=generator, dtype=torch.float64)
        nll[torch.rand(nll.shape, generator=generator) < 0.1] = torch.nan
        sk.reweight_(state, nll.to(device), tokens.to(device), decay=0.9, temperature=0.2, floor=0.1)
    return state


@devices
@pytest.mark.parametrize("pools, prompts", [(1, 1), (3, 5), (0, 4), (2, 0), (4, (3, 0, 7, 1)), (0, ())])
def test_a_new_state(pools, prompts, device):
    state = sk.PromptState(pools, prompts, device)
    counts = [prompts] * pools if isinstance(prompts, int) else list(prompts)
    size = prompts if isinstance(prompts, int) else max(prompts, default=0)
    assert (state.num_pools, state.num_prompts, state.device.type) == (pools, size, device)
    for name, dtype in DTYPES.items():
        value = getattr(state, name)
        assert value.dtype == dtype and value.is_contiguous() and value.device.type == device
        assert list(value.shape) == ([pools] if name in PER_POOL else [pools, size])
    assert state.mean.isnan().all() and not state.weight.any() and state.best.tolist() == [-1] * pools
    assert state.live.tolist() == [[k < n for k in range(size)] for n in counts]
    assert state.effective.tolist() == counts
    # Even in double precision: 1/3 of float32 would be 1e-8 off.
    assert state.probs.tolist() == [[1 / n if k < n else 0.0 for k in range(size)] for n in counts]
    assert repr(state).startswith(f"PromptState(num_pools={pools}, num_prompts={size}, device='{device}")


WRONG_SIZES = [(-1, 1), (1.0, 1), (True, 1), (None, 1), (0, -1), (0, True), (2, 2.0), (1, None), (2, "ab"), (2, (1,)),
               (1, (1, 2)), (2, (1, -1)), (1, (True,)), (1, {1})]  # fmt: skip


@pytest.mark.parametrize("pools, prompts", WRONG_SIZES)
def test_sizes_are_refused(pools, prompts):
    with pytest.raises(ValueError, match="num_(pools|prompts): expected a whole number .*, got"):
        sk.PromptState(pools, prompts)
    if type(prompts) in (int, float, bool, type(None)) and prompts != 1:
        with pytest.raises(ValueError, match="n: expected a whole number of at least 0, got"):
            sk.PromptState().sample(prompts)


@devices
def test_round_trip_through_a_file(tmp_path, device):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    state = scored(device=device)
    safetensors.save_file(state.state_dict(), tmp_path / "state.safetensors")
    for target in {"cpu", device}:
        fresh = sk.PromptState(4, (7, 33, 0, 1), target)
        own = tensors(fresh)
        fresh.load_state_dict(safetensors.load_file(tmp_path / "state.safetensors"))
        assert_same_bits(tensors(fresh), tensors(state))
        assert all(a is b for a, b in zip(tensors(fresh), own, strict=True)), "in place"


@devices
def test_copies_share_nothing_and_lie_elsewhere_or_otherwise(device):
    state = scored()
    assert state.to("cpu") is state and state.to(torch.device("cpu")) is state
    assert {value.device.type for value in tensors(state.to("meta"))} == {"meta"}
    there = state.to(device)
    assert there.to(device) is there
    assert_same_bits(tensors(there), tensors(state))
    given = there.state_dict()
    given["mean"] = given["mean"].T.contiguous().T
    fresh = sk.PromptState(4, 33)
    fresh.load_state_dict(given)
    given["best"].zero_()
    assert_same_bits(tensors(fresh), tensors(state))
    assert_same_bits(tensors(there), tensors(state))


def entry(name, change):
    return lambda given: given.__setitem__(name, change(given[name]))


def put(name, at, value):
    return lambda given: given[name].view(-1).__setitem__(at, value)


REFUSED = {
    "an entry short": (ValueError, lambda g: g.pop("best"), r"state: expected the entries \['best', "),
    "mean float32": (TypeError, entry("mean", torch.Tensor.float), "mean: expected a .*64 tensor, got torch.float32"),
    "live uint8": (TypeError, entry("live", torch.Tensor.byte), "live: expected a torch.bool tensor"),
    "a list": (TypeError, entry("weight", torch.Tensor.tolist), "weight: expected a .* tensor, got <class 'list'>"),
    "pools": (ValueError, entry("best", lambda v: v[1:]), r"best: expected \[4\], got \[3\]"),
    "prompts": (ValueError, entry("live", lambda v: v[:, 1:]), r"live: expected \[4, 33\], got \[4, 32\]"),
    "weight below 0": (ValueError, put("weight", 40, -1.0), "weight: expected finite numbers of at least 0"),
    "weight infinite": (ValueError, put("weight", -1, math.inf), "weight: expected finite"),
    "probs NaN": (ValueError, put("probs", 131, math.nan), "probs: expected numbers from 0 to 1"),
    "probs above 1": (ValueError, put("probs", 0, 1.5), "probs: expected numbers from 0 to 1"),
    "probs below 0": (ValueError, put("probs", 0, -1e-9), "probs: expected numbers from 0 to 1"),
    "another sum of probs": (ValueError, put("probs", 0, 0.9), "probs: expected a sum of 1"),
    "best below -1": (ValueError, put("best", 3, -2), "best: expected numbers from -1 to 32"),
    "best past the end": (ValueError, put("best", 0, 33), "best: expected numbers from -1 to 32, got"),
    "effective": (ValueError, put("effective", 0, math.nan), "effective: expected finite numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_contents_leave_the_state_alone(name):
    error, change, text = REFUSED[name]
    state, given = scored(1), scored(2).state_dict()
    change(given)
    before = storage_bytes(tensors(state))
    with pytest.raises(error, match=text):
        state.load_state_dict(given)
    assert storage_bytes(tensors(state)) == before


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@devices
def test_samples_follow_the_probs(device):
    """Each frequency is within 5 sigma of its probability; a prompt of probability 0 is never drawn."""
    state = scored(device=device)
    n, before = 20_000, storage_bytes(tensors(state))
    drawn = state.sample(n, generator(0)).cpu()
    assert storage_bytes(tensors(state)) == before and state.sample().shape == (4, 1)
    assert drawn.shape == (4, n) and drawn.dtype == torch.int64
    assert drawn[2].tolist() == [-1] * n and drawn[3].tolist() == [0] * n
    for pool in (0, 1):
        probs = state.probs[pool].cpu()
        count = torch.bincount(drawn[pool], minlength=33)
        assert ((count - n * probs).abs() <= 5 * (n * probs * (1 - probs)).sqrt() + 1e-9).all()
        assert (probs == 0).any() and not count[probs == 0].any()
        assert len(set(drawn[pool].tolist())) > 3
    # Pools of the same probs, and neighbouring draws of one pool, agree as often as chance has it.
    first, second = sk.PromptState(2, 4, device).sample(n, generator(1)).cpu()
    for same in ((first == second), (first[1:] == first[:-1])):
        assert abs(float(same.double().mean()) - 0.25) < 5 * (0.25 * 0.75 / len(same)) ** 0.5


@devices
def test_the_same_generator_state_gives_the_same_draws(device):
    state, source = scored(device=device), generator(3)
    first = state.sample(50, source)
    assert torch.equal(first.cpu(), scored().sample(50, generator(3)))
    assert not torch.equal(first, state.sample(50, source)), "the generator moved on"
    torch.manual_seed(0)
    one = state.sample(20)
    torch.manual_seed(0)
    assert torch.equal(one, state.sample(20)) and one.device.type == device
    for pools, prompts, n in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        drawn = sk.PromptState(pools, prompts).sample(n)
        assert drawn.shape == (pools, n) and drawn.dtype == torch.int64 and (drawn == -1).all()


def test_probabilities_of_any_size_can_be_drawn():
    state = sk.PromptState(1, 3)
    for probs, chosen in (([0.0, 1.0, 0.0], {1}), ([1.0, 5e-324, 1e-300], {0}), ([0.5, 0.0, 0.5], {0, 2})):
        state.probs.copy_(torch.tensor([probs]))
        assert set(state.sample(500, generator(0))[0].tolist()) == chosen


def test_what_has_left_or_broke_is_not_drawn():
    state, ones = sk.PromptState(1, 3), torch.ones(1, 3, dtype=torch.int64)
    sk.reweight_(state, torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64), ones)
    state.live[0, 1] = False
    assert state.sample(5).tolist() == [[-1] * 5], "all of the probability was on the prompt that left"
    sk.reweight_(state, torch.zeros(1, 3, dtype=torch.float64), 0 * ones, temperature=1.0)
    assert set(state.sample(200, generator(0)).flatten().tolist()) == {0, 2}
    state.mean[0, 0] = torch.nan
    assert set(state.sample(50).flatten().tolist()) == {2}
