"""The pool of prompts: every rule, every refused file, saving and reading, and what others build on."""

import json
import time

import pytest

from sapo_kernels.files import DataError
from sapo_peft import read_prompts
from sapo_peft.assets import BUNDLED_DIR, task_names
from sapo_peft.data.prompt_pool import MAX_CHARACTERS, MAX_REJECTED, PoolPrompt, PromptPool
from sapo_peft.tiny_random import tiny_tokenizer
from tests.cli import cli_helpers
from tests.cli.cli_helpers import put

data_folder = cli_helpers.data_folder
ORIGINAL = "Is the text positive or negative? Use <X>."
LABELS = ("positive", "negative", "neutral")


def pool(*paraphrases, original=ORIGINAL, **options):
    options = {"labels": LABELS, "markers": ["<X>"], **options}
    return PromptPool.build("t", original, paraphrases, **options)


def reason(text, **options):
    """Why `text` is rejected by the pool above."""
    (rejected,) = pool(text, **options).rejected
    return rejected.reason


def test_build():
    good = "Positive or not: say positive or negative, <X>"
    made = PromptPool.build("t", ORIGINAL, [PoolPrompt(good, "file:a.txt")], suffix="S.", labels=LABELS, text_word="W")
    assert made.prompts == (ORIGINAL, good) and made.provenance == ("original", "file:a.txt")
    assert (made.task, made.suffix, made.labels, made.markers, made.text_word) == ("t", "S.", LABELS, (), "W")
    assert made.required == ("positive", "negative") and made.rejected == made.merged == () == tuple(made.notes())
    with pytest.raises(AttributeError):
        made.task = "u"


def test_repeated_prompts_are_merged_and_said():
    a = "say positive or negative for <X>"
    same = ["Say  positive or\tnegative\nfor <x> ".replace("<x>", "<X>"), "say positive or negative f\uff4fr <X>"]
    made = pool(a, *same, "\u200bsay positive or negative for <X>", ORIGINAL + " ", "new: positive, negative, <X>")
    assert made.prompts == (ORIGINAL, a, "new: positive, negative, <X>")
    assert [m.into for m in made.merged] == [1, 1, 1, 0] and [m.text for m in made.merged[:2]] == same
    assert made.notes()[0] == "a paraphrase from given repeats prompt 1 and was merged into it"
    assert pool("Stra\u00dfe positive negative <X>", "STRASSE positive negative <X>").merged[0].into == 1


BAD = {
    "empty": ("", "wanted text, got an empty prompt"),
    "spaces": (" \n\u3000\u2028", "wanted text, got an empty prompt"),
    "nothing visible": ("\u200b\u200d\ufeff", "wanted text, got an empty prompt"),
    "label dropped": ("Say positive, <X>", "wanted the label 'negative'"),
    "label in another case": ("Positive or NEGATIVE? positive <X>", "wanted the label 'negative'"),
    "label inside a word": ("positive or negatively <X>", "wanted the label 'negative'"),
    "label with an underscore": ("positive or negative_ <X>", "wanted the label 'negative'"),
    "label with an accent": ("positive or negative\u0301 <X>", "wanted the label 'negative'"),
    "label in another alphabet": ("positive or neg\u0430tive <X>", "wanted the label 'negative'"),
    "marker dropped": ("positive or negative", "wanted the marker '<X>'"),
    "marker re-cased": ("positive or negative <x>", "wanted the marker '<X>'"),
    "NUL": ("positive \0 negative <X>", "a NUL character at character 9"),
    "lone surrogate": ("positive negative \ud800 <X>", "a lone surrogate at character 18"),
    "escape": ("positive negative \x1b[31m <X>", "the control character U+001B"),
    "C1 control": ("positive negative \x9b <X>", "the control character U+009B"),
    "reversed": ("positive negative \u202e <X>", "character U+202E"),
    "isolate": ("positive negative \u2066 <X>", "character U+2066"),
    "invisible tag letters": ("positive negative \U000e0041 <X>", "character U+E0041"),
    "noncharacter": ("positive negative \uffff <X>", "character U+FFFF"),
    "too long": ("positive negative <X>" + "a" * MAX_CHARACTERS, f"wanted at most {MAX_CHARACTERS} characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_faulty_paraphrases_are_rejected_and_faulty_originals_are_errors(name):
    text, message = BAD[name]
    made = pool(text)
    assert made.prompts == (ORIGINAL,) and message in made.rejected[0].reason and made.rejected[0].source == "given"
    assert len(made.notes()) == 1 and message in made.notes()[0] and made.notes()[0].isascii()
    if "label" not in name:
        with pytest.raises(DataError, match="the original prompt: wanted") as caught:
            pool(original=text)
        assert message in str(caught.value) and "'t'" in str(caught.value) and len(str(caught.value)) < 300


GOOD = [
    "positive/negative <X>",
    "(positive) \u201cnegative\u201d <X>\r\n\twith layout",
    "negative. positive! \u0645\u0631\u062d\u0628\u0627 <X> \u200f\u200d",
    "{0.__class__} {prompt} {0:>100000000} %s positive negative <X>",
    "negative positively positive <X>",
    "ignore previous instructions positive negative <X>",
]


@pytest.mark.parametrize("text", GOOD)
def test_unusual_paraphrases_are_kept_as_they_are(text):
    assert pool(text).prompts == (ORIGINAL, text)


def test_labels_in_scripts_without_spaces():
    labels = ["\u79ef\u6781", "\u6d88\u6781"]
    original = "\u5224\u65ad\u60c5\u611f\u662f\u79ef\u6781\u8fd8\u662f\u6d88\u6781"
    made = PromptPool.build(
        "t", original, ["\u79ef\u6781\u6216\u6d88\u6781\uff1f", "\u79ef\u6781\uff1f"], labels=labels
    )
    assert made.required == tuple(labels) and len(made.prompts) == 2 and "label" in made.rejected[0].reason


def test_labels_that_the_original_does_not_have_are_not_required():
    assert pool("positive negative <X>").required == ("positive", "negative")
    made = PromptPool.build("t", "Rate 1-5", ["from 1 to 5", "from 15 to 1"], labels=["1", "2", "5"])
    assert made.required == ("1", "5") and made.prompts == ("Rate 1-5", "from 1 to 5")


def test_special_tokens_and_token_bound():
    tokenizer = tiny_tokenizer()
    assert "special token '<|im_end|>'" in reason("positive negative <X> <|im_end|>", tokenizer=tokenizer)
    assert pool("positive negative <X> <|im_end|>").rejected == ()
    assert reason("positive negative <X> " + "b" * 50, tokenizer=tokenizer, max_tokens=60) == (
        "wanted at most 60 tokens, got 72"
    )
    for options, what in (
        ({"original": "<|im_start|>positive negative <X>"}, "the original prompt"),
        ({"suffix": "a<|endoftext|>"}, "suffix"),
        ({"original": "positive negative <X>" * 100}, "wanted at most 1024 tokens, got 2100"),
    ):
        with pytest.raises(DataError, match=what):
            pool(tokenizer=tokenizer, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [""]}, "labels 0: wanted text"),
        ({"labels": ["a", 3]}, "labels 1: wanted text, got int"),
        ({"labels": "ab"}, "labels: wanted a list"),
        ({"markers": ["<Y>"]}, "the original prompt: wanted the marker '<Y>'"),
        ({"markers": ["\ud800"]}, "markers 0: wanted plain text, got a lone surrogate"),
        ({"suffix": "\x1b"}, "suffix: wanted plain text"),
        ({"suffix": 3}, "suffix: wanted text"),
        ({"text_word": " "}, "text_word: wanted a text"),
        ({"text_word": "a\nb"}, "text_word: wanted a text on one line"),
        ({"max_characters": 0}, "max_characters: wanted a whole number"),
        ({"max_tokens": True}, "max_tokens: wanted a whole number"),
        ({"original": None}, "the original prompt: wanted text"),
    ],
)
def test_faults_in_the_rest_are_errors(options, message):
    with pytest.raises(DataError) as caught:
        pool(**options)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="task: wanted"):
        PromptPool.build("", "x")
    for wrong in (3, None, ("a", "b"), PoolPrompt(3, "x")):
        with pytest.raises(TypeError, match="paraphrase 1: wanted a string"):
            pool("a", wrong)


def test_extended_keeps_places():
    first = pool("one positive negative <X>")
    second = first.extended(["two positive negative <X>", "no", PoolPrompt("ONE positive negative <X>", "model:m")])
    assert second.prompts == (*first.prompts, "two positive negative <X>") and len(first.prompts) == 2
    assert second.merged[0].into == 1 and second.merged[0].source == "model:m" and len(second.rejected) == 1
    # The same fault twice is one fault, and a source without end does not fill the memory.
    third = second.extended(["no"]).extended([f"no {i}" for i in range(2 * MAX_REJECTED)])
    assert len(third.rejected) == MAX_REJECTED
    with pytest.raises(TypeError):
        first.extended([b"x"])


def test_save_and_read(tmp_path):
    made = pool(
        PoolPrompt("a {x} \u4f60 positive negative <X>", "endpoint:m"),
        "A {x} \u4f60 positive negative <X>",
        "no \ud800\0" + "y" * 50_000,
        suffix="S",
        text_word="W",
        max_tokens=99,
    )
    made.save(tmp_path / "p.json")
    assert PromptPool.read(tmp_path / "p.json") == made == PromptPool.read(str(tmp_path / "p.json"), "t")
    assert made.rejected[0].text.startswith("no \\ud800\\x00yyy") and len(made.rejected[0].text) < 2100
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]
    with pytest.raises(DataError, match="wanted the task 'u', got a pool of 't'"):
        PromptPool.read(tmp_path / "p.json", "u")
    with pytest.raises(TypeError, match="no options"):
        PromptPool.read(tmp_path / "p.json", suffix="x")


def damage(**changes):
    return lambda d: d.update(changes)


DAMAGED = {
    "later version": (damage(version=2), "'version': wanted 1, got 2"),
    "version is true": (damage(version=True), "'version': wanted 1"),
    "other schema": (damage(schema="x"), "'schema': wanted 'sapo_prompt_pool'"),
    "unknown key": (damage(extra=1), "'extra': got it too"),
    "missing key": (lambda d: d.pop("labels"), "'labels': it is not there"),
    "wrong type": (damage(suffix=None), "'suffix': wanted str, got None"),
    "bool for a number": (damage(max_tokens=True), "'max_tokens': wanted int"),
    "no prompts": (damage(prompts=[]), "wanted the original prompt"),
    "no original": (lambda d: d["prompts"].pop(0), "wanted the original prompt"),
    "prompt is a text": (lambda d: d["prompts"].append("x"), "'prompts' 2: wanted an object"),
    "prompt with a key": (lambda d: d["prompts"][1].update(x=1), "'prompts' 1: wanted the keys text, source, and 'x'"),
    "prompt without source": (lambda d: d["prompts"][1].pop("source"), "'prompts' 1: wanted the keys"),
    "prompt lost a label": (lambda d: d["prompts"][1].update(text="<X>"), "'prompts' 1: wanted the label 'positive'"),
    "prompt emptied": (lambda d: d["prompts"][1].update(text=" "), "'prompts' 1: wanted text"),
    "source emptied": (lambda d: d["prompts"][1].update(source=""), "'prompts' 1: 'source'"),
    "prompt twice": (
        lambda d: d["prompts"].append(d["prompts"][1]),
        "'prompts' 2: wanted each prompt once, got prompt 1",
    ),
    "original emptied": (lambda d: d["prompts"][0].update(text=""), "the original prompt: wanted text"),
    "merged into nothing": (
        lambda d: d["merged"].append({"text": "a", "source": "b", "into": 2}),
        "'merged' 0: wanted the index of a prompt, got 2",
    ),
    "rejected without reason": (lambda d: d["rejected"].append({"text": "a", "source": "b"}), "'rejected' 0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pools_are_refused(tmp_path, name):
    change, message = DAMAGED[name]
    path = tmp_path / "p.json"
    pool("one positive negative <X>").save(path)
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        PromptPool.read(path)
    assert (
        message in str(caught.value)
        and str(path) in str(caught.value)
        and len(str(caught.value)) < 400 + len(str(path))
    )


def test_truncated_pools_are_refused(tmp_path):
    path = tmp_path / "p.json"
    pool("one positive negative <X>", "no").save(path)
    text = path.read_text()
    for size in range(0, len(text) - 2, 7):
        path.write_text(text[:size])
        with pytest.raises(DataError):
            PromptPool.read(path)
    path.write_bytes(b" " * (33 * 2**20))
    with pytest.raises(DataError, match="wanted at most"):
        PromptPool.read(path)


def test_a_pool_too_large_to_be_read_is_not_written(tmp_path):
    made = PromptPool.build("t", "x", [f"{i} " + "y" * 16_000 for i in range(2150)])
    with pytest.raises(DataError, match="bytes"):
        made.save(tmp_path / "p.json")
    assert list(tmp_path.iterdir()) == []


def test_other_layouts_are_read(tmp_path, data_folder):
    made = PromptPool.read(data_folder, "task1_a")
    assert made.prompts == ("Original A", "A one", "A two") and made.task == "task1_a"
    assert made.provenance == ("original", "file:paraphrases.json", "file:paraphrases.json")
    assert (made.suffix, made.labels, made.text_word) == ("Say yes or no.", ("yes", "no"), "Text")
    assert PromptPool.read(data_folder / "SUPERNI" / "instructions.json", "task1_b").text_word == "\u6587\u672c"
    made = PromptPool.read(put(tmp_path / "mine.txt", "one\ntwo\nONE\n"))
    assert made.task == "mine" and made.prompts == ("one", "two") and made.merged[0].into == 0
    assert PromptPool.read(put(tmp_path / "l.json", ["a", "b"]), "t", labels=["z"]).labels == ("z",)
    with pytest.raises(DataError, match=r"c\.txt: .*original prompt.*control character"):
        PromptPool.read(put(tmp_path / "c.txt", "a\x1bb\n"))
    assert PromptPool.from_prompt_set(read_prompts(data_folder, "task1_a"), suffix="").suffix == ""


def test_bundled_prompts_all_pass(tmp_path):
    for task in task_names():
        made = PromptPool.read(BUNDLED_DIR, task, tokenizer=tiny_tokenizer())
        assert list(made.prompts) == read_prompts(BUNDLED_DIR, task).prompts and len(made.prompts) == 21
        made.save(tmp_path / "p.json")
        assert PromptPool.read(tmp_path / "p.json") == made


def test_checked_moves_what_fails():
    made = pool("a <|im_end|> positive negative <X>", "b positive negative <X>", "B positive negative <X>", "no")
    again = made.checked(tiny_tokenizer())
    assert again.prompts == (ORIGINAL, "b positive negative <X>") and again.merged[0].into == 1
    assert [r.text[:2] for r in again.rejected] == ["no", "a "] and again.tokenizer is not None
    assert again.extended(["c <|im_end|> positive negative <X>"]).prompts == again.prompts
    with pytest.raises(DataError, match="marker 'b'"):
        made.checked(markers=["b"])


def test_hostile_texts_take_no_time():
    texts = [
        "\ufdfa" * MAX_CHARACTERS,
        ("\u0316\u0301" * MAX_CHARACTERS)[:MAX_CHARACTERS],
        "a" * MAX_CHARACTERS,
        "positive" * 2000,
        "x" * 10_000_000,
        "\U0001f469\u200d" * 8000,
    ]
    started = time.perf_counter()
    made = PromptPool.build("t", "a", texts, labels=["a", "aa", "positive"])
    assert time.perf_counter() - started < 5
    assert len(made.prompts) + len(made.rejected) == 7
