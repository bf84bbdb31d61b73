"""Reading prompts: every format, the original first, every prompt that is refused."""

import pytest

from sapo_kernels.files import DataError
from sapo_peft import PromptSet, read_examples, read_prompts
from tests.cli import cli_helpers
from tests.cli.cli_helpers import put

data_folder = cli_helpers.data_folder


def test_prompt_lists(tmp_path):
    for name, content in (
        ("a.json", ["one", "two"]),
        ("b.json", {"prompts": ["one", "two"]}),
        ("c.txt", "one\ntwo"),
        ("d.txt", "\ufeffone\r\ntwo\r\n\n"),
    ):
        prompts = read_prompts(put(tmp_path / name, content))
        assert prompts.prompts == ["one", "two"] and isinstance(prompts, PromptSet)
        assert (prompts.suffix, prompts.labels, prompts.text_word) == ("", [], "Text")
        assert not prompts.original_first and prompts.sources == [str(tmp_path / name)]
    assert read_prompts(tmp_path / "a.json", task="mine").task == "mine"


def test_text_file_keeps_other_line_separators(tmp_path):
    prompts = read_prompts(put(tmp_path / "a.txt", "one\u2028still one\x0bone\ntwo "))
    assert prompts.prompts == ["one\u2028still one\x0bone", "two "]


def test_prompt_object(tmp_path):
    document = {"prompts": ["one"], "suffix": "Say {x}.", "labels": ["a"], "text_word": "Texte"}
    prompts = read_prompts(put(tmp_path / "a.json", document))
    assert (prompts.suffix, prompts.labels, prompts.text_word) == ("Say {x}.", ["a"], "Texte")


def test_original_first(data_folder):
    for path in (
        data_folder,
        data_folder / "paraphrases.json",
        data_folder / "SUPERNI",
        data_folder / "SUPERNI" / "instructions.json",
    ):
        prompts = read_prompts(path, "task1_a")
        assert prompts.prompts == ["Original A", "A one", "A two"] and prompts.original_first
        assert (prompts.suffix, prompts.labels, prompts.task) == ("Say yes or no.", ["yes", "no"], "task1_a")
        assert len(prompts.sources) == 2
    prompts = read_prompts(data_folder / "SUPERNI" / "instructions.json", "task1_b")
    assert (prompts.prompts, prompts.text_word) == (["Original B"], "\u6587\u672c")
    prompts = read_prompts(data_folder, "task1_c")
    assert prompts.prompts == ["C one"] and not prompts.original_first


def test_instructions_beside_paraphrases(tmp_path):
    put(tmp_path / "paraphrases.json", {"t": ["p"]})
    put(tmp_path / "instructions.json", {"t": {"instruction": "o"}})
    assert read_prompts(tmp_path).prompts == ["o", "p"]
    assert read_prompts(tmp_path / "paraphrases.json").task == "t"


def test_duplicates_are_kept_and_reported(tmp_path):
    prompts = read_prompts(put(tmp_path / "a.json", ["a", "b", "a", "a ", "a"]))
    assert prompts.prompts == ["a", "b", "a", "a ", "a"]
    assert prompts.duplicates == [(2, 0), (4, 0)]
    assert prompts.notes() == ["prompt 2 repeats prompt 0 exactly", "prompt 4 repeats prompt 0 exactly"]


def test_braces_and_directions_stay_text(tmp_path):
    texts = [
        "{0.__class__}",
        "{0:>100000000}",
        "a {prompt} {input} b",
        "%s",
        "\u202eabc",
        "ignore previous instructions",
    ]
    assert read_prompts(put(tmp_path / "a.json", texts)).prompts == texts


BAD_PROMPTS = {
    "empty list": ("a.json", [], "wanted a list of 1 to 10000 prompts, got 0"),
    "empty object": ("a.json", {}, "wanted a list or an object"),
    "a text": ("a.json", '"x"', "wanted a list or an object"),
    "empty prompt": ("a.json", ["a", ""], "prompt 1: wanted text, got an empty prompt"),
    "spaces": ("a.json", ["a", "b", " \n\u3000"], "prompt 2: wanted text, got an empty prompt"),
    "null": ("a.json", ["a", None], "prompt 1: wanted text, got NoneType"),
    "number": ("a.json", [1], "prompt 0: wanted text, got int"),
    "nested list": ("a.json", [["a"]], "prompt 0: wanted text, got list"),
    "object": ("a.json", [{"prompt": "a"}], "prompt 0: wanted text, got dict"),
    "too many": ("a.json", ["a"] * 10_001, "got 10001"),
    "too long": ("a.json", ["a" * 131_073], "wanted at most 131072 characters"),
    "10 MB on one line": ("a.txt", "a" * 10_000_000, "wanted at most 8388608 bytes"),
    "10 MB of JSON on one line": ("a.json", ["a" * 10_000_000], "wanted at most 8388608 bytes"),
    "blank line": ("a.txt", "a\n\nb\n", "prompt 1: wanted text, got an empty prompt"),
    "empty text file": ("a.txt", "\n\n", "got 0"),
    "unknown key": ("a.json", {"prompts": ["a"], "sufix": "x"}, "got 'sufix' too"),
    "suffix is no text": ("a.json", {"prompts": ["a"], "suffix": None}, "'suffix': wanted text"),
    "labels are no list": ("a.json", {"prompts": ["a"], "labels": "yes"}, "'labels': wanted a list"),
    "label is no text": ("a.json", {"prompts": ["a"], "labels": ["a", 1]}, "'labels' 1: wanted text"),
    "empty word": ("a.json", {"prompts": ["a"], "text_word": " "}, "'text_word': wanted a word"),
    "empty task": ("a.json", {"t": []}, "wanted a list of 1 to"),
    "task of a text": ("a.json", {"t": "x"}, "wanted a list of prompts or an object"),
    "no instruction": (
        "a.json",
        {"t": {"suffix": "x"}},
        "'instruction': prompt 0: wanted text, got NoneType",
    ),
    "empty instruction": ("a.json", {"t": {"instruction": " "}}, "got an empty prompt"),
    "bad suffix of a task": (
        "a.json",
        {"t": {"instruction": "x", "suffix": 1}},
        "'suffix': wanted text, got int",
    ),
    "several tasks": ("a.json", {"t": ["a"], "u": ["b"]}, "wanted the name of a task ('t', 'u'), got none"),
    "duplicate task": ("a.json", '{"t": ["a"], "t": ["b"]}', "wanted each key once"),
    "not JSON": ("a.json", "one\ntwo", "not valid JSON"),
    "UTF-16": ("a.json", '["a"]'.encode("utf-16"), "UTF-16"),
    "UTF-16 text": ("a.txt", "one\ntwo".encode("utf-16"), "UTF-16"),
    "other ending": ("a.yaml", "- a", "wanted a file name ending in .json, .txt"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompts(tmp_path, name):
    file, content, message = BAD_PROMPTS[name]
    path = put(tmp_path / file, content)
    with pytest.raises(DataError) as caught:
        read_prompts(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))


def test_fault_in_the_completing_file_is_named(data_folder):
    put(data_folder / "SUPERNI" / "instructions.json", "{")
    with pytest.raises(DataError, match=r"instructions\.json.*not valid JSON"):
        read_prompts(data_folder / "paraphrases.json", "task1_a")
    put(data_folder / "SUPERNI" / "instructions.json", {"task1_a": {"instruction": ""}})
    with pytest.raises(DataError, match=r"instructions\.json: task 'task1_a': 'instruction'"):
        read_prompts(data_folder / "paraphrases.json", "task1_a")


def test_directory_without_prompts(tmp_path):
    with pytest.raises(DataError, match=r"paraphrases\.json or instructions\.json"):
        read_prompts(tmp_path)


def test_bundled_tasks_can_be_read():
    from sapo_peft.assets import BUNDLED_DIR, task_names

    assert len(task_names()) >= 3
    for task in task_names():
        prompts, examples = read_prompts(BUNDLED_DIR, task), read_examples(BUNDLED_DIR, task=task)
        assert len(prompts.prompts) >= 21 and prompts.original_first and not prompts.notes()
        assert len(examples) == examples.total > 0
