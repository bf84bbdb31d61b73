"""score_prompts against the plain loop, on every path, and what it does on every kind of trouble."""

from __future__ import annotations

import io
import logging
import sys

import numpy as np
import pytest
import torch

import sapo_kernels as sk
from sapo_kernels.scoring import decoder, head, paths
from sapo_kernels.scoring.cell_sums import CellSums
from sapo_kernels.scoring.progress import Progress
from tests.families import plain_nll
from tests.oracles import byte_tokenizer, small_qwen3
from tests.scoring.ranks_child import cache_of
from tests.tolerances import assert_close

PROMPTS = ["Say yes or no.", "Answer: is it true?", "Is the text right? Say yes or no."]
EXAMPLES = [
    {"input": "2 + 2 = 4", "target": "yes"},
    {"input": "2 + 2 = 5, they say, and who are we to disagree with them", "target": "no"},
    {"input": "", "target": "yes and no"},
    {"input": "2 + 2 = 4", "target": "y"},
]


def few(seed: int) -> sk.ResponseCache:
    return cache_of(seed, 3, 3, vocabulary=200)


def assert_right(model, cache, scores):
    expected = plain_nll(model, cache)
    assert_close("token nll", scores.nll, expected)
    assert scores.tokens.flatten().tolist() == cache.response_lengths.tolist()
    assert_close("mean loss", scores.loss, expected.sum(1) / scores.tokens.sum(1))
    assert scores.nll.dtype == torch.float64 and scores.nll.device.type == "cpu"


@pytest.fixture
def cache(chat_tokenizer):
    return sk.ResponseCache.build(chat_tokenizer, PROMPTS, EXAMPLES)


@pytest.mark.parametrize(("impl", "max_tokens"), [
    ("auto", 1), ("auto", 7), ("auto", None), ("tree", 64), ("sdpa", 7), ("reference", 64), ("reference", None),
    ("padded", 1), ("padded", 64), ("padded", None),
])  # fmt: skip
def test_equals_the_plain_loop(tiny_model, cache, impl, max_tokens):
    if max_tokens == 1:  # one forward for each token, or each cell: a smaller job
        cache = sk.ResponseCache.from_token_ids([[[5, 6, 7]], [[5, 8]]], [[9, 10, 11]])
    scores = sk.score_prompts(tiny_model, cache, impl=impl, max_tokens=max_tokens)
    assert_right(tiny_model, cache, scores)
    path = "padded" if impl == "padded" else "tree"
    assert (scores.stats["path"], scores.stats["impl"], scores.stats["reason"]) == (path, impl, None)
    assert scores.stats["dense_tokens"] == cache.lengths.sum() and scores.stats["seconds"] > 0
    assert (scores.stats["trie_tokens"] < scores.stats["dense_tokens"]) == (path == "tree")


def test_prompts_and_examples_in_one_call(tiny_model, tokenizer):
    options = {"suffix": "yes or no?", "text_word": "文本", "max_source": 60, "max_target": 4}
    cache = sk.ResponseCache.build(tokenizer, PROMPTS, EXAMPLES, "{input}|{prompt}", **options)
    scores = sk.score_prompts(
        tiny_model, PROMPTS, EXAMPLES, tokenizer=tokenizer, template="{input}|{prompt}", **options
    )
    assert_right(tiny_model, cache, scores)
    assert scores.prompts == PROMPTS and scores.stats["truncated_targets"] == cache.stats["truncated_targets"] > 0
    assert scores.best == int(scores.loss.argmin())


@pytest.mark.parametrize(("impl", "max_tokens"), [("auto", 64), ("auto", None), ("padded", 300)])
def test_equal_prompts_get_equal_bits(tokenizer, impl, max_tokens):
    """Whatever batch they would fall into: a matrix product of another shape rounds in another way."""
    model = small_qwen3(hidden_size=128, head_dim=32)
    prompts = [PROMPTS[2], *[PROMPTS[0]] * 6, *[PROMPTS[1]] * 6]
    cache = sk.ResponseCache.build(tokenizer, prompts, EXAMPLES)
    scores = sk.score_prompts(model, cache, impl=impl, max_tokens=max_tokens)
    assert_right(model, cache, scores)
    for first, last in ((1, 7), (7, 13)):
        assert all(torch.equal(scores.nll[first], scores.nll[k]) for k in range(first, last))
    assert scores.best == prompts.index(prompts[scores.best])


def test_one_context_many_responses(tiny_model):
    """Several targets a row, responses that begin alike, responses that are a prefix of another."""
    responses = [[9, 8, 7], [9, 8, 6], [9, 8], [9], [3, 9, 8, 7], [9, 8, 7]]
    cache = sk.ResponseCache.from_token_ids([[[1, 2, 3]] * 6, [[4, 2]] * 6], responses)
    scores = sk.score_prompts(tiny_model, cache)
    assert_right(tiny_model, cache, scores)
    # 1 2 3 | 9 8 | 3 9 8 and 4 2 | 9 8 | 3 9 8: what ends a response is predicted, not read.
    assert scores.stats["trie_tokens"] == 3 + 2 + 3 + 2 + 2 + 3
    assert torch.equal(scores.nll[:, 0], scores.nll[:, 5])


def test_scoring_again_plans_nothing(tiny_model, cache, monkeypatch):
    first = sk.score_prompts(tiny_model, cache, max_tokens=64)
    monkeypatch.setattr("sapo_kernels.scoring.response_cache.plan_trie", None)
    monkeypatch.setattr(sk.TokenTrie, "passes", None)
    assert torch.equal(first.nll, sk.score_prompts(tiny_model, cache, max_tokens=64).nll)
    with torch.no_grad():
        tiny_model.lm_head.weight.mul_(0.5)
    changed = sk.score_prompts(tiny_model, cache, max_tokens=64)
    assert_right(tiny_model, cache, changed)
    assert (changed.nll - first.nll).abs().min() > 1e-3


@pytest.mark.parametrize(("impl", "letter"), [("auto", "J"), ("reference", "O"), ("padded", "J")])
def test_nan_stays_with_the_prompt_that_has_it(tiny_model, tokenizer, letter, impl, caplog):
    """One row of the embedding is NaN and one prompt uses it; so is id 0, with which batches are filled up."""
    prompts = ["Say yes or no.", f"{letter}udge: yes or no?", "Yes or no?"]
    cache = sk.ResponseCache.build(tokenizer, prompts, EXAMPLES)
    good = sk.score_prompts(tiny_model, cache)
    with torch.no_grad():
        tiny_model.get_input_embeddings().weight[[0, ord(letter)]] = float("nan")
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(tiny_model, cache, impl=impl)
    assert scores.nonfinite == [1] and scores.nll[1].isnan().all()
    assert_close("token nll", scores.nll[[0, 2]], good.nll[[0, 2]])
    assert "prompt 1: 4 of 4 cells are not finite (first: example 0); it cannot be chosen" in caplog.text
    assert scores.best == min((0, 2), key=lambda k: float(good.loss[k])) and scores.ranking()[-1] == 1


def test_nan_everywhere_is_reported_and_never_chosen(tiny_model, cache, caplog):
    """And it is not remembered: with weights that are whole again the trie is taken."""
    good = tiny_model.lm_head.weight[3].clone()
    with torch.no_grad():
        tiny_model.lm_head.weight[3] = float("nan")
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(tiny_model, cache)
    assert scores.nonfinite == [0, 1, 2] and caplog.text.count("it cannot be chosen") == 3
    assert "not finite: nothing can be verified" in caplog.text
    with pytest.raises(ValueError, match="none of the 3 prompts has a finite loss"):
        _ = scores.best
    with torch.no_grad():
        tiny_model.lm_head.weight[3] = good
    scores = sk.score_prompts(tiny_model, cache)
    assert_right(tiny_model, cache, scores)
    assert scores.stats["path"] == "tree"


def out_of_memory_above(limit: int, plain, size):
    """`plain`, but as on a device on which only `limit` tokens or sequences fit."""

    def limited(*args):
        if size(*args) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory (staged)")
        return plain(*args)

    return limited


@pytest.mark.parametrize(("impl", "limit"), [("auto", 200), ("auto", 8), ("padded", 1)])
def test_a_pass_or_a_batch_that_does_not_fit_is_halved(tiny_model, cache, impl, limit, monkeypatch, caplog):
    expected = sk.score_prompts(tiny_model, cache, impl=impl)
    assert expected.stats["trie_tokens"] > 256
    run = out_of_memory_above(limit, decoder.TreeRunner.run, lambda runner, step, checks: len(step.input_ids))
    monkeypatch.setattr(decoder.TreeRunner, "run", run)
    padded = out_of_memory_above(limit, paths.run_padded, lambda model, reader, batch, device: len(batch.input_ids))
    monkeypatch.setattr(paths, "run_padded", padded)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(tiny_model, cache, impl=impl)
    assert "halving" in caplog.text
    assert_right(tiny_model, cache, scores)
    assert scores.stats["path"] == ("tree" if impl == "auto" else "padded")
    if impl == "auto":  # padding becomes less
        assert scores.stats["trie_tokens"] == expected.stats["trie_tokens"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_at_all_is_named(tiny_model, monkeypatch, error):
    cache = sk.ResponseCache.from_token_ids([[[1, 2]], [[3, 4, 5, 6]]], [[7, 8]])
    good = sk.score_prompts(tiny_model, cache)

    def fail(*args):
        raise error

    monkeypatch.setattr(decoder.TreeRunner, "run", fail)
    monkeypatch.setattr(paths, "run_padded", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"cell \(prompt 0, example 0\): does not fit"):
        sk.score_prompts(tiny_model, cache)
    with pytest.raises(torch.OutOfMemoryError, match=r"cell \(prompt 1, example 0\): .*even in a batch of its own"):
        sk.score_prompts(tiny_model, cache, impl="padded")
    monkeypatch.undo()
    assert torch.equal(sk.score_prompts(tiny_model, cache).nll, good.nll)


@pytest.mark.parametrize("rows", [1, 10])
def test_rows_of_several_passes_wait_for_each_other(tiny_model, cache, rows, monkeypatch):
    """However many rows the head reads at once, and also where it runs out of memory on the way."""
    project, calls = head.HeadReader._project, []

    def fail_twice(self, some, targets, counts):
        calls.append(len(targets))
        if len(targets) and sum(map(bool, calls)) in (1, 3):
            raise torch.OutOfMemoryError("no memory left")
        return project(self, some, targets, counts)

    sk.score_prompts(tiny_model, cache)  # verified
    monkeypatch.setattr(head, "chunk_rows", lambda *_: rows)
    monkeypatch.setattr(head.HeadReader, "_project", fail_twice)
    assert_right(tiny_model, cache, sk.score_prompts(tiny_model, cache, max_tokens=16))
    assert len([n for n in calls if n]) > 5


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"impl": "flash"}, ValueError, "impl: expected one of .*got 'flash'"),
        ({"max_tokens": 0}, ValueError, "max_tokens: expected a whole number of at least 1, got 0"),
        ({"examples": EXAMPLES}, ValueError, "examples: expected none with"),
        ({"max_target": 3, "skip_empty": True}, ValueError, "max_target, skip_empty: expected none with"),
        ({"prompts": PROMPTS, "examples": EXAMPLES}, ValueError, "tokenizer: expected one"),
        ({"prompts": PROMPTS, "tokenizer": byte_tokenizer()}, ValueError, "examples: .*an empty list"),
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "model: expected a transformers causal LM .*got Linear"),
        ({"model": small_qwen3().to("meta")}, ValueError, "model: expected loaded weights, got .* meta device"),
        ({"fuse": True}, ValueError, "fuse: expected 'auto' or False, got True"),
        ({"race": 0.05}, TypeError, "race: expected a Race or None, got float"),
    ],
)
def test_bad_arguments_are_named(tiny_model, cache, arguments, error, message):
    with pytest.raises(error, match=message):
        sk.score_prompts(**{"model": tiny_model, "prompts": cache, **arguments})


@pytest.mark.parametrize("where", ["context", "response"])
def test_ids_outside_the_vocabulary_name_the_cell(tiny_model, where):
    contexts, responses = [[[1], [2]], [[3], [4, 5]]], [[[6], [7]], [[8], [9]]]
    (contexts if where == "context" else responses)[1][1][-1] = 259
    cache = sk.ResponseCache.from_token_ids(contexts, responses)
    message = r"cell \(prompt 1, example 1\): .*below the model's vocabulary of 259, got 259"
    with pytest.raises(ValueError, match=message):
        sk.score_prompts(tiny_model, cache)


def test_examples_without_a_target_can_be_skipped(tiny_model, tokenizer, caplog):
    examples = [EXAMPLES[0], {"input": "a", "target": " "}, EXAMPLES[1], {"sentence": "b", "label": ""}]
    with pytest.raises(ValueError, match="example 1: expected a target, got an empty string"):
        sk.score_prompts(tiny_model, PROMPTS, examples, tokenizer=tokenizer)
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        scores = sk.score_prompts(tiny_model, PROMPTS, examples, tokenizer=tokenizer, skip_empty=True)
    assert caplog.messages == ["2 examples (first: 1) have an empty target and were skipped"]
    assert scores.stats["skipped_examples"] == [1, 3] and scores.nonfinite == []
    assert scores.tokens[:, [1, 3]].eq(0).all() and scores.nll[:, [1, 3]].isnan().all()
    kept = sk.score_prompts(tiny_model, PROMPTS, examples[::2], tokenizer=tokenizer)
    assert torch.equal(scores.nll[:, ::2], kept.nll) and scores.ranking() == kept.ranking()
    with pytest.raises(ValueError, match="examples: expected at least one, got an empty list"):
        sk.score_prompts(tiny_model, PROMPTS, examples[1::2], tokenizer=tokenizer, skip_empty=True)


def test_learned_positions_that_do_not_suffice_name_the_cell():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    fits = sk.ResponseCache.from_token_ids([[[1]], [list(range(13))]], [[7, 8, 9]])
    assert_right(model, fits, sk.score_prompts(model, fits))
    long = sk.ResponseCache.from_token_ids([[[1]], [list(range(14))]], [[7, 8, 9]])
    with pytest.raises(ValueError, match=r"cell \(prompt 1, example 0\): GPT2LMHeadModel has 16 .* needs 17"):
        sk.score_prompts(model, long)


def test_log_probabilities_that_come_twice_are_refused():
    """Too many would move all that come after them to other cells, and every cell would still have its number."""
    for pieces, message in (
        ([3, 2], None),
        ([3, 3], "expected 5 log-probabilities, got 6"),
        ([3], "cell 1: expected 3"),
    ):
        sums = CellSums(np.asarray([0, 1, 2, 3, 4]), np.asarray([0, 2, 5]))
        for piece in pieces:
            sums.add(torch.full((piece,), -1.0))
        if message is None:
            assert sums.nll().tolist() == [2.0, 3.0]
        else:
            with pytest.raises(RuntimeError, match=message):
                sums.nll()


def test_the_bar_is_quiet_unless_on_a_terminal(tiny_model, monkeypatch, capsys, caplog):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    cache = few(3)
    with caplog.at_level(logging.WARNING):
        for progress in (None, False):
            sk.score_prompts(tiny_model, cache, progress=progress)
    assert capsys.readouterr() == ("", "") and not caplog.records
    sk.score_prompts(tiny_model, cache, progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "scoring" in shown.err and "/9" in shown.err
    for progress, visible in ((None, True), (False, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        sk.score_prompts(tiny_model, cache, progress=progress)
        assert ("scoring" in terminal.getvalue()) == visible
    monkeypatch.setattr(sys, "stderr", None)  # a window without a console
    assert_right(tiny_model, cache, sk.score_prompts(tiny_model, cache))


def test_the_bar_counts_cells_and_tokens(capsys):
    for total, saved in ((40, True), (None, False)):
        with Progress(9, 100, total, True) as bar:
            bar.update(3, 10)
            bar.update(8, 30)
            assert bar.bar.n == 8 and bar.bar.total == 9
            assert "tokens/s" in bar.bar.postfix and ("saved=60%" in bar.bar.postfix) == saved


def test_a_function_is_told_each_round_from_its_beginning(tiny_model):
    told = []
    scores = sk.score_prompts(tiny_model, few(3), progress=lambda cells, tokens: told.append((cells, tokens)))
    assert told[0] == (0, 0) and told[-1] == (9, scores.stats["trie_tokens"])
    told.clear()
    scores = sk.score_prompts(tiny_model, few(3), race=sk.Race(), progress=lambda cells, tokens: told.append(cells))
    rounds = [i for i, cells in enumerate(told) if cells == 0] + [len(told)]
    assert sum(told[stop - 1] for stop in rounds[1:]) == scores.race.cells
