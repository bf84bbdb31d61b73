"""Readers of examples and prompts: every format, every way a row or a prompt can be wrong, rows conserved."""

import json
import os

import pytest

from sapo_kernels.files import DataError
from sapo_peft import Examples, read_examples, read_prompts
from sapo_peft.data.examples import TaskNameError
from tests.cli import cli_helpers
from tests.cli.cli_helpers import SENTENCES, put

data_folder = cli_helpers.data_folder

PAIRS = [{"input": f"s{i}", "target": f"l{i}"} for i in range(3)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMATS = {
    "a.json": SENTENCES,
    "b.json": [{"input": f"s{i}", "target": f"l{i}"} for i in range(3)],
    "c.json": {"Definition": ["x"], "Instances": [{"input": f"s{i}", "output": [f"l{i}"]} for i in range(3)]},
    "d.jsonl": lines(SENTENCES),
    "e.ndjson": "\n" + lines(SENTENCES).replace("\n", "\r\n\r\n"),
    "f.csv": "text,label\ns0,l0\ns1,l1\ns2,l2\n",
    "g.csv": '\ufeff"question","id","answer"\r\n"s0",1,"l0"\r\n\r\n"s1",2,"l1"\r\n"s2",3,"l2"',
    "h.csv": "prompt;output\ns0;l0\ns1;l1\ns2;l2\n",
    "i.tsv": "sentence\tlabel\ns0\tl0\ns1\tl1\ns2\tl2\n",
    "J.JSON": SENTENCES,
    "k.json": [{"prompt": f"s{i}", "answer": f"l{i}", "extra": None} for i in range(3)],
    "l.json": [{"sentence": f"s{i}", "label": f"l{i}", "text": "", "target_id": 3} for i in range(3)],
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path, name):
    examples = read_examples(put(tmp_path / name, FORMATS[name]))
    assert list(examples) == PAIRS and isinstance(examples, Examples)
    assert (examples.total, examples.unread, examples.skipped, examples.notes()) == (3, 0, [], [])
    assert examples.source == str(tmp_path / name)


def test_chosen_columns(tmp_path):
    rows = [{"a": "s0", "b": "l0", "text": "t", "label": "w"}]
    path = put(tmp_path / "x.jsonl", lines(rows))
    assert read_examples(path, "a", "b") == [{"input": "s0", "target": "l0"}]
    assert read_examples(path, "a") == [{"input": "s0", "target": "w"}]
    assert read_examples(path, target_column="b") == [{"input": "t", "target": "l0"}]
    # A column that is chosen for one side is no candidate for the other.
    path = put(tmp_path / "y.csv", "text,question,label\nt,q,l\n")
    assert read_examples(path, "question") == [{"input": "q", "target": "l"}]


def test_text_is_not_touched(tmp_path):
    texts = [
        "  two\nlines  ",
        '{0.__class__} {x} %s "quoted" \\n',
        "<|endoftext|>",
        "\u202eabc\u200b",
        "\u4f60\u597d",
        "",
    ]
    path = put(tmp_path / "a.json", [{"sentence": text, "label": text or " x "} for text in texts])
    examples = read_examples(path)
    assert [row["input"] for row in examples] == texts
    assert [row["target"] for row in examples] == [*texts[:-1], " x "]
    assert examples.empty_inputs == 1
    put(tmp_path / "b.csv", 'input,target\n"a ""b"", c\nd","{e}"\n')
    assert read_examples(tmp_path / "b.csv") == [{"input": 'a "b", c\nd', "target": "{e}"}]


def test_directories(data_folder):
    assert read_examples(data_folder / "SUPERNI" / "task1_a") == PAIRS
    assert read_examples(data_folder / "SUPERNI", task="task1_b") == PAIRS
    assert read_examples(data_folder, task="task1_b", split="test") == PAIRS[:1]
    assert read_examples(data_folder / "SUPERNI" / "task1_a", task="task1_b").source.endswith("task1_a/train.json")


@pytest.mark.parametrize("task", [None, "task1", "TASK1_A", "../SUPERNI/task1_a", "", "task1_a/", "instructions.json"])
def test_task_names_are_exact(data_folder, task):
    """A part of a name, a path or another case is not a task: a wrong task would be scored without a sign."""
    with pytest.raises(TaskNameError, match="task1_a"):
        read_examples(data_folder, task=task)
    with pytest.raises(TaskNameError, match="task1_a"):
        read_prompts(data_folder, task=task)


def test_directory_without_tasks_and_bad_split(tmp_path, data_folder):
    put(tmp_path / "empty" / "x.txt", "x")
    with pytest.raises(DataError, match=r"wanted train\.json or task folders"):
        read_examples(tmp_path / "empty")
    for split in ("../x", "a/b", ""):
        with pytest.raises(DataError, match="split"):
            read_examples(data_folder, task="task1_a", split=split)


def test_limit_and_conservation(tmp_path):
    rows = [{"sentence": f"s{i}", "label": "" if i % 3 == 1 else f"l{i}"} for i in range(10)]
    for name, text in (("a.json", rows), ("a.jsonl", lines(rows))):
        path = put(tmp_path / name, text)
        for limit in (1, 2, 4, 7, 8, 100, None):
            examples = read_examples(path, limit=limit, skip_empty=True)
            assert len(examples) == min(limit or 100, 7)
            assert examples.total == 10 == len(examples) + len(examples.skipped) + examples.unread
        assert [row["target"] for row in examples] == ["l0", "l2", "l3", "l5", "l6", "l8", "l9"]
        assert "3 of the rows read with an empty label left out" in examples.notes()[0]
    assert read_examples(tmp_path / "a.json", skip_empty=True).skipped == ["row 1", "row 4", "row 7"]
    assert read_examples(tmp_path / "a.jsonl", skip_empty=True).skipped == ["line 2", "line 5", "line 8"]
    # Rows behind the limit are counted and not looked at.
    assert read_examples(tmp_path / "a.json", limit=1).unread == 9
    for limit in (0, -1):
        with pytest.raises(DataError, match="limit"):
            read_examples(path, limit=limit)


def test_counts_of_duplicates_and_conflicts(tmp_path):
    rows = [("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("", "1")]
    path = put(tmp_path / "a.json", [{"sentence": s, "label": t} for s, t in rows])
    examples = read_examples(path)
    assert len(examples) == 6
    assert (examples.duplicates, examples.conflicts, examples.empty_inputs) == (2, 1, 1)
    assert len(examples.notes()) == 3


def test_several_outputs(tmp_path):
    path = put(tmp_path / "a.json", {"Instances": [{"input": "i", "output": ["first", "second"]}]})
    examples = read_examples(path)
    assert examples == [{"input": "i", "target": "first"}] and examples.several_targets == 1


BAD_ROWS = {
    "empty label": ({"sentence": "s", "label": ""}, "wanted a label in 'label', got an empty one"),
    "label of spaces": ({"sentence": "s", "label": " \n\t\u3000"}, "got an empty one"),
    "missing label": ({"sentence": "s"}, "wanted the field 'label', got 'sentence'"),
    "missing sentence": ({"label": "s"}, "wanted the field 'sentence'"),
    "empty row": ({}, "got an empty object"),
    "null label": ({"sentence": "s", "label": None}, "'label': wanted text, got NoneType None"),
    "int label": ({"sentence": "s", "label": 5}, "'label': wanted text, got int 5"),
    "float label": ({"sentence": "s", "label": 1.0}, "wanted text, got float"),
    "bool label": ({"sentence": "s", "label": True}, "wanted text, got bool"),
    "list label": ({"sentence": "s", "label": ["a"]}, "wanted text, got list"),
    "object label": ({"sentence": "s", "label": {"a": 1}}, "wanted text, got dict"),
    "null sentence": ({"sentence": None, "label": "a"}, "'sentence': wanted text"),
    "int sentence": ({"sentence": 1, "label": "a"}, "'sentence': wanted text"),
    "list sentence": ({"sentence": ["a"], "label": "a"}, "'sentence': wanted text"),
    "other case": ({"Sentence": "s", "Label": "a"}, "wanted the field 'sentence'"),
    "field too long": (
        {"sentence": "x" * 131_073, "label": "a"},
        "wanted at most 131072 characters, got 131073",
    ),
    "list row": (["s", "l"], "wanted an object"),
    "text row": ("s", "wanted an object"),
    "null row": (None, "wanted an object"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_bad_rows_are_named(tmp_path, name, kind):
    row, message = BAD_ROWS[name]
    rows = [*SENTENCES[:2], row, SENTENCES[2]]
    path = put(tmp_path / f"a.{kind}", rows if kind == "json" else lines(rows))
    place = "row 2" if kind == "json" else "line 3"
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}: {place}: " in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert len(read_examples(path, limit=2)) == 2


BAD_OUTPUTS = {
    "empty list": ([], "got an empty list"),
    "empty text": ([""], "got an empty one"),
    "int": ([1], "wanted text, got int 1"),
    "null": (None, "wanted text, got NoneType"),
    "second is no text": (["a", None], "wanted text"),
    "nested": ([["a"]], "wanted text, got list"),
}


@pytest.mark.parametrize("name", BAD_OUTPUTS)
def test_bad_outputs_are_named(tmp_path, name):
    output, message = BAD_OUTPUTS[name]
    path = put(
        tmp_path / "a.json",
        {"Instances": [{"input": "i", "output": ["x"]}, {"input": "i", "output": output}]},
    )
    with pytest.raises(DataError, match="row 1") as caught:
        read_examples(path)
    assert message in str(caught.value)


BAD_FILES = {
    "no rows": ("a.json", "[]", "wanted a list of rows"),
    "no instances": ("a.json", '{"Instances": []}', "wanted a list of rows"),
    "one row": ("a.json", '{"sentence": "s", "label": "l"}', "wanted a list of rows"),
    "a number": ("a.json", "3", "wanted a list of rows"),
    "first row is text": ("a.json", '["x"]', "row 0: wanted an object"),
    "only empty labels": ("a.json", '[{"sentence": "s", "label": ""}]', "row 0: wanted a label"),
    "JSON lines named .json": ("a.json", lines(SENTENCES), "name the file .jsonl"),
    "unknown columns": (
        "a.json",
        '[{"x": "a", "y": "b"}]',
        "wanted the input column (exactly one of input, sentence",
    ),
    "two inputs": ("a.json", '[{"text": "a", "question": "c", "label": "b"}]', "exactly one of"),
    "two targets": ("a.json", '[{"text": "a", "answer": "c", "label": "b"}]', "the target column"),
    "no target": ("a.json", '[{"text": "a"}]', "the target column"),
    "duplicate key": ("a.json", '[{"sentence": "a", "label": "b", "label": "c"}]', "wanted each key once"),
    "NaN": ("a.json", '[{"sentence": "a", "label": "b", "x": NaN}]', "finite number"),
    "UTF-16": ("a.json", json.dumps(SENTENCES).encode("utf-16"), "UTF-16"),
    "Latin-1": ("a.csv", "text,label\ncaf\u00e9,x\n".encode("latin-1"), "line 2: wanted UTF-8"),
    "empty jsonl": ("a.jsonl", "\n \n", "got an empty file"),
    "array lines": ("a.jsonl", "[1]\n", "line 1: wanted an object"),
    "pretty-printed jsonl": ("a.jsonl", json.dumps(SENTENCES[0], indent=1), "line 1"),
    "second line broken": ("a.jsonl", lines(SENTENCES[:1]) + "{", "line 2: line 1 column 2: not valid JSON"),
    "two objects on a line": ("a.jsonl", "{}{}", "Extra data"),
    "empty csv": ("a.csv", "", "got an empty file"),
    "header only": ("a.csv", "text,label\n", "got 0 rows"),
    "no header": ("a.csv", "some text,yes\nother,no\n", "line 1: wanted the input column"),
    "header twice": ("a.csv", "text,label,text\na,b,c\n", "wanted each column once"),
    "short row": ("a.csv", "text,label\na,b\nc\n", "line 3: wanted 2 cells, got 1"),
    "long row": ("a.csv", "text,label\na,b,c\n", "line 2: wanted 2 cells, got 3"),
    "open quote": ("a.csv", 'text,label\n"a,b\n', "not valid CSV"),
    "text after quote": ("a.csv", 'text,label\n"a"x,b\n', "not valid CSV"),
    "huge field": ("a.csv", "text,label\n" + "x" * 131_073 + ",b\n", "not valid CSV: field larger"),
    "empty csv label": ("a.csv", "text,label\na,\n", "line 2: wanted a label"),
    "NUL in csv": ("a.csv", b"text,label\na\0,b\n", "NUL"),
    "parquet": ("a.parquet", b"PAR1", "wanted a file name ending in .json"),
    "no ending": ("a", "[]", "wanted a file name ending in"),
    "compressed": ("a.json.gz", b"\x1f\x8b", "wanted a file name ending in"),
    "compressed inside": ("a.json", b"\x1f\x8b\x08", "gzip archive"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    file, content, message = BAD_FILES[name]
    path = put(tmp_path / file, content)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_skip_empty_with_nothing_left(tmp_path):
    path = put(tmp_path / "a.json", [{"sentence": "s", "label": ""}])
    with pytest.raises(DataError, match="wanted at least one row with a label, got 1 rows and none"):
        read_examples(path, skip_empty=True)


def test_column_options_that_do_not_fit(tmp_path):
    path = put(tmp_path / "a.json", SENTENCES)
    with pytest.raises(DataError, match="wanted the input column 'nope', got the columns 'sentence', 'label'"):
        read_examples(path, "nope")
    with pytest.raises(DataError, match="two different columns"):
        read_examples(path, "label", "label")


def test_missing_fifo_and_link(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_examples(tmp_path / "none.json")
    os.mkfifo(tmp_path / "f.json")
    with pytest.raises(DataError, match="FIFO"):
        read_examples(tmp_path / "f.json")
    put(tmp_path / "real.json", SENTENCES)
    (tmp_path / "link.json").symlink_to("real.json")
    assert read_examples(tmp_path / "link.json") == PAIRS


def test_long_row_of_the_real_data_is_accepted(tmp_path):
    path = put(tmp_path / "a.json", [{"sentence": "x" * 54_840, "label": "y"}])
    assert len(read_examples(path)[0]["input"]) == 54_840


def test_many_rows(tmp_path):
    path = put(tmp_path / "a.jsonl", '{"sentence": "s", "label": "l"}\n' * 100_000)
    examples = read_examples(path, limit=10)
    assert (len(examples), examples.total, examples.unread) == (10, 100_000, 99_990)
