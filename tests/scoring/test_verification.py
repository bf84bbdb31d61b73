"""Every call verifies itself: whatever a model is made to compute, its score is exact, or an error says why not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import pkgutil
import weakref

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import decoder, fingerprint, foreign_code, paths, score, verification, verified_paths
from sapo_kernels.widened import Widened
from tests.families import TOLERANCE, build, cells, per_token_error, plain_nll
from tests.scoring.test_zoo import cache, many

__all__ = ["cache"]
pytest.importorskip("transformers")


# What the verdict is remembered by, and what it costs.


@pytest.fixture
def plain_forwards(monkeypatch):
    """The cells that went alone through the plain model."""
    found, plain = [], verification.PlainModel.score

    def spy(self, cache, cell, more_rows=0):
        found.append(cell)
        return plain(self, cache, cell, more_rows)

    monkeypatch.setattr(verification.PlainModel, "score", spy)
    return found


def test_two_cells_are_verified_first_and_one_again(cache, plain_forwards):
    model = build("qwen3")
    lengths = cache.lengths.tolist()
    for number in (2, 1, 1):
        scores = sk.score_prompts(model, cache)
        assert len(plain_forwards) == len(scores.stats["verified"]) == number
        assert lengths[plain_forwards[0]] == max(lengths)
        assert scores.stats["difference"] < TOLERANCE
        plain_forwards.clear()
    few = cells(single=False)
    assert len(few.lengths) < verified_paths.TWO_CHECKS
    sk.score_prompts(model := build("qwen3"), few)
    assert len(plain_forwards) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None, "what is remembered dies with its model"


def test_which_cells_are_verified(cache):
    """On the tree one that stands behind others; in batches one with company."""
    job = score.ScoringJob(build("llama"), cache, "auto", 64, False)
    lengths, (first, last) = cache.lengths, cache.extremes
    longest = int(lengths.argmax())
    assert longest not in (first, last)
    assert job._cells("tree", None, None) == [longest, last]
    assert job._cells("tree", verified_paths.Settled("tree", None, False, None), None) == [longest]
    assert job._cells("alone", None, None) == [longest, int(lengths.argmin())]
    for equal, path in ((False, "padded"), (True, "equal")):
        (company,) = job._cells(path, None, None)[1:]
        batches = paths._similar_lengths(np.unique(cache.first_equal), lengths + 1, 64, equal)
        assert any(company in batch and len(batch) == max(map(len, batches)) for batch in batches) or not equal
    few = sk.ResponseCache.from_token_ids([[[5] * 9, [6, 7]], [[8] * 3, [9]]], [[3, 4], [5]])
    assert few.extremes[0] == 0 == few.lengths.argmax()
    known = verified_paths.Settled("tree", None, False, None)
    assert score.ScoringJob(build("llama"), few, "auto", 64, False)._cells("tree", known, None) == [0, few.extremes[1]]


def test_what_is_remembered_is_given_up_when_it_disagrees(cache, plain_forwards, monkeypatch):
    """The model's own error in low precision was measured on other weights."""
    model, compare = build("llama", dtype=torch.bfloat16), verification.Check.compare
    monkeypatch.setattr(verification.Check, "compare", lambda *args: compare(*args[:2], args[2] + ripple))
    ripple = 0.003 * torch.randn(300, generator=torch.Generator().manual_seed(0))
    sk.score_prompts(model, cache, max_tokens=64)
    (settled,) = verified_paths._known[model].values()
    settled.noise = (1e-9, 1e-9)
    plain_forwards.clear()
    assert sk.score_prompts(model, cache, max_tokens=64).stats["path"] == "tree" and len(plain_forwards) > 2
    (settled,) = verified_paths._known[model].values()
    assert settled.noise[1] > 1e-6


def test_a_race_verifies_its_first_round_and_whatever_is_longer(plain_forwards):
    job = many()
    model = build("llama")
    scores = sk.score_prompts(model, job, race=sk.Race())
    assert scores.stats["verified"] and len(plain_forwards) == len(scores.stats["verified"])
    longest = np.where(scores.scored.flatten().numpy(), job.lengths, 0).argmax()
    assert job.cell_name(int(longest)) in scores.stats["verified"]


def test_later_rounds_of_a_race_are_verified_now_and_then(monkeypatch):
    """Whenever twice as many cells have been scored; what does not agree there starts the race over."""
    contexts = [[[3 + k, 20, 21, 30 + m, 31, 32 + k] for m in range(40)] for k in range(3)]
    job = sk.ResponseCache.from_token_ids(contexts, [[[7, 8]] * 40] * 3)
    model, race = build("llama"), sk.Race(delta=0, first=2, growth=1.5)
    plain = plain_nll(model, job)
    scores = sk.score_prompts(model, job, race=race)
    assert scores.stats["path"] == "tree" and 4 <= len(scores.stats["verified"]) <= len(scores.race.rounds)
    run, passes = decoder.TreeRunner.run, []

    def wrong_after_the_first(self, step, checks):
        passes.append(step)
        return run(self, step, checks) + (0.1 if len(passes) > 1 else 0.0)

    monkeypatch.setattr(paths.TreeRunner, "run", wrong_after_the_first)
    scores = sk.score_prompts(build("llama"), job, race=race)
    assert len(passes) > 1 and scores.stats["path"] == "padded"
    assert per_token_error(scores, plain) < TOLERANCE


def test_activations_that_are_quantised_together_are_scored_alone(cache):
    model = build("llama")
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    scores = sk.score_prompts(quantised, cache, max_tokens=64)
    assert scores.stats["path"] == "alone" and "by one scale" in scores.stats["reason"]
    assert per_token_error(scores, plain_nll(quantised, cache)) < TOLERANCE


def test_a_model_that_changes_between_the_rounds_of_a_race_is_looked_at_again():
    model, told = build("llama"), []
    # All of a length: the rounds after the first are taken at its word.
    contexts = [[[3 + k, 20, 21, 30 + m, 31, 32 + k] for m in range(24)] for k in range(3)]
    job = sk.ResponseCache.from_token_ids(contexts, [[[7, 8]] * 24] * 3)

    def watch(done: int, total: int) -> None:
        if told and done < told[-1] and not model.model.layers[0].mlp._forward_hooks:  # the second round has begun
            model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out - out.mean(1, keepdim=True))
        told.append(done)

    scores = sk.score_prompts(model, job, race=sk.Race(delta=0, first=2, growth=1.5), progress=watch)
    assert len(scores.race.rounds) > 2 and scores.stats["path"] == "alone" and "hook" in scores.stats["reason"]
    assert per_token_error(scores, plain_nll(model, job)) < TOLERANCE


def adapt(model):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    return model


CHANGES = {
    "config": lambda model: model.config.update({"rms_norm_eps": 0.1}),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "attribute": lambda model: model.model.layers[1].self_attn.__setattr__("scaling", 1.0),
    "dtype": lambda model: model.to(torch.bfloat16),
    "hook": lambda model: model.model.layers[0].register_forward_hook(print),
    "quantised": lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True),
    "another adapter": lambda model: model.set_adapter("second"),
    "no adapter": lambda model: model.base_model.disable_adapter_layers(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_anything_new_is_another_fingerprint(name):
    model = adapt(build("qwen3")) if "adapter" in name else build("qwen3")

    def number():
        return fingerprint.fingerprint(model, torch.device("cpu"), fingerprint.configurations(model), "auto")

    before = number()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2.0)
    assert number() == before, "training does not change it"
    with torch.autocast("cpu", torch.bfloat16):
        assert number() != before
    CHANGES[name](model)
    assert number() != before


def test_a_layer_of_the_users_own_can_be_packed_on_request(cache, plain_forwards):
    """A LoRA written by hand acts on each token alone: `impl="tree"` packs it, the ends of passes verified too."""

    class Own(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.1

    model = build("qwen3")
    with torch.random.fork_rng(devices=[]):
        model.model.layers[1].mlp.up_proj = Own(32, 48, bias=False)
    plain = plain_nll(model, cache)
    scores = sk.score_prompts(model, cache, impl="tree", max_tokens=64)
    assert scores.stats["path"] == "tree" and len(scores.stats["verified"]) > 4
    assert per_token_error(scores, plain) < TOLERANCE
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "alone" and "Own.forward" in scores.stats["reason"]
    assert per_token_error(scores, plain) < TOLERANCE


# Whose code runs in a forward: the user's own is found behind any wrapper, that of libraries is let be.


@functools.wraps(torch.nn.functional.silu)
def disguised(x):
    return x


class Callable:
    def __call__(self, module, args, out):
        return out


@pytest.mark.parametrize(
    "code",
    [
        lambda *a: None, disguised, functools.partial(functools.partial, disguised), Callable(), Callable().__call__,
        torch.no_grad()(lambda *a: None), torch.compile(disguised, backend="eager"), print,
        torch.autocast("cpu")(disguised),
    ],
)  # fmt: skip
def test_code_of_the_users_own_is_found_behind_any_wrapper(code):
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        model = build("qwen3")
        getattr(model.model.layers[1].mlp, register)(code)
        assert "a forward hook of 'model.layers.1.mlp'" in foreign_code.foreign_code(model, [])


@pytest.mark.parametrize("code", [disguised, functools.partial(disguised), Callable()])
def test_patches_of_libraries_and_registered_functions_are_found(code, monkeypatch):
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.mixtral import modeling_mixtral

    model = build("mixtral")
    configs = fingerprint.configurations(model)
    assert foreign_code.foreign_code(model, configs) is None
    for owner, name in ((modeling_mixtral, "create_causal_mask"), (torch.nn.functional, "silu"), (torch, "rsqrt")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, code)
            assert foreign_code.foreign_code(model, configs)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mine", code)
    model.set_experts_implementation("mine")
    assert "the experts function 'mine'" in foreign_code.foreign_code(model, configs)


def test_code_of_libraries_is_not_foreign():
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    model = build("qwen3")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    accelerate.hooks.add_hook_to_module(model.model.layers[0], accelerate.hooks.ModelHook())
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    inner = model.get_base_model()
    assert foreign_code.foreign_code(model, fingerprint.configurations(model)) is None
    inner.lm_head = torch.nn.utils.parametrizations.weight_norm(inner.lm_head)
    assert foreign_code.foreign_code(model, []) is None

    class Own(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output

    accelerate.hooks.add_hook_to_module(inner.model.layers[1], accelerate.hooks.ModelHook())
    accelerate.hooks.add_hook_to_module(inner.model.layers[1], Own(), append=True)
    assert "accelerate's hook of 'base_model.model.model.layers.1'" in foreign_code.foreign_code(model, [])


# The check itself, with faults planted in what it checks and in itself.

FAULTS = {
    "keys of the next token": ("sapo_kernels.scoring.attention.tree_attention",
                               lambda f: lambda q, k, v, plan, **kw: f(q, k.roll(1, 0), v, plan, **kw)),
    "another scale": ("sapo_kernels.scoring.attention.tree_attention",
                      lambda f: lambda q, k, v, plan, **kw: f(q, k, v, plan, **{**kw, "scale": 0.4})),
    "the next row": ("sapo_kernels.scoring.head.Batch.of_pass",
                     lambda f: lambda plan, checks=(): dataclasses.replace(f(plan, checks), rows=plan.rows.roll(1))),
    "another target": ("sapo_kernels.scoring.head.HeadReader._project",
                       lambda f: lambda self, rows, targets, counts: f(self, rows, targets.roll(1), counts)),
    "sums of other cells": ("sapo_kernels.scoring.paths.CellSums.nll", lambda f: lambda self: np.roll(f(self), 1)),
    "a head's scale": ("sapo_kernels.scoring.paths.HeadReader.logits", lambda f: lambda self, h: 1.01 * f(self, h)),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_our_own_is_found(name, cache, monkeypatch):
    """Whatever of the tree path is wrong, the call takes another path or says so."""
    dtype = torch.bfloat16 if "scale" in name else torch.float32
    model = build("llama", dtype=dtype)
    plain = plain_nll(model, cache)
    where, broken = FAULTS[name]
    owner, attribute = where.rsplit(".", 1)
    owner = pkgutil.resolve_name(owner)
    monkeypatch.setattr(owner, attribute, broken(getattr(owner, attribute)))
    try:
        scores = sk.score_prompts(model, cache, max_tokens=64)
    except RuntimeError as error:
        assert "expected the same log-probabilities" in str(error)
        return
    assert per_token_error(scores, plain) < (TOLERANCE if dtype == torch.float32 else 0.3), scores.stats


def check_of(own: torch.Tensor, noise=None) -> verification.Check:
    return verification.Check(0, own, True, 1.0, noise)


def test_rows_are_compared_entry_by_entry():
    """And the sum of a cell with that of its rows."""
    own = 5 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    every = torch.arange(3)

    def judged(change, rows=every, noise=None):
        check = check_of(own, noise)
        check.compare(rows, change(own.clone())[rows])
        assert check.complete == (len(rows) == 3)
        check.judge()
        return check.worst

    def put(x, value, at=(2, 7)):
        x[at] = value
        return x

    assert judged(lambda x: x) == 0.0
    assert judged(lambda x: x + 3.0) < 1e-5, "a constant of a row is no difference"
    assert 1e-5 < judged(lambda x: put(x, x[2, 7] + 4e-5)) < 1e-4
    for change in (lambda x: put(x, x[2, 7] + 1e-3), lambda x: put(x, -torch.inf), lambda x: put(x, torch.nan),
                   lambda x: x.roll(1, 0), lambda x: x.roll(1, 1), lambda x: 1.001 * x):  # fmt: skip
        with pytest.raises(verification.Disagreement, match="differs from the plain model by"):
            judged(change)
    # One logit lowered by 20 among many: a small mean square, and a large entry.
    with pytest.raises(verification.Disagreement):
        judged(lambda x: put(x, x[2, 7] - 20), noise=(10.0, 0.3))
    assert judged(lambda x: put(x, x[2, 7] + 0.2), noise=(0.1, 0.3)) > 0.1
    for value in (-torch.inf, torch.nan):  # masked, or sick, on both sides
        own[1, 3] = value
        judged(lambda x: x)
    judged(lambda x: x, rows=every[:2])
    # Many small differences in low precision: a large mean square, and no large entry.
    with pytest.raises(verification.Disagreement):
        judged(lambda x: x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign(),
               noise=(0.02, 0.5))  # fmt: skip
    check = check_of(torch.zeros(4, 9))
    check.judge_sum(1.0 + 3e-4)
    for nll in (1.001, float("nan"), float("inf")):
        with pytest.raises(verification.Disagreement, match="its loss is"):
            check.judge_sum(nll)


def test_a_row_that_nobody_compared_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(paths, "_in_pass", lambda trie, step, rows: [])
    with pytest.raises(RuntimeError, match="impl='tree': .* expected all of its rows to be compared"):
        sk.score_prompts(build("llama"), cache, impl="tree")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
def test_the_error_of_low_precision_is_measured_as_a_float32_copy_would(name, cache, monkeypatch):
    """The same forward with every operation in float32: bit for bit that of the model's copy in float32."""
    model = build(name, dtype=torch.bfloat16).eval()
    plain = verification.PlainModel(model, model, torch.device("cpu"), keep_rows=True)
    wide = verification.PlainModel(copy.deepcopy(model).float(), model, torch.device("cpu"), keep_rows=True)
    with torch.no_grad():
        low, _ = plain.score(cache, 3, 8)
        exact, _ = wide.score(cache, 3, 8)
        with verification.exact_products():
            assert torch.equal(plain.score(cache, 3, 8)[0], exact)
        assert low.dtype == torch.bfloat16
        square, largest = plain._noise(cache, 3)
        assert 0.0 < square < largest < 3.0
        # Kernels that know low precision only have a fixed bound.
        monkeypatch.setattr(Widened, "__torch_dispatch__", lambda *a, **k: 1 / 0)
        assert plain._noise(cache, 3) == verification.UNMEASURED


def test_verify_shows_the_differences(cache):
    model = build("qwen3")
    found = sk.verify(model, cache, cells=5)
    assert found.path == "tree" and found.reason is None and len(found.cells) == 5
    plain = plain_nll(model, cache)
    for one in found:
        assert one.nll == pytest.approx(float(plain[one.prompt, one.example]), abs=1e-4)
        assert 0.0 <= one.difference <= found.difference < one.bound == 1e-4
        assert one.tokens == len(cache.responses[one.prompt][one.example])
    assert str(found).count("off by") == 5
    lengths = cache.lengths.reshape(cache.num_prompts, -1)
    assert {lengths.max(), lengths.min()} <= {lengths[one.prompt, one.example] for one in found}
    model.model.layers[1].register_forward_hook(lambda m, args, out: out)
    assert sk.verify(model, cache, cells=2).path == "alone"
    with pytest.raises(ValueError, match="cells: expected a whole number of at least 1, got 0"):
        sk.verify(model, cache, cells=0)
