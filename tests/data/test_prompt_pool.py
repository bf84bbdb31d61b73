"""Prompt pools: what is read, kept and refused, saving and reading, and what others build on."""

import json
import pickle
import time

import pytest

from sapo_kernels.files import DataError
from sapo_peft import read_prompts
from sapo_peft.data.names import TaskNameError
from sapo_peft.data.prompt_checks import MAX_CHARACTERS
from sapo_peft.data.prompt_pool import MAX_REJECTED, PoolPrompt, PromptPool
from sapo_peft.data.tasks import read_task
from sapo_peft.tiny_random import tiny_tokenizer
from tests.cli import cli_helpers
from tests.cli.cli_helpers import SENTENCES, put

data_folder = cli_helpers.data_folder
ORIGINAL = "Is the text positive or negative? Use <X>."
LABELS = ("positive", "negative", "neutral")


def pool(*paraphrases, original=ORIGINAL, **options):
    options = {"labels": LABELS, "markers": ["<X>"], **options}
    return PromptPool.build("t", original, paraphrases, **options)


def test_build():
    good = "Positive or not: say positive or negative, <X>"
    made = PromptPool.build("t", ORIGINAL, [PoolPrompt(good, "file:a.txt")], suffix="S.", labels=LABELS, text_word="W")
    assert made.prompts == (ORIGINAL, good) and made.provenance == ("original", "file:a.txt")
    assert (made.task, made.suffix, made.labels, made.markers, made.text_word) == ("t", "S.", LABELS, (), "W")
    assert made.required == ("positive", "negative") and made.rejected == () == tuple(made.notes())
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ValueError, match="frozen"):
        made.task = "u"


def test_repeated_prompts_are_rejected_and_reported():
    a = "say positive or negative for <X>"
    same = ["Say  positive or\tnegative\nfor <X> ", "say positive or negative f\uff4fr <X>"]
    made = pool(a, *same, "\u200bsay positive or negative for <X>", ORIGINAL + " ", "new: positive, negative, <X>")
    assert made.prompts == (ORIGINAL, a, "new: positive, negative, <X>")
    told = [f"expected each prompt once, got {text!r} again" for text in (a, ORIGINAL)]
    assert [r.reason for r in made.rejected] == [told[0]] * 3 + told[1:] and made.rejected[0].text == same[0]
    assert [note.partition(": ")[0] for note in made.notes()] == [
        f"{count} of the paraphrases from given rejected" for count in (3, 1)]  # fmt: skip
    assert len(pool("Stra\u00dfe positive negative <X>", "STRASSE positive negative <X>").prompts) == 2


BAD = {
    "spaces": (" \n\u3000\u2028", "expected text, got an empty prompt"),
    "nothing visible": ("\u200b\u200d\ufeff", "expected text, got an empty prompt"),
    "label dropped": ("Say positive, <X>", "expected the label 'negative'"),
    "label in another case": ("Positive or NEGATIVE? positive <X>", "expected the label 'negative'"),
    "label inside a word": ("positive or negatively <X>", "expected the label 'negative'"),
    "label with an underscore": ("positive or negative_ <X>", "expected the label 'negative'"),
    "label in another alphabet": ("positive or neg\u0430tive <X>", "expected the label 'negative'"),
    "marker re-cased": ("positive or negative <x>", "expected the marker '<X>'"),
    "NUL": ("positive \0 negative <X>", "a NUL character at character 9"),
    "lone surrogate": ("positive negative \ud800 <X>", "a lone surrogate at character 18"),
    "escape": ("positive negative \x1b[31m <X>", "the control character U+001B"),
    "reversed": ("positive negative \u202e <X>", "character U+202E"),
    "invisible tag letters": ("positive negative \U000e0041 <X>", "character U+E0041"),
    "noncharacter": ("positive negative \uffff <X>", "character U+FFFF"),
    "too long": ("positive negative <X>" + "a" * MAX_CHARACTERS, f"expected at most {MAX_CHARACTERS} characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_faulty_paraphrases_are_rejected_and_faulty_originals_are_errors(name):
    text, message = BAD[name]
    made = pool(text, text)
    assert made.prompts == (ORIGINAL,) and message in made.rejected[0].reason and made.rejected[0].source == "given"
    assert len(made.notes()) == 1 and message in made.notes()[0] and made.notes()[0].isascii()
    if "label" not in name:
        with pytest.raises(DataError, match="the original prompt: expected") as caught:
            pool(original=text)
        assert message in str(caught.value) and "'t'" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "text",
    [
        "(positive) \u201cnegative\u201d <X>\r\n\twith layout/negative",
        "negative. positive! \u0645\u0631\u062d\u0628\u0627 <X> \u200f\u200d",
        "{0.__class__} {prompt} {0:>100000000} %s positive negative <X>",
        "negative positively positive <X>",
    ],
)
def test_unusual_paraphrases_are_kept_as_they_are(text):
    assert pool(text).prompts == (ORIGINAL, text)


def test_which_labels_are_required():
    made = PromptPool.build("t", "Rate 1-5", ["from 1 to 5", "from 15 to 1"], labels=["1", "2", "5"])
    assert made.required == ("1", "5") and made.prompts == ("Rate 1-5", "from 1 to 5")
    # In scripts without spaces every occurrence counts.
    labels = ["\u79ef\u6781", "\u6d88\u6781"]
    original = "\u5224\u65ad\u60c5\u611f\u662f\u79ef\u6781\u8fd8\u662f\u6d88\u6781"
    made = PromptPool.build("t", original, ["\u79ef\u6781\u6216\u6d88\u6781\uff1f", "\u79ef\u6781"], labels=labels)
    assert made.required == tuple(labels) and len(made.prompts) == 2 and "label" in made.rejected[0].reason


def test_rules_of_a_tokenizer():
    tokenizer = tiny_tokenizer()
    special, long = "positive negative <X> <|im_end|>", "positive negative <X> " + "b" * 1003
    made = pool(special, long, tokenizer=tokenizer)
    assert "special token '<|im_end|>'" in made.rejected[0].reason
    assert made.rejected[1].reason == "expected at most 1024 tokens, got 1025"
    for options, what in (
        ({"original": "<|im_start|>positive negative <X>"}, "the original prompt"),
        ({"suffix": "a<|endoftext|>"}, "suffix"),
        ({"original": "positive negative <X>" * 100}, "expected at most 1024 tokens, got 2100"),
    ):
        with pytest.raises(DataError, match=what):
            pool(tokenizer=tokenizer, **options)
    # Later: what fails is moved, and the rules stay with the pool.
    plain = pool(special, "b positive negative <X>", "B positive negative <X>", "no")
    again = plain.checked(tokenizer)
    assert again.prompts == (ORIGINAL, "b positive negative <X>")
    assert [r.text[:2] for r in again.rejected] == ["B ", "no", "po"]
    assert again.extended([special + "c"]).prompts == again.prompts
    with pytest.raises(DataError, match="marker 'b'"):
        plain.checked(markers=["b"])
    assert plain.checked(markers=["text"]).markers == ("<X>", "text"), "more of them, none instead"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [""]}, "'labels' 0: expected text"),
        ({"labels": ["a", 3]}, "'labels' 1: expected a valid string, got 3"),
        ({"markers": ["<Y>"]}, "the original prompt: expected the marker '<Y>'"),
        ({"markers": ["\ud800"]}, "'markers' 0: expected plain text, got a lone surrogate"),
        ({"suffix": "\x1b"}, "'suffix': expected plain text"),
        ({"text_word": "a\nb"}, "'text_word': expected a text on one line"),
        ({"original": None}, "the original prompt: expected text"),
    ],
)
def test_faults_in_the_rest_are_errors(options, message):
    with pytest.raises(DataError) as caught:
        pool(**options)
    assert message in str(caught.value) and "task 't'" in str(caught.value)


def test_extended_keeps_places():
    first = pool("one positive negative <X>")
    second = first.extended(["two positive negative <X>", "no", PoolPrompt("ONE positive negative <X>", "model:m")])
    assert second.prompts == (*first.prompts, "two positive negative <X>") and len(first.prompts) == 2
    assert [r.source for r in second.rejected] == ["given", "model:m"] and "once" in second.rejected[1].reason
    # The same fault twice is one fault, and a source without end does not fill the memory.
    third = second.extended(["no"]).extended([f"no {i}" for i in range(2 * MAX_REJECTED)])
    assert len(third.rejected) == MAX_REJECTED and third.rejected[0].text == "no"
    for wrong in (3, b"x", ("a", "b"), PoolPrompt(3, "x")):
        with pytest.raises(TypeError, match="paraphrase 1: expected a string"):
            first.extended(["a", wrong])


def test_save_and_read(tmp_path):
    paraphrases = ("A {x} \u4f60 positive negative <X>", "no \ud800\0" + "y" * 50_000)
    made = pool(PoolPrompt("a {x} \u4f60 positive negative <X>", "endpoint:m"), *paraphrases, suffix="S")
    made.save(tmp_path / "p.json")
    assert PromptPool.read(tmp_path / "p.json") == made == PromptPool.read(str(tmp_path / "p.json"), "t")
    assert made.rejected[1].text.startswith("no \\ud800\\x00yyy") and len(made.rejected[1].text) < 2100
    with pytest.raises(TaskNameError, match="expected the task 'u', got a pool of 't'"):
        PromptPool.read(tmp_path / "p.json", "u")
    with pytest.raises(TypeError, match="no options"):
        PromptPool.read(tmp_path / "p.json", suffix="x")


# As version 0.1 of this package wrote it.
WRITTEN = {
    "schema": "sapo_prompt_pool", "version": 1, "task": "t", "text_word": "Text", "suffix": "", "labels": ["yes"],
    "markers": [], "max_characters": 16384, "max_tokens": 1024,
    "prompts": [{"text": "Say yes.", "source": "original"}, {"text": "yes?", "source": "given"}],
    "rejected": [{"text": "no", "source": "given", "reason": "expected the label 'yes', got a prompt without it"}],
    "merged": [{"text": "Yes? yes?", "source": "given", "into": 1}],
}  # fmt: skip


def test_an_older_file_is_read_and_written_as_it_was(tmp_path):
    made = PromptPool.read(put(tmp_path / "p.json", WRITTEN))
    assert made.prompts == ("Say yes.", "yes?") and len(made.rejected) == 1
    made.save(tmp_path / "q.json")
    again = {name: value for name, value in WRITTEN.items() if name not in ("merged", "max_characters", "max_tokens")}
    assert (tmp_path / "q.json").read_text() == json.dumps(again, indent=1) + "\n"


def damage(**changes):
    return lambda d: d.update(changes)


DAMAGED = {
    "later version": (damage(version=2, extra=1), "'version': expected less than or equal to 1, got 2"),
    "other schema": (damage(schema="x"), "'schema': expected 'sapo_prompt_pool', got 'x'"),
    "unknown key": (damage(extra=1), "expected no key 'extra', got one"),
    "missing key": (lambda d: d.pop("labels"), "expected the key 'labels', got none"),
    "no prompts": (damage(prompts=[]), "'prompts': expected at least 1 entries, got 0"),
    "no original": (lambda d: d["prompts"].pop(0), "'prompts' 0: expected the original prompt"),
    "prompt lost a label": (lambda d: d["prompts"][1].update(text="ye"), "'prompts' 1: expected the label 'yes'"),
    "prompt emptied": (lambda d: d["prompts"][1].update(text=" "), "'prompts' 1: expected text"),
    "prompt twice": (lambda d: d["prompts"].append(d["prompts"][1]), "expected each prompt once, got prompt 1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pools_are_refused(tmp_path, name):
    change, message = DAMAGED[name]
    document = json.loads(json.dumps(WRITTEN))
    change(document)
    path = put(tmp_path / "p.json", document)
    with pytest.raises(DataError) as caught:
        PromptPool.read(path)
    text = str(caught.value)
    assert message in text and text.startswith(f"{path}: ") and len(text) < 400 + len(str(path))


def test_plain_files(tmp_path):
    for name, content in (
        ("a.json", ["one", "two", "ONE"]),
        ("b.json", {"prompts": ["one", "two", "one"]}),
        ("d.txt", "\ufeffone\r\ntwo\r\none \r\n\n"),
    ):
        made = read_prompts(put(tmp_path / name, content))
        assert made.prompts == ("one", "two") and len(made.rejected) == 1 and made.task == name[0]
        assert (made.suffix, made.labels, made.text_word) == ("", (), "Text")
        assert made.provenance == ("original", f"file:{name}")
        assert read_prompts(tmp_path / name, "mine", labels=["z"]).labels == ("z",)
    document = {"prompts": ["one\u2028still\x0bone"], "suffix": "Say {x}.", "labels": ["a"], "text_word": "Texte"}
    with pytest.raises(DataError, match=r"c\.json: .*original prompt.*control character"):
        read_prompts(put(tmp_path / "c.json", document))
    made = read_prompts(put(tmp_path / "c.json", {**document, "prompts": ["one\u2028still one"]}))
    assert (made.suffix, made.labels, made.text_word) == ("Say {x}.", ("a",), "Texte")


def test_instructions_and_paraphrases_complete_each_other(data_folder):
    for path in ("", "paraphrases.json", "SUPERNI", "SUPERNI/instructions.json"):
        made = PromptPool.read(data_folder / path, "task1_a", needs_original=True)
        assert made.prompts == ("Original A", "A one", "A two") and made.task == "task1_a"
        assert made.provenance == ("original", "file:paraphrases.json", "file:paraphrases.json")
        assert (made.suffix, made.labels, made.text_word) == ("Say yes or no.", ("yes", "no"), "Text")
    made = PromptPool.read(data_folder / "SUPERNI" / "instructions.json", "task1_b")
    assert (made.prompts, made.text_word) == (("Original B",), "\u6587\u672c")
    assert PromptPool.read(data_folder, "task1_c").prompts == ("C one",)
    with pytest.raises(DataError, match="'task1_c': expected its instruction too, got paraphrases only"):
        PromptPool.read(data_folder, "task1_c", needs_original=True)
    for task in (None, "task1", "TASK1_A", "../SUPERNI/task1_a", ""):
        with pytest.raises(TaskNameError, match="task1_a"):
            PromptPool.read(data_folder, task)
    put(data_folder / "SUPERNI" / "instructions.json", {"task1_a": {"instruction": 1}})
    with pytest.raises(DataError, match=r"instructions\.json: task 'task1_a': 'instruction': expected"):
        PromptPool.read(data_folder / "paraphrases.json", "task1_a")
    put(data_folder / "SUPERNI" / "instructions.json", "{")
    with pytest.raises(DataError, match=r"instructions\.json.*not valid JSON"):
        PromptPool.read(data_folder / "paraphrases.json", "task1_a")


BAD_FILES = {
    "empty list": ("a.json", [], "'prompts': expected at least 1 entries, got 0"),
    "empty prompt": ("a.json", [""], "the original prompt: expected text, got an empty prompt"),
    "too many": ("a.json", ["a"] * 10_001, "at most 10000 entries"),
    "empty text file": ("a.txt", "\n\n", "at least 1 entries"),
    "unknown key": ("a.json", {"prompts": ["a"], "sufix": "x"}, "expected no key 'sufix'"),
    "empty task": ("a.json", {"t": []}, "task 't': 'prompts': expected at least 1 entries, got 0"),
    "no instruction": ("a.json", {"t": {"suffix": "x"}}, "expected the key 'instruction', got none"),
    "several tasks": ("a.json", {"t": ["a"], "u": ["b"]}, "expected the name of a task ('t', 'u'), got none"),
    "other ending": ("a.yaml", "- a", "expected a file name ending in .json, .txt"),
    "no prompts": ("folder/x", "", "paraphrases.json or instructions.json"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    file, content, message = BAD_FILES[name]
    path = put(tmp_path / file, content)
    path = path.parent if "/" in file else path
    with pytest.raises(DataError) as caught:
        PromptPool.read(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_the_task_of_two_files(data_folder, tmp_path):
    """It is the one asked for, the only one, or that of the data's folder; a name that nobody knows is refused."""
    paraphrases, folder = data_folder / "paraphrases.json", data_folder / "SUPERNI" / "task1_a"
    flat, rows = put(tmp_path / "p.txt", "one\ntwo\n"), put(tmp_path / "d.json", SENTENCES)
    for data in (folder, folder / "train.json"):
        assert read_task(paraphrases, data)[0].task == "task1_a"
    assert read_task(paraphrases, folder, "task1_c")[0].task == "task1_c"
    assert read_task(flat, data_folder, "task1_b")[1].source.endswith("task1_b/train.json")
    assert read_task(flat, folder, "task1_a")[0].task == "task1_a" and read_task(flat, rows)[0].task == "p"
    for prompts, data, task in ((flat, rows, "x"), (flat, folder, "task1_b"), (paraphrases, rows, "x"),
                                (paraphrases, rows, None), (flat, data_folder, "x")):  # fmt: skip
        with pytest.raises(TaskNameError, match="expected"):
            read_task(prompts, data, task)


def test_hostile_texts_take_no_time():
    texts = ["\ufdfa" * MAX_CHARACTERS, "\u0316\u0301" * (MAX_CHARACTERS // 2), "a" * MAX_CHARACTERS, "positive" * 2000,
             "x" * 10_000_000, "\U0001f469\u200d" * 8000]  # fmt: skip
    started = time.perf_counter()
    made = PromptPool.build("t", "a", texts, labels=["a", "aa", "positive"])
    assert time.perf_counter() - started < 5
    assert len(made.prompts) + len(made.rejected) == 7
