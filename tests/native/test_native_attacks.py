"""What callers may do to the in-place operators besides calling them rightly: autograd, views, half states."""

from __future__ import annotations

import pytest
import torch

import sapo_kernels as sk

F64, I64 = torch.float64, torch.int64


def scored(losses=(3.0, 1.0, 2.0)) -> sk.PromptState:
    state = sk.PromptState(1, len(losses))
    sk.reweight_(state, torch.tensor([losses], dtype=F64), torch.ones(1, len(losses), dtype=I64))
    return state


def update(state, value=9.0):
    size = state.mean.shape
    sk.reweight_(state, torch.full(size, value, dtype=F64), torch.ones(size, dtype=I64), decay=0.0)


def accumulate_arguments(**changed):
    return {
        "nll": torch.zeros(2, dtype=F64), "tokens": torch.zeros(2, dtype=I64), "logprob": torch.ones(3),
        "cell_target": torch.tensor([0, 1, 2]), "cell_ptr": torch.tensor([0, 2, 3]), **changed,
    }  # fmt: skip


@pytest.mark.parametrize("call", ["function", "operator"])
def test_a_backward_pass_over_an_old_value_raises(call):
    """A silent wrong gradient otherwise: the product saved the mean, which has been overwritten since."""
    state, weight = scored(), torch.ones(1, 3, dtype=F64, requires_grad=True)
    product = (weight * state.mean).sum()
    if call == "function":
        update(state)
    else:
        one = torch.ones(1, 3, dtype=I64)
        tensors = (state.mean, state.weight, state.probs, state.best, state.effective, state.live)
        torch.ops.sapo_kernels.reweight_(*tensors, torch.full((1, 3), 9.0, dtype=F64), one, 0.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_also_under_compile():
    state, weight = scored(), torch.ones(1, 3, dtype=F64, requires_grad=True)

    @torch.compile(backend="aot_eager")
    def both(weight, state):
        product = (weight * state.mean).sum()
        update(state)
        return product

    with pytest.raises(Exception, match="modified by an inplace operation"):
        both(weight, state).backward()


@pytest.mark.parametrize("name", ["nll", "logprob"])
def test_tensors_with_gradient_are_refused(name):
    arguments = accumulate_arguments()
    arguments[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"accumulate_: {name}: expected it without gradient"):
        sk.accumulate_(*arguments.values())
    assert arguments["tokens"].tolist() == [0, 0]
    with torch.no_grad():
        sk.accumulate_(*arguments.values())
    assert arguments["nll"].tolist() == [-2.0, -1.0]


def test_a_negated_view_is_refused_before_anything_is_written():
    arguments = accumulate_arguments(nll=torch._neg_view(torch.zeros(2, dtype=F64)))
    with pytest.raises(RuntimeError, match="accumulate_: nll: expected a plain tensor, got a lazily negated view"):
        sk.accumulate_(*arguments.values())
    assert arguments["tokens"].tolist() == [0, 0]


def test_inference_tensors_can_be_written():
    with torch.inference_mode():
        state = sk.PromptState(1, 3)
    update(state)
    assert state.best.tolist() == [0]


@pytest.mark.parametrize("spoil", ["gradient", "expanded"])
def test_a_state_that_cannot_be_written_is_not_written_by_half(spoil):
    state, source = scored(), scored((7.0, 8.0, 9.0)).state_dict()
    if spoil == "gradient":
        state.probs.requires_grad_()
    else:
        state.live = torch.ones(1, 1, dtype=torch.bool).expand(1, 3)
    with pytest.raises(ValueError, match="dense and without gradient"):
        state.load_state_dict(source)
    assert state.mean.tolist() == [[3.0, 1.0, 2.0]] and state.best.tolist() == [1]


def test_another_default_device_does_not_matter():
    with torch.device("meta"):
        state = sk.PromptState(2, [3, 1])
    assert state.device.type == "cpu" and state.effective.tolist() == [3.0, 1.0]


def test_the_largest_temperatures_are_not_argmin_without_denormals():
    """1 / 1e308 is denormal; a processor that flushes it to 0 must not take it for temperature 0."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormal numbers")
    try:
        state = sk.PromptState(1, 3)
        sk.reweight_(state, torch.tensor([3.0, 1.0, 2.0], dtype=F64), torch.ones(3, dtype=I64), temperature=1e308)
        assert state.probs.tolist() == [[1 / 3] * 3]
    finally:
        torch.set_flush_denormal(False)
