"""Whatever a model is made to compute, its score is exact, or an error says why there is none."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import sapo_kernels as sk
from tests.families import TOLERANCE, build, cells, per_token_error, plain_nll
from tests.scoring.zoo import ZOO

pytest.importorskip("transformers")

# Whatever does not give the same twice has no score.
NO_SCORE = "hook: noise that never repeats"


def drawing(seed: int):
    """ids(count): random token ids, others at each call."""
    draw = torch.Generator().manual_seed(seed)
    return lambda count, low=5: torch.randint(low, 290, (count,), generator=draw).tolist()


@pytest.fixture(scope="module")
def cache():
    """Cells of 36 to 76 tokens, longer than any window or block of the zoo."""
    return cells(inputs=(60, 60, 34))


@pytest.fixture(scope="module")
def sorted_cells():
    """The longest cell is the first in depth-first order: its place in the pass is its place in the sequence."""
    ids = drawing(0)
    prompts = [[5 + k, *ids(30 - 2 * k, 60)] for k in range(2)]
    inputs, answers = [[5 + m, *ids(30 - 3 * m, 60)] for m in range(4)], [[7, *ids(2, 60)] for _ in range(4)]
    return sk.ResponseCache.from_token_ids([[prompt + given for given in inputs] for prompt in prompts], answers)


@pytest.mark.parametrize("name", ZOO)
def test_whatever_a_model_computes_is_what_is_scored(name, cache, sorted_cells, caplog):
    """Of a model that is new, and in every other way of one that was scored before, on cells of another order."""
    before = list(ZOO).index(name) % 2
    cache = sorted_cells if before else cache
    family, config, change = ZOO[name]
    model = build(family, **config)
    if before:
        sk.score_prompts(model, cache, max_tokens=64)
    undo = change(model) or (lambda: None)
    try:
        with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
            if name == NO_SCORE:
                with pytest.raises(RuntimeError, match="expected the same log-probabilities each time"):
                    sk.score_prompts(model, cache, max_tokens=64)
                return
            # A fresh copy each time: a rope that has grown would stay so.
            forward = (lambda **inputs: copy.deepcopy(model)(**inputs)) if "grows" in name else None
            plain = plain_nll(model, cache, forward)
            for max_tokens in (64, 4096):
                scores = sk.score_prompts(model, cache, max_tokens=max_tokens)
                assert per_token_error(scores, plain) < TOLERANCE, (name, scores.stats["path"])
            # One line says which path and why; nothing is said of the usual one.
            assert bool(caplog.text) == (scores.stats["path"] != "tree") == (scores.stats["reason"] is not None)
            for impl in ("tree", "padded", "alone"):
                try:
                    scores = sk.score_prompts(model, cache, impl=impl, max_tokens=64)
                except RuntimeError as error:
                    assert str(error).startswith(f"impl={impl!r}: ")
                else:
                    assert per_token_error(scores, plain) < TOLERANCE, (name, impl)
    finally:
        undo()


WRAPPERS = {"compiled": lambda model: torch.compile(model, backend="eager"), "parallel": torch.nn.DataParallel}


@pytest.mark.parametrize(("wrapper", "how"), [("compiled", "hook"), ("parallel", "forward")])
def test_code_around_a_wrapper_is_not_peeled_off(wrapper, how, cache):
    model = WRAPPERS[wrapper](build("qwen3").eval())
    plain = plain_nll(model, cache)
    assert per_token_error(sk.score_prompts(model, cache), plain) < TOLERANCE

    def cooler(module, args, out):
        out.logits = out.logits / 0.7
        return out

    if how == "hook":
        model.register_forward_hook(cooler)
    else:
        forward = model.forward
        model.forward = lambda *args, **kwargs: cooler(model, args, forward(*args, **kwargs))
    moved = plain_nll(model, cache)
    assert (moved - plain).abs().max() > 0.5
    scores = sk.score_prompts(model, cache)
    assert per_token_error(scores, moved) < TOLERANCE and scores.stats["path"] == "alone"


@pytest.mark.parametrize("layer", ["Lily", "pooling"])
def test_a_layer_that_shows_with_company_only_is_found(layer):
    """PEFT's Lily routes by the mean over the batch; a pooling looks into the padding, which a middle cell has."""
    ids = drawing(0)
    job = sk.ResponseCache.from_token_ids([[ids(n) for n in (70, 50, 46, 20)]], [ids(3) for _ in range(4)])
    model = build("qwen3")
    if layer == "Lily":
        peft = pytest.importorskip("peft")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LilyConfig(target_modules=["q_proj"], r=4))
            for name, weight in model.named_parameters():
                if "lily" in name:
                    torch.nn.init.normal_(weight, std=0.3)
    else:
        pool = torch.nn.AvgPool2d((9, 1), stride=1, padding=(4, 0))
        model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, pool)
    plain = plain_nll(model, job)
    for impl, max_tokens in (("auto", 120), ("padded", 120), ("padded", 4096), ("alone", 4096)):
        scores = sk.score_prompts(model, job, impl=impl, max_tokens=max_tokens)
        assert per_token_error(scores, plain) < TOLERANCE


def many() -> sk.ResponseCache:
    """3 prompts with 40 examples of different lengths."""
    ids = drawing(1)
    prompts, inputs = (
        [ids(n) for n in (4, 9, 6)],
        [ids(4 + n) for n in torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()],
    )
    return sk.ResponseCache.from_token_ids([[p + given for given in inputs] for p in prompts], [ids(2) for _ in inputs])


def test_what_does_not_change_the_forward_does_not_close_the_tree(cache):
    """Methods that no forward calls may be anybody's, and routers are not asked for their losses."""
    model = build("mixtral", output_router_logits=True)
    model.generate = model.state_dict = model.loss_function = lambda *args, **kwargs: None
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "tree" and model.config.output_router_logits
    assert per_token_error(scores, plain_nll(model, cache)) < TOLERANCE
