"""Reading examples: every format, how columns become text, every way a row can be wrong, rows conserved."""

import itertools
import json
import random
import time

import datasets
import pytest

from sapo_kernels.files import DataError
from sapo_kernels.scoring.render import check_examples
from sapo_peft import Examples, read_examples
from sapo_peft.data import tables
from sapo_peft.data.names import TaskNameError
from tests.cli import cli_helpers
from tests.cli.cli_helpers import SENTENCES, put

data_folder = cli_helpers.data_folder
PAIRS = [{"input": f"s{i}", "target": f"l{i}"} for i in range(3)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


FORMATS = {
    "a.json": SENTENCES,
    "c.json": {"Definition": ["x"], "Instances": [{"input": f"s{i}", "output": [f"l{i}"]} for i in range(3)]},
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


def test_datasets_and_the_hub(tmp_path, monkeypatch):
    """A Dataset, a Parquet file and a name on the hub give the same rows, class labels by their names."""
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["l0", "l1", "l2"]))
    made = datasets.Dataset.from_dict({"text": ["s0", "s1", "s2"], "label": [0, 1, 2]}, features=features)
    made.to_parquet(tmp_path / "a.parquet")
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or made)
    monkeypatch.setattr(tables, "hub_answers", lambda name, kind: name == "owner/name" and kind == "dataset")
    for source in (made, tmp_path / "a.parquet", "owner/name", "owner/name:part", list(made)):
        examples = read_examples(source, split="test")
        digits = isinstance(source, list)
        assert [row["target"] for row in examples] == (["0", "1", "2"] if digits else ["l0", "l1", "l2"])
        assert [row["input"] for row in examples] == ["s0", "s1", "s2"]
        assert examples.notes() == (["rows: 'label' holds numbers, taken as text"] if digits else [])
    assert asked == [("owner/name", None, "test"), ("owner/name", "part", "test")]
    unlabelled = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [-1, 1]}, features=features)
    assert len(read_examples(unlabelled, skip_empty=True)) == 1
    with pytest.raises(DataError, match="mine: row 0: expected a label in 'label', got an empty one"):
        read_examples(unlabelled, name="mine")
    with pytest.raises(TypeError, match="rows: expected a list of rows or a Dataset, got IterableDataset"):
        read_examples(made.to_iterable_dataset())
    monkeypatch.undo()
    offline = datasets.config.HF_HUB_OFFLINE
    # Without a network: what is cached, and no retries for what is not.
    monkeypatch.setattr(tables, "hub_answers", lambda name, kind: False)
    started = time.monotonic()
    with pytest.raises(DataError, match="nobody/nothing: no such file, and the hub does not answer"):
        read_examples("nobody/nothing")
    assert time.monotonic() - started < 5 and offline == datasets.config.HF_HUB_OFFLINE
    with pytest.raises(DataError, match=r"b\.parquet: expected a Parquet file"):
        read_examples(put(tmp_path / "b.parquet", b"PAR1"))


COLUMNS = {
    "Alpaca": ({"instruction": "Do.", "input": "x", "output": "y"}, "Do.\n\nx", "y", "'instruction' is put in front"),
    "Alpaca without input": ({"instruction": "Do.", "input": "", "output": "y"}, "Do.", "y", "is put in front"),
    "Alpaca in one column too": ({"instruction": "Do.", "input": "x", "output": "y", "text": "Do. x y"}, "Do.\n\nx",
                                 "y", "unused text columns: 'text'"),
    "instruction alone": ({"instruction": "Do.", "response": "y"}, "Do.", "y", None),
    "choices by index": ({"question": "q", "choices": ["u", "v"], "answer": 1}, "q\nA. u\nB. v", "B", "are put below"),
    "choices with labels": ({"question": "q", "choices": {"label": ["1", "2"], "text": ["u", "v"]}, "answerKey": "2"},
                            "q\n1. u\n2. v", "2", "are put below"),
    "options by letter": ({"question": "q", "options": {"A": "u", "B": "v"}, "answer": "B"}, "q\nA. u\nB. v", "B",
                          None),
    "choices in the text": ({"question": "q: u or v", "choices": ["u", "v"], "answer": "u"}, "q: u or v", "u", None),
    "unused texts": ({"question": "q", "answer": "a", "context": "Long.", "id": "x", "n": 3, "tags": ["t"]}, "q", "a",
                     "unused text columns: 'context', 'tags'"),
    "whole numbers": ({"text": "q", "label": -3}, "q", "-3", "'label' holds numbers, taken as text"),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_columns_become_text(tmp_path, name):
    row, text, target, note = COLUMNS[name]
    for examples in (read_examples([row]), read_examples(put(tmp_path / "a.jsonl", lines([row])))):
        assert examples == [{"input": text, "target": target}]
        assert note is None or any(note in one for one in examples.notes()), examples.notes()


@pytest.mark.parametrize(
    ("rows", "inputs"),
    [
        (
            [{"question": "Even?", "choices": ["7", "2"], "answer": 1},
             {"question": "20 - 4?", "choices": ["0", "4"], "answer": 1}],
            ["Even?\nA. 7\nB. 2", "20 - 4?\nA. 0\nB. 4"],
        ),
        (
            [{"question": "a or b?", "choices": ["a", "b"], "answer": 1},
             {"question": "Which?", "choices": ["a", "b"], "answer": 1}],
            ["a or b?\nA. a\nB. b", "Which?\nA. a\nB. b"],
        ),
        (
            [{"instruction": "In", "input": "Indeed", "output": "x"},
             {"instruction": "Say.", "input": "Say. it", "output": "x"}],
            ["In\n\nIndeed", "Say.\n\nSay. it"],
        ),
        (
            [{"instruction": "Say.", "input": "Say. it", "output": "x"},
             {"instruction": "Do. ", "input": "Do. this", "output": "x"}],
            ["Say. it", "Do. this"],
        ),
    ],
    ids=["digits of a number", "in one row by chance", "part of a word", "in every row"],
)  # fmt: skip
def test_rows_of_a_table_read_alike(rows, inputs):
    assert [one["input"] for one in read_examples(rows)] == inputs


def test_messages(tmp_path):
    """In every format that has lists, also as prompt and completion; counts look at the turns before too."""
    first = {"role": "system", "content": "Be brief."}
    talks = [
        [{"role": "user", "content": f"s{i // 2}"}, {"role": "assistant", "content": f"l{i // 2}"}] for i in range(4)
    ]
    talks[1].insert(0, first)
    rows = [{"id": str(i), "messages": talk} for i, talk in enumerate(talks)]
    pairs = [{"prompt": talk[:-1], "completion": talk[-1:]} for talk in talks]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    sharegpt = [
        {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]} for talk in talks
    ]
    sources = [rows, pairs, sharegpt, datasets.Dataset.from_list(rows), put(tmp_path / "d.json", rows),
               put(tmp_path / "d.jsonl", lines(rows)), tmp_path / "d.parquet"]  # fmt: skip
    for source in sources:
        examples = read_examples(source)
        assert [(row["input"], row["target"]) for row in examples] == [(f"s{i // 2}", f"l{i // 2}") for i in range(4)]
        assert [row["history"] for row in examples] == [[], [first], [], []]
        assert (examples.duplicates, examples.conflicts, examples.total) == (1, 0, 4)
    with pytest.raises(DataError, match="rows: row 1: messages: expected a user's and then"):
        read_examples([rows[0], {"id": "1", "messages": talks[0][:1]}])
    with pytest.raises(DataError, match="rows: row 1: message 0: expected one of the roles"):
        read_examples([sharegpt[0], {"conversations": [{"from": "robot", "value": "x"}]}])
    # Beside two texts, messages are named as not used.
    both = read_examples([{**row, "input": "i", "target": "t"} for row in rows])
    assert both[0] == {"input": "i", "target": "t"} and "'messages'" in "".join(both.notes())


TALK = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
CELLS = {
    **{name: name for name in ("input", "sentence", "text", "prompt", "target", "label", "output", "completion")},
    "instruction": "instruction", "choices": ["x", "y"], "messages": TALK,
    "conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "v"}], "history": TALK,
}  # fmt: skip


def texts_of(read, rows):
    try:
        return [(row["input"], row["target"], row.get("history", [])) for row in read(rows)]
    except ValueError as error:
        assert str(error).startswith(("rows: ", "example ")), error


def test_rows_in_memory_are_the_texts_of_a_table():
    """Of every set of columns, and of rows with different ones: both read the same texts, or one refuses by name."""
    sets = [names for n in range(1, 6) for names in itertools.combinations(CELLS, n)]
    draw, agreed = random.Random(0), 0
    for names in [[one] for one in sets] + [draw.choices(sets, k=2) for _ in range(3000)]:
        rows = [{name: CELLS[name] for name in row} for row in names]
        table, memory = texts_of(read_examples, rows), texts_of(check_examples, rows)
        assert table is None or memory is None or table == memory, names
        agreed += table is not None and table == memory
    assert agreed > 500
    assert check_examples([{"input": "i", "sentence": "s", "label": "l"}]) == [{"input": "s", "target": "l"}]
    with pytest.raises(ValueError, match="example 0: expected one text in 'input', got 'choices' beside it"):
        check_examples([{"input": "i", "target": "t", "choices": ["x"]}])
    with pytest.raises(DataError, match="row 1: expected the columns of the first row, got 'input', 'sentence', 'lab"):
        read_examples([{"input": "i", "label": "l"}, {"input": "i", "sentence": "s", "label": "l"}])
    with pytest.raises(DataError, match="row 0: messages: expected a list, got str"):
        read_examples([{"messages": "a"}])


def test_chosen_columns(tmp_path):
    path = put(tmp_path / "x.jsonl", lines([{"a": "s0", "b": "l0", "text": "t", "label": "w"}]))
    assert read_examples(path, "a", "b") == [{"input": "s0", "target": "l0"}]
    assert read_examples(path, "a") == [{"input": "s0", "target": "w"}]
    assert read_examples(path, target_column="b") == [{"input": "t", "target": "l0"}]
    # A column that is chosen for one side is no candidate for the other.
    path = put(tmp_path / "y.csv", "text,question,label\nt,q,l\n")
    assert read_examples(path, "question") == [{"input": "q", "target": "l"}]
    with pytest.raises(DataError, match="expected the input column 'no', got the columns 'text', 'question', 'label'"):
        read_examples(path, "no")
    with pytest.raises(DataError, match="two different columns"):
        read_examples(path, "label", "label")


def test_text_is_not_touched(tmp_path):
    texts = [
        "  two\nlines  ",
        '{0.__class__} {x} %s "quoted" \\n',
        "<|endoftext|>",
        "\u202eabc\u200b",
        "\u4f60",
        "None",
    ]
    examples = read_examples(put(tmp_path / "a.json", [{"sentence": text, "label": text} for text in [*texts, "2020"]]))
    assert [row["input"] for row in examples] == [row["target"] for row in examples] == [*texts, "2020"]
    put(tmp_path / "b.csv", 'input,target\n"a ""b"", c\nd","{e}"\n,None\nNA,007\n')
    rows = [('a "b", c\nd', "{e}"), ("", "None"), ("NA", "007")]
    examples = read_examples(tmp_path / "b.csv")
    assert [(row["input"], row["target"]) for row in examples] == rows and examples.empty_inputs == 1


def test_directories(data_folder, tmp_path):
    assert read_examples(data_folder / "SUPERNI" / "task1_a") == PAIRS
    assert read_examples(data_folder / "SUPERNI", task="task1_b") == PAIRS
    assert read_examples(data_folder, task="task1_b", split="test") == PAIRS[:1]
    for task in (None, "task1", "TASK1_A", "../SUPERNI/task1_a", "", "task1_a/", "instructions.json"):
        # A part of a name, a path or another case is not a task: a wrong task would be scored without a sign.
        with pytest.raises(TaskNameError, match="task1_a"):
            read_examples(data_folder, task=task)
    for split in ("../x", "a/b", ""):
        with pytest.raises(DataError, match="split"):
            read_examples(data_folder, task="task1_a", split=split)
    put(tmp_path / "empty" / "x.txt", "x")
    with pytest.raises(DataError, match=r"expected train\.json or task folders"):
        read_examples(tmp_path / "empty")


def test_limit_and_conservation(tmp_path):
    rows = [{"sentence": f"s{i}", "label": "" if i % 3 == 1 else f"l{i}"} for i in range(10)]
    for name, text, where in (("a.json", rows, ["row 1", "row 4", "row 7"]),
                              ("a.jsonl", lines(rows), ["line 2", "line 5", "line 8"])):  # fmt: skip
        path = put(tmp_path / name, text)
        for limit in (1, 2, 4, 7, 8, 100, None):
            examples = read_examples(path, limit=limit, skip_empty=True)
            assert len(examples) == min(limit or 100, 7)
            assert examples.total == 10 == len(examples) + len(examples.skipped) + examples.unread
        assert [row["target"] for row in examples] == ["l0", "l2", "l3", "l5", "l6", "l8", "l9"]
        assert examples.skipped == where and "3 of the rows read with an empty label left out" in examples.notes()[0]
        # Rows behind the limit are counted and not looked at.
        assert read_examples(path, limit=1).unread == 9
    for limit in (0, -1):
        with pytest.raises(DataError, match="limit"):
            read_examples(path, limit=limit)
    with pytest.raises(DataError, match="expected at least one row with a label, got 1 rows and none"):
        read_examples([{"sentence": "s", "label": ""}], skip_empty=True)


def test_counts_of_what_is_odd():
    rows = [("a", "1"), ("a", "1"), ("a", "2"), ("b", "1"), ("a", "1"), ("", "1")]
    examples = read_examples([{"sentence": s, "label": t} for s, t in rows])
    assert (len(examples), examples.duplicates, examples.conflicts, examples.empty_inputs) == (6, 2, 1, 1)
    assert len(examples.notes()) == 3
    several = read_examples([{"input": "i", "output": ["first", "second"]}])
    assert several == [{"input": "i", "target": "first"}] and several.several_targets == 1


BAD_ROWS = {
    "empty label": ({"sentence": "s", "label": ""}, "expected a label in 'label', got an empty one"),
    "missing label": ({"sentence": "s"}, "expected the field 'label', got 'sentence'"),
    "empty row": ({}, "got an empty object"),
    "null label": ({"sentence": "s", "label": None}, "'label': expected text, got NoneType None"),
    "int sentence": ({"sentence": 1, "label": "a"}, "'sentence': expected text"),
    "other case": ({"Sentence": "s", "Label": "a"}, "expected the field 'sentence'"),
    "list row": (["s", "l"], "expected an object"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_bad_rows_are_named(tmp_path, name, kind):
    row, message = BAD_ROWS[name]
    rows = [*SENTENCES[:2], row, SENTENCES[2]]
    path = put(tmp_path / f"a.{kind}", rows if kind == "json" else lines(rows))
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert f"{path}: {'row 2' if kind == 'json' else 'line 3'}: " in str(caught.value) and message in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))
    assert len(read_examples(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "i", "output": []}, "got an empty list"),
        ({"input": "i", "output": ["a", None]}, "expected text"),
        ({"question": "q", "choices": ["u"], "answer": 1}, "expected the index of one of 1 choices, got 1"),
        ({"question": "q", "choices": "u, v", "answer": "u"}, "'choices': expected 1 to 26 choices"),
        ({"question": "q", "choices": {"label": ["A"], "text": ["u", "v"]}, "answer": "A"}, "each with a letter"),
        ({"instruction": None, "input": "i", "output": "o"}, "'instruction': expected text"),
    ],
)
def test_bad_outputs_and_choices_are_named(row, message):
    with pytest.raises(DataError, match="rows: row 0") as caught:
        read_examples([row])
    assert message in str(caught.value)


BAD_FILES = {
    "no rows": ("a.json", "[]", "expected a list of rows"),
    "first row is text": ("a.json", '["x"]', "row 0: expected an object"),
    "JSON lines named .json": ("a.json", lines(SENTENCES), "name the file .jsonl"),
    "unknown columns": ("a.json", '[{"x": "a", "y": "b"}]', "expected the input column (exactly one of input, sent"),
    "two inputs": ("a.json", '[{"text": "a", "question": "c", "label": "b"}]', "exactly one of"),
    "two targets": ("a.json", '[{"text": "a", "answer": "c", "label": "b"}]', "the target column"),
    "empty jsonl": ("a.jsonl", "\n \n", "got an empty file"),
    "second line broken": ("a.jsonl", lines(SENTENCES[:1]) + "{", "line 2: line 1 column 2: not valid JSON"),
    "empty csv": ("a.csv", "", "got an empty file"),
    "header only": ("a.csv", "text,label\n", "got 0 rows"),
    "header twice": ("a.csv", "text,label,text\na,b,c\n", "expected each column once"),
    "short row": ("a.csv", "text,label\na,b\nc\n", "line 3: expected 2 cells, got 1"),
    "long row": ("a.csv", "text,label\na,b,c\n", "line 2: expected 2 cells, got 3"),
    "open quote": ("a.csv", 'text,label\n"a,b\n', "not valid CSV"),
    "no ending": ("a", "[]", "expected a file name ending in"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, name):
    file, content, message = BAD_FILES[name]
    path = put(tmp_path / file, content)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
