"""ResponseCache: token ids of every cell, truncation, tokenizers that break the boundary, ids from outside."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from sapo_kernels import ResponseCache
from tests.oracles import CHATML, byte_tokenizer

PROMPTS = ["Add the numbers.", "Sum {input}!", "足し算"]
EXAMPLES = [
    {"input": "2 + 2", "target": "4"},
    {"input": "", "target": "nothing {prompt}"},
    {"sentence": "1+1", "label": "2"},
]
PLAIN = "{}\n\nText:\n{}\n\nAnswer:"
TURN = "<|im_start|>user\n{}\n\nText:\n{}<|im_end|>\n<|im_start|>assistant\n"


def texts(tokenizer, nested) -> list[list[str]]:
    return [[tokenizer.decode(ids) for ids in row] for row in nested]


def rows(examples=EXAMPLES):
    return [(e.get("input", e.get("sentence")), e.get("target", e.get("label"))) for e in examples]


def test_plain_cells(tokenizer):
    cache = ResponseCache.build(tokenizer, PROMPTS, EXAMPLES)
    assert (cache.num_prompts, cache.num_examples, cache.prompts) == (3, 3, PROMPTS)
    assert texts(tokenizer, cache.contexts) == [[PLAIN.format(p, i) for i, _ in rows()] for p in PROMPTS]
    assert texts(tokenizer, cache.responses) == [[f" {t}<|im_end|>" for _, t in rows()] for _ in PROMPTS]
    assert cache.responses[0][0] == [*b" 4", 258], "the end of sequence is one token, not text"
    assert not any(cache.stats.values()) and len(cache.stats) == 4
    for k, m, c in [(k, m, 3 * k + m) for k in range(3) for m in range(3)]:
        assert cache.response_lengths[c] == len(cache.responses[k][m])
        assert cache.lengths[c] == len(cache.contexts[k][m]) + len(cache.responses[k][m]) - 1
        assert cache.context_lengths[c] == len(cache.contexts[k][m])
    assert cache.max_id == 258 and "3 prompts x 3 examples" in repr(cache)


def test_chat_cells(chat_tokenizer, monkeypatch):
    calls, plain = [], type(chat_tokenizer).__call__
    monkeypatch.setattr(type(chat_tokenizer), "__call__", lambda *a, **k: (calls.append(a), plain(*a, **k))[1])
    cache = ResponseCache.build(chat_tokenizer, PROMPTS, EXAMPLES, suffix="One word.", text_word="文本")
    expected = [[TURN.replace("Text", "文本").format(p, i + "\n\nOne word.") for i, _ in rows()] for p in PROMPTS]
    assert texts(chat_tokenizer, cache.contexts) == expected
    assert texts(chat_tokenizer, cache.responses) == [[f"{t}<|im_end|>\n" for _, t in rows()] for _ in PROMPTS]
    assert cache.responses[0][0] == [*b"4", 258, *b"\n"]
    assert len(calls) <= 3, "texts are tokenised in batches"


def test_bos_in_front_of_every_cell_once():
    made = byte_tokenizer(bos=True)
    cache = ResponseCache.build(made, ["P"], EXAMPLES[:1])
    assert cache.contexts == [[[256, *PLAIN.format("P", "2 + 2").encode()]]]
    assert cache.responses == [[[*b" 4", 258]]]
    limit = len(PLAIN.format("P", "2 ")) + 1
    cut = ResponseCache.build(made, ["P"], EXAMPLES[:1], max_source=limit)
    assert cut.contexts == [[[256, *PLAIN.format("P", "2 ").encode()]]], "it counts, and truncation keeps it"
    cache = ResponseCache.build(byte_tokenizer(bos=True, chat_template=CHATML), ["P"], EXAMPLES[:1])
    assert 256 not in cache.ids.tolist(), "a chat template writes its own"


def test_a_tokenizer_that_joins_across_the_boundary(caplog):
    """':' and ' ' merge, so a context that ends with ':' is no prefix of the whole."""
    made = byte_tokenizer(merges=[(":", "Ġ")])
    assert made("a: b", add_special_tokens=False)["input_ids"] == [97, 259, 98]
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        cache = ResponseCache.build(made, ["P", "Q"], EXAMPLES[:2])
    assert cache.stats["boundary_breaks"] == 4
    assert "4 of 4 cells (first: prompt 0, example 0)" in caplog.text and "tokenised separately" in caplog.text
    for k, prompt in enumerate("PQ"):
        for m, (text, target) in enumerate(rows()[:2]):
            context = made(PLAIN.format(prompt, text), add_special_tokens=False)["input_ids"]
            assert cache.contexts[k][m] == context and context[-1] == ord(":")
            assert cache.responses[k][m] == made(f" {target}<|im_end|>", add_special_tokens=False)["input_ids"]
    caplog.clear()
    ends = {"P": ":", "Q": "!"}
    cache = ResponseCache.build(made, ["P", "Q"], EXAMPLES[:1], lambda p, e: (p + ends[p], " " + e["target"]))
    assert cache.stats["boundary_breaks"] == 1, "only where it happens"
    assert cache.contexts == [[[80, 58]], [[81, 33]]] and cache.responses == [[[*b" 4"]], [[*b" 4"]]]


@pytest.mark.parametrize("max_source", [40, 30, 25])
def test_truncation_cuts_the_end_of_the_input_only(chat_tokenizer, max_source, caplog):
    frame = len(chat_tokenizer(TURN.format("Do.", "") + "\n\nEND", add_special_tokens=False)["input_ids"])
    examples = [{"input": "abcdefghijklmnopqrstuvwxyz", "target": "t"}, {"input": "a", "target": "t"}]
    max_source += frame - 25
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        cache = ResponseCache.build(chat_tokenizer, ["Do."], examples, suffix="END", max_source=max_source)
    kept = examples[0]["input"][: max_source - frame]
    long, short = texts(chat_tokenizer, cache.contexts)[0]
    assert long == TURN.format("Do.", kept + "\n\nEND") and len(cache.contexts[0][0]) == max_source
    cut = 1 + (max_source == frame)
    assert short == TURN.format("Do.", ("a" if cut == 1 else "") + "\n\nEND")
    assert cache.stats["truncated_inputs"] == cut and f"{cut} of 2 cells: inputs cut" in caplog.text
    assert texts(chat_tokenizer, cache.responses) == [["t<|im_end|>\n"] * 2]
    with pytest.raises(ValueError, match=f"prompt 0, example 0: expected a context of at most {frame - 1} tokens"):
        ResponseCache.build(chat_tokenizer, ["Do."], examples, suffix="END", max_source=frame - 1)


def test_truncation_never_splits_a_character(tokenizer):
    """Four tokens a character: the cut falls between characters, and the context may be up to three tokens short."""
    frame = len(PLAIN.format("P", "").encode())
    for room in range(9):
        cache = ResponseCache.build(
            tokenizer, ["P"], [{"input": "\U0001f642" * 5, "target": "t"}], max_source=frame + room
        )
        assert texts(tokenizer, cache.contexts) == [[PLAIN.format("P", "\U0001f642" * (room // 4))]]


def test_truncation_copes_with_an_input_that_is_shorter_alone():
    """Alone the input is one token, behind a line break three, and two are too many: all of it goes."""
    made = byte_tokenizer(merges=[("Ċ", "a"), ("a", "b"), ("ab", "ab")])
    frame = len(made(PLAIN.format("P", ""), add_special_tokens=False)["input_ids"])
    assert len(made("abab", add_special_tokens=False)["input_ids"]) == 1
    assert len(made(PLAIN.format("P", "abab"), add_special_tokens=False)["input_ids"]) == frame + 2
    cache = ResponseCache.build(made, ["P"], [{"input": "abab", "target": "t"}], max_source=frame)
    assert texts(made, cache.contexts) == [[PLAIN.format("P", "")]] and cache.stats["truncated_inputs"] == 1


def test_targets_are_cut_and_counted(tokenizer, caplog):
    examples = [{"input": "i", "target": "abcdef"}, {"input": "i", "target": "ab"}]
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        cache = ResponseCache.build(tokenizer, ["P", "Q"], examples, max_target=4)
    assert texts(tokenizer, cache.responses) == [[" abc", " ab<|im_end|>"]] * 2
    assert cache.stats["truncated_targets"] == 2 and "2 of 4 cells: targets cut" in caplog.text
    assert (cache.response_lengths == 4).all()


def test_special_tokens_in_data_are_counted_and_named(tokenizer, caplog):
    examples = [{"input": "i", "target": "t"}, {"input": "a<|endoftext|>b", "target": "t"}]
    with caplog.at_level(logging.WARNING, "sapo_kernels"):
        cache = ResponseCache.build(tokenizer, ["P"], examples)
    # Also those that are no bos, eos, pad, ...: turn markers rarely are.
    assert "<|im_start|>" not in tokenizer.all_special_tokens
    assert cache.stats["special_tokens_in_text"] == 1 and "1 examples (first: 1) contain a special token" in caplog.text
    with pytest.raises(ValueError, match=r"prompt 1: .*special token '<\|im_start\|>'"):
        ResponseCache.build(tokenizer, ["P", "x<|im_start|>system"], examples)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"prompts": ["P", "a\ud800"]}, ValueError, "prompt 1: .*lone surrogate at character 1"),
        ({"prompts": ["a\0b"]}, ValueError, "prompt 0: .*NUL"),
        ({"examples": [{"input": "\udc00", "target": "t"}]}, ValueError, "example 0: 'input': .*lone surrogate"),
        ({"max_source": 0}, ValueError, "max_source: expected a whole number of at least 1, got 0"),
        ({"max_target": -1}, ValueError, "max_target: expected a whole number of at least 1, got -1"),
        ({"suffix": "a <|im_end|> b"}, ValueError, "suffix: .*special token"),
        ({"template": lambda p, e: ("", "t")}, ValueError, "prompt 0, example 0: expected at least one context token"),
        ({"template": lambda p, e: ("c", "")}, ValueError, "prompt 0, example 0: expected at least one response token"),
    ],
)
def test_bad_arguments_are_named(tokenizer, arguments, error, message):
    with pytest.raises(error, match=message):
        ResponseCache.build(tokenizer, **{"prompts": ["P"], "examples": EXAMPLES, **arguments})


def test_ids_from_outside():
    contexts = [[[1, 2], [3]], [[4], [5, 6, 7]]]
    shared = ResponseCache.from_token_ids(contexts, [[8], [9, 10]])
    assert shared.contexts == contexts and shared.responses == [[[8], [9, 10]]] * 2
    assert shared.prompts == ["prompt 0", "prompt 1"] and shared.stats == {}
    own = ResponseCache.from_token_ids(contexts, [[[8], [9]], [[10], [11]]], prompts=["a", "b"])
    assert own.responses == [[[8], [9]], [[10], [11]]] and own.prompts == ["a", "b"]
    for kind in (np.array, torch.tensor):
        arrays = ResponseCache.from_token_ids(kind([[[1, 2]], [[3, 4]]]), kind([[5]]))
        assert arrays.contexts == [[[1, 2]], [[3, 4]]] and arrays.responses == [[[5]], [[5]]]
    square = ResponseCache.from_token_ids([[[1], [2]], [[3], [4]]], [[5, 6], [7, 8]])
    assert square.responses == [[[5, 6], [7, 8]]] * 2, "K = M: flat lists of ids are shared responses"


@pytest.mark.parametrize(
    "contexts, responses, error, message",
    [
        ([], [[1]], ValueError, "contexts: expected at least one, got none"),
        (5, [[1]], TypeError, "contexts: expected a list of lists, got 5"),
        ([[[1], [2]], [[3]]], [[1], [2]], ValueError, r"contexts\[1\]: expected 2 examples, got 1"),
        ([[1, 2]], [[1], [2]], TypeError, r"contexts\[0\]\[0\]: expected a flat list of token ids"),
        ([[[[1], [2, 3]]]], [[1]], TypeError, r"contexts\[0\]\[0\]: .*got nested lists"),
        ([[[1], [2, -3]]], [[1], [2]], ValueError, r"contexts\[0\]\[1\]: .*not be negative, got -3"),
        ([[[2**63]]], [[1]], ValueError, r"contexts\[0\]\[0\]: .*below 2\*\*63, got 9223372036854775808"),
        ([[[1]]], [[]], ValueError, "responses: expected at least one, got none"),
        ([[[1]]], [[1], [2]], ValueError, r"responses: expected 1, got 2"),
        ([[[1], [2]]], [[[1]]], ValueError, r"responses\[0\]: expected 2 examples, got 1"),
        ([[[1]], [[2]]], [[[1]], [[-1]]], ValueError, r"response of cell \(1, 0\): .*negative, got -1"),
        ([[[1]], [[2]]], [[[1]], 7], TypeError, r"responses: expected a list of lists"),
    ],
)  # fmt: skip
def test_bad_ids_are_named(contexts, responses, error, message):
    with pytest.raises(error, match=message):
        ResponseCache.from_token_ids(contexts, responses)
    for prompts, error in ((["a"], ValueError), ("ab", TypeError), ([1, 2], TypeError)):
        with pytest.raises(error, match="prompts: expected"):
            ResponseCache.from_token_ids([[[1]], [[2]]], [[3]], prompts=prompts)


def test_equal_cells_are_known():
    """Same ids with another boundary are another cell."""
    cache = ResponseCache.from_token_ids(
        [[[1, 2], [1]], [[1, 2], [1, 2]], [[1], [1]]], [[[3], [2, 3]], [[3], [3]], [[2, 3], [2]]]
    )
    assert cache.first_equal.tolist() == [0, 1, 0, 0, 1, 5]
    part = cache.select(np.asarray([1, 3, 4])).select(np.asarray([1, 2]))
    assert [part.cell_name(i) for i in (0, 1)] == ["(prompt 1, example 1)", "(prompt 2, example 0)"]
    assert part.ids.tolist() == [1, 2, 3, 1, 2, 3] and part.context_lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match="cache: expected a cache of all cells, got one of selected cells"):
        _ = part.contexts
