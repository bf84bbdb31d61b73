"""Task data of a sequence: orders in SuperNI layout, files, datasets; every row is accounted for."""

from __future__ import annotations

import pytest
from datasets import Dataset

from sapo_kernels.files import DataError
from sapo_peft import PromptPool, read_examples
from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.sequence import SequenceTask, read_order, read_tasks
from sapo_peft.tiny_random import tiny_tokenizer
from tests.cli.cli_helpers import put

POOL = PromptPool.build("t", "Say it.", ["Speak."])


def pairs(*texts):
    return [{"input": text, "target": target} for text, target in texts]


def entry(name):
    return {"sampling strategy": "full", "dataset_name": name}


RANDOM = {**entry("task1_a_long"), "sampling strategy": "random"}


@pytest.fixture
def data(tmp_path):
    """Two tasks whose names contain each other, an order over them, prompts."""
    base = tmp_path / "data"
    names = ["task1_a", "task1_a_long"]
    for name in names:
        put(base / "SUPERNI" / name / "train.json", [{"sentence": f"{name} {i}", "label": "yes"} for i in range(4)])
        put(base / "SUPERNI" / name / "test.json", [{"sentence": f"{name} test", "label": "no"}])
    put(base / "SUPERNI" / "instructions.json", {n: {"instruction": f"Do {n}.", "suffix": "Now."} for n in names})
    put(base / "paraphrases.json", {n: [f"Please do {n}."] for n in names})
    for number, name in enumerate(reversed(names), 1):
        stage = base / "CL_configs" / "order" / "mine" / f"{number}-x"
        put(stage / "train_tasks.json", [entry(name)])
        put(stage / "dev_tasks.json", [])
        put(stage / "test_tasks.json", [entry(n) for n in names])
    return base


@pytest.mark.parametrize("folder", [".", "SUPERNI"])
def test_an_order_is_read_by_exact_names(data, folder):
    tasks = read_order(data / folder, "mine")
    assert [task.name for task in tasks] == ["task1_a_long", "task1_a"]
    assert tasks[1].train[0] == {"input": "task1_a 0", "target": "yes"} and len(tasks[1].train) == 4
    assert tasks[0].pool.prompts == ("Do task1_a_long.", "Please do task1_a_long.")
    assert tasks[0].rows == {"train": 4, "test": 1} and tasks[0].notes == ()


def train(stage, value):
    put(stage / "train_tasks.json", value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d, s: train(s, [entry("task1")]), "exact name 'task1'"),
        (lambda d, s: train(s, [entry("../SUPERNI/task1_a")]), "exact name"),
        (lambda d, s: train(s, [entry("task1_a")]), "no earlier stage has, got ['task1_a']"),
        (lambda d, s: train(s, []), "expected one task to train on, which no earlier stage has, got []"),
        (lambda d, s: train(s, {"a": 1}), "expected a valid array, got {'a': 1}"),
        (lambda d, s: train(s, [{"dataset_name": 3}]), "0 'dataset_name': expected a valid string, got 3"),
        (lambda d, s: train(s, [RANDOM]), "'sampling strategy': expected 'full', got 'random'"),
        (lambda d, s: train(s, "[{"), "not valid JSON"),
        (lambda d, s: put(s / "test_tasks.json", [entry("task9")]), "that the order trains on, got 'task9'"),
        (lambda d, s: (s / "train_tasks.json").unlink(), "train_tasks.json"),
        (lambda d, s: s.rename(s.with_name("3-x")), "no number missing"),
        (lambda d, s: put(d / "SUPERNI/task1_a/train.jsonl", '{"input": "a", "target": "b"}'), "one file train"),
        (lambda d, s: (d / "SUPERNI/task1_a/test.json").unlink(), "one file test"),
        (lambda d, s: put(d / "TRACE/task1_a/train.json", []), "expected one folder with the exact name 'task1_a'"),
        (lambda d, s: put(d / "SUPERNI/instructions.json", {"x": {"instruction": "y"}}), "task1_a_long"),
    ],
)
def test_a_faulty_order_is_refused_by_name(data, change, words):
    change(data, data / "CL_configs" / "order" / "mine" / "1-x")
    with pytest.raises((DataError, OSError)) as error:
        read_order(data, "mine")
    assert words in str(error.value)


def test_an_unknown_order_names_those_there_are(data):
    for order in ("other", "../order/mine", "", "mine/1-x"):
        with pytest.raises(DataError, match="there are: 'mine'"):
            read_order(data, order)
    with pytest.raises(DataError, match="nowhere: expected an order .* got 'other' "):
        read_order(data / "nowhere", "other")


def test_rows_are_conserved_and_faults_are_reported():
    train = pairs(("a", "1"), ("a", "1"), ("b", "1"), ("b", "2"), ("c", " "), ("d", ""))
    test = pairs(("a", "1"), ("b", "3"), ("new", "1"))
    task = SequenceTask.build("t", train, test, POOL)
    assert task.rows == {"train": 6, "test": 3}
    assert len(task.train) == 4 and len(task.test) == 3
    notes = "\n".join(task.notes)
    for words in (
        "2 of the rows read with an empty label left out",
        "1 of 3 test rows are in train too, with the same label",
        "1 of 3 test rows are in train too, with another label",
    ):
        assert words in notes
    assert len(task.notes) == 5


def test_references_digests_and_chosen_columns():
    several = [{"input": "a", "output": ["1", "2"]}, {"input": "b", "output": ["3"]}]
    task = SequenceTask.build("t", several, several, POOL)
    assert [row["target"] for row in task.train] == ["1", "3"] and task.references == (("1", "2"), ("3",))
    assert task.used(1, 1).references == (("1", "2"),)
    other = SequenceTask.build("t", several, [{"input": "a", "output": ["1", "4"]}, several[1]], POOL)
    assert task.digest() != other.digest()
    wide = Dataset.from_list([{"text": "x", "question": "q", "answer": "a"}])
    with pytest.raises(DataError, match="exactly one of"):
        SequenceTask.build("t", wide, wide, POOL)
    chosen = read_examples(wide, "text", "answer")
    task = SequenceTask.build("t", chosen, chosen, POOL)
    assert task.train == ({"input": "x", "target": "a"},)


@pytest.mark.parametrize("rows, error, words", [
    (iter([]), TypeError, "train: expected a list of rows or a Dataset"),
    ([{"input": "a", "target": 3.5}], DataError, "train: row 0: 'target': expected text, got float"),
    ([{"input": "a", "target": ""}], DataError, "at least one row with a label"),
    (None, DataError, "train: expected rows, got none"),
])  # fmt: skip
def test_rows_of_another_kind_are_refused(rows, error, words):
    with pytest.raises(error) as found:
        SequenceTask.build("t", rows, pairs(("a", "b")), POOL)
    assert words in str(found.value)


@pytest.mark.parametrize("name", [" ", "a\nb", "x" * 301, 3])
def test_names_of_another_kind_are_refused(name):
    with pytest.raises(DataError, match="task: expected a printable name"):
        SequenceTask.build(name, pairs(("a", "b")), pairs(("a", "b")), POOL)


@pytest.mark.parametrize("order", ["bundled_a", "bundled_b"])
def test_the_bundled_orders(order):
    tasks = read_order(BUNDLED_DIR, order)
    assert len(tasks) == 6 and len({task.name for task in tasks}) == 6
    for task in tasks:
        assert len(task.train) >= 1000 and len(task.test) >= 200 and len(task.pool.prompts) >= 21
        assert task.notes == () and task.pool.checked(tiny_tokenizer()).notes() == []


def test_tasks_by_name_in_any_order():
    names = ["task06_order_items", "task01_product_note_polarity"]
    assert [task.name for task in read_tasks(BUNDLED_DIR, names)] == names
    with pytest.raises(DataError, match="1 to 256"):
        read_tasks(BUNDLED_DIR, [])
