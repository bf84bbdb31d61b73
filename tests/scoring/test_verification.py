"""Every call verifies itself: whatever a model is made to compute, its score is exact, or an error says why not."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import logging
import pkgutil
import weakref

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import fingerprint, foreign_code, paths, race, score, verification
from tests.families import build, cells, per_token_error, plain_nll
from tests.scoring.zoo import ZOO
from tests.tolerances import TOLERANCES

pytest.importorskip("transformers")

TOLERANCE = TOLERANCES["token nll"].atol
# Whatever does not give the same twice has no score.
NO_SCORE = {"noise that never repeats", "a counter"}


@pytest.fixture(scope="module")
def cache():
    """Cells of 36 to 76 tokens, longer than any window or block of the zoo."""
    return cells(inputs=(60, 60, 34))


@pytest.fixture(scope="module")
def sorted_cells():
    """The longest cell is the first in depth-first order: its place in the pass is its place in the sequence."""
    draw = torch.Generator().manual_seed(0)

    def ids(first, count):
        return [first, *torch.randint(60, 290, (count,), generator=draw).tolist()]

    prompts = [ids(5 + k, 30 - 2 * k) for k in range(2)]
    inputs, answers = [ids(5 + m, 30 - 3 * m) for m in range(4)], [ids(7, 2) for _ in range(4)]
    return sk.ResponseCache.from_token_ids([[prompt + given for given in inputs] for prompt in prompts], answers)


@pytest.mark.parametrize("before", [False, True], ids=["new", "scored before"])
@pytest.mark.parametrize("name", ZOO)
def test_whatever_a_model_computes_is_what_is_scored(name, before, cache, sorted_cells, caplog):
    # Before and after differ in their cells too: in the one order or the other a difference shows less.
    cache = sorted_cells if before else cache
    family, config, change = ZOO[name]
    model = build(family, **config)
    usual = plain_nll(model, cache)
    if before:
        assert per_token_error(sk.score_prompts(model, cache, max_tokens=64), usual) < TOLERANCE
    undo = change(model) or (lambda: None)
    try:
        with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
            if name in NO_SCORE:
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
            print(f"\n  {name}: {scores.stats['path']}, {scores.stats['reason']}", end="")
            for impl in ("tree", "padded", "alone"):
                try:
                    scores = sk.score_prompts(model, cache, impl=impl, max_tokens=64)
                except RuntimeError as error:
                    assert str(error).startswith(f"impl={impl!r}: ")
                else:
                    assert per_token_error(scores, plain) < TOLERANCE, (name, impl)
    finally:
        undo()


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": torch.nn.DataParallel,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("how", ["hook", "forward"])
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
    for impl in ("auto", "padded", "alone"):
        scores = sk.score_prompts(model, cache, impl=impl)
        assert per_token_error(scores, moved) < TOLERANCE and scores.stats["path"] == "alone"
    assert sk.verify(model, cache, cells=2).path == "alone"


def test_padding_that_only_a_middle_cell_has_is_looked_at():
    draw = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(5, 290, (count,), generator=draw).tolist()

    job = sk.ResponseCache.from_token_ids([[ids(n) for n in (70, 50, 46, 20)]], [ids(3) for _ in range(4)])
    model = build("qwen3")
    model.model.layers[1].mlp = torch.nn.Sequential(
        model.model.layers[1].mlp, torch.nn.AvgPool2d((9, 1), stride=1, padding=(4, 0))
    )
    for impl in ("auto", "padded"):
        assert (
            per_token_error(sk.score_prompts(model, job, impl=impl, max_tokens=120), plain_nll(model, job)) < TOLERANCE
        )


@pytest.mark.parametrize("impl", ["auto", "padded", "alone"])
def test_a_layer_that_looks_at_its_batch_is_found(impl):
    """PEFT's Lily routes by the mean over the batch; only cells with company in theirs show it."""
    peft = pytest.importorskip("peft")
    draw = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(5, 290, (count,), generator=draw).tolist()

    job = sk.ResponseCache.from_token_ids([[ids(n) for n in (60, 50, 50, 20)]], [ids(3) for _ in range(4)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(build("qwen3"), peft.LilyConfig(target_modules=["q_proj"], r=4))
        for name, weight in model.named_parameters():
            if "lily" in name:
                torch.nn.init.normal_(weight, std=0.3)
    for max_tokens in (110, 4096):
        scores = sk.score_prompts(model, job, impl=impl, max_tokens=max_tokens)
        assert per_token_error(scores, plain_nll(model, job)) < TOLERANCE


def test_code_that_comes_during_a_race_is_seen(monkeypatch):
    job, model = _many(), build("llama")
    add, rounds = race.RaceState.add, []

    def later(self, cells, nll):
        rounds.append(len(cells))
        if len(rounds) == 1:
            model.model.layers[1].register_forward_hook(lambda module, args, out: out + 1.0)
        return add(self, cells, nll)

    monkeypatch.setattr(race.RaceState, "add", later)
    scores = sk.score_prompts(model, job, race=sk.Race(delta=0.0), max_tokens=64)
    plain = plain_nll(model, job)
    assert scores.stats["path"] == "alone" and scores.scored.all()
    assert per_token_error(scores, plain) < TOLERANCE


def test_routers_are_not_asked_for_their_losses(cache):
    model = build("mixtral", output_router_logits=True)
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "tree" and model.config.output_router_logits
    assert per_token_error(scores, plain_nll(model, cache)) < TOLERANCE


def test_what_no_forward_calls_may_be_anybodys(cache):
    model = build("llama")
    model.generate = model.state_dict = model.loss_function = lambda *args, **kwargs: None
    assert sk.score_prompts(model, cache).stats["path"] == "tree"


@pytest.mark.parametrize("kind", ["mixed", "bare"])
def test_adapters_without_the_usual_wrapper(kind, cache):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        model = build("llama")
        model = (
            peft.get_peft_model(model, config, mixed=True) if kind == "mixed" else peft.LoraModel(model, config, "a")
        )
    scores = sk.score_prompts(model, cache)
    assert scores.stats["path"] == "tree"
    assert per_token_error(scores, plain_nll(model, cache)) < TOLERANCE


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
    assert len(few.lengths) < score.TWO_CHECKS
    sk.score_prompts(build("qwen3"), few)
    assert len(plain_forwards) == 1


def test_a_race_verifies_its_first_round_and_whatever_is_longer(plain_forwards):
    job = _many()
    model = build("llama")
    scores = sk.score_prompts(model, job, race=sk.Race())
    assert scores.stats["verified"] and len(plain_forwards) == len(scores.stats["verified"])
    longest = np.where(scores.scored.flatten().numpy(), job.lengths, 0).argmax()
    assert job.cell_name(int(longest)) in scores.stats["verified"]


def _many() -> sk.ResponseCache:
    draw = torch.Generator().manual_seed(1)

    def ids(count):
        return torch.randint(5, 290, (count,), generator=draw).tolist()

    prompts, inputs = [ids(n) for n in (4, 9, 6)], [ids(4 + n) for n in torch.randperm(40, generator=draw).tolist()]
    return sk.ResponseCache.from_token_ids([[p + given for given in inputs] for p in prompts], [ids(2) for _ in inputs])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.config.update({"rms_norm_eps": 0.1}),
        lambda model: model.set_attn_implementation("eager"),
        lambda model: model.model.layers[1].self_attn.__setattr__("scaling", 1.0),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.model.layers[0].register_forward_hook(print),
        lambda model: torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True),
    ],
    ids=["config", "attention", "attribute", "dtype", "hook", "quantised"],
)
def test_anything_new_is_another_fingerprint(change):
    model = build("qwen3")

    def number():
        return fingerprint.fingerprint(model, torch.device("cpu"), fingerprint.configurations(model), "auto")

    before = number()
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    assert number() == before, "training does not change it"
    with torch.autocast("cpu", torch.bfloat16):
        assert number() != before
    change(model)
    assert number() != before


def test_another_adapter_is_another_fingerprint():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("qwen3"), peft.LoraConfig(target_modules=["q_proj"]))
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    found = []
    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        found.append(fingerprint.fingerprint(model, torch.device("cpu"), [], "auto"))
    with model.disable_adapter():
        found.append(fingerprint.fingerprint(model, torch.device("cpu"), [], "auto"))
    assert len(set(found)) == 3


def test_what_is_remembered_dies_with_its_model(cache):
    model = build("qwen3")
    sk.score_prompts(model, cache)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_that_are_not_finite_are_not_remembered(cache, caplog):
    model = build("qwen3")
    good = model.lm_head.weight[7].clone()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with caplog.at_level(logging.WARNING, logger="sapo_kernels"):
        scores = sk.score_prompts(model, cache)
    assert scores.nonfinite == [0, 1, 2] and "not finite: nothing can be verified" in caplog.text
    with torch.no_grad():
        model.lm_head.weight[7] = good
    assert sk.score_prompts(model, cache).stats["path"] == "tree"


# Whose code it is.


@functools.wraps(torch.nn.functional.silu)
def disguised(x):
    return x


class Callable:
    def __call__(self, module, args, out):
        return out


@pytest.mark.parametrize(
    "code",
    [
        lambda *a: None, disguised, functools.partial(disguised), functools.partial(functools.partial, disguised),
        Callable(), Callable().__call__, torch.no_grad()(lambda *a: None), torch.compile(disguised, backend="eager"),
        print, torch.autocast("cpu")(disguised),
    ],
)  # fmt: skip
def test_code_of_the_users_own_is_found_behind_any_wrapper(code):
    model = build("qwen3")
    model.model.layers[1].mlp.register_forward_hook(code)
    assert "a forward hook of 'model.layers.1.mlp'" in foreign_code.foreign_code(model, [])


def test_code_of_libraries_is_not_foreign(cache):
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

    accelerate.hooks.add_hook_to_module(inner.model.layers[1], Own())
    assert "accelerate's hook of 'base_model.model.model.layers.1'" in foreign_code.foreign_code(model, [])


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


# The check itself, with faults planted in what it checks and in itself.

FAULTS = {
    "keys of the next token": ("sapo_kernels.scoring.decoder.tree_attention",
                               lambda f: lambda q, k, v, plan, **kw: f(q, k.roll(1, 0), v, plan, **kw)),
    "another scale": ("sapo_kernels.scoring.decoder.tree_attention",
                      lambda f: lambda q, k, v, plan, **kw: f(q, k, v, plan, **{**kw, "scale": 0.4})),
    "the next row": ("sapo_kernels.scoring.head.Batch.of_pass",
                     lambda f: lambda plan, checks=(): dataclasses.replace(f(plan, checks), rows=plan.rows.roll(1))),
    "another target": ("sapo_kernels.scoring.head.HeadReader._project",
                       lambda f: lambda self, rows, targets, counts: f(self, rows, targets.roll(1), counts)),
    "sums of other cells": ("sapo_kernels.scoring.paths.CellSums.nll", lambda f: lambda self: np.roll(f(self), 1)),
    "a head's scale": ("sapo_kernels.scoring.paths.HeadReader.logits", lambda f: lambda self, h: 1.01 * f(self, h)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_our_own_is_found(name, dtype, cache, monkeypatch):
    """Whatever of the tree path is wrong, the call takes another path or says so."""
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


def test_a_sum_that_is_not_that_of_the_rows_is_found():
    check = check_of(torch.zeros(4, 9))
    check.judge_sum(1.0 + 3e-4)
    for nll in (1.001, float("nan"), float("inf")):
        with pytest.raises(verification.Disagreement, match="its loss is"):
            check.judge_sum(nll)


def test_a_row_that_nobody_compared_is_an_error(cache, monkeypatch):
    monkeypatch.setattr(paths, "_in_pass", lambda trie, step, rows: [])
    with pytest.raises(RuntimeError, match="impl='tree': .* expected all of its rows to be compared"):
        sk.score_prompts(build("llama"), cache, impl="tree")


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "gpt2", "deepseek_v3"])
def test_the_error_of_low_precision_is_measured_as_a_float32_copy_would(name, cache):
    """The same forward with every operation in float32: bit for bit that of the model's copy in float32."""
    model = build(name, dtype=torch.bfloat16).eval()
    plain = verification.PlainModel(model, model, torch.device("cpu"), keep_rows=True)
    wide = verification.PlainModel(copy.deepcopy(model).float(), model, torch.device("cpu"), keep_rows=True)
    with torch.no_grad():
        low, _ = plain.score(cache, 3, 8)
        exact, _ = wide.score(cache, 3, 8)
        with verification._exact_products():
            assert torch.equal(plain.score(cache, 3, 8)[0], exact)
        assert low.dtype == torch.bfloat16
        square, largest = plain._noise(cache, 3)
    assert 0.0 < square < largest < 3.0


def test_kernels_that_know_low_precision_only_have_a_fixed_bound(cache, monkeypatch):
    model = build("llama", dtype=torch.bfloat16).eval()
    silu = torch.nn.functional.silu

    def only_low(x, inplace=False):
        if x.dtype == torch.float32:
            raise RuntimeError("bfloat16 only")
        return silu(x)

    monkeypatch.setattr(torch.nn.functional, "silu", only_low)
    plain = verification.PlainModel(model, model, torch.device("cpu"), keep_rows=True)
    with torch.no_grad():
        low, _ = plain.score(cache, 3, 8)
        monkeypatch.setattr(verification._InFloat32, "__torch_dispatch__", lambda *a, **k: 1 / 0)
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
