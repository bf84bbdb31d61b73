"""The bundled tasks: sizes, prompts, clean splits, and labels worked out again without the generator."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sapo_peft.assets import BUNDLED_DIR, task_names
from tests.conftest import ROOT
from tools.bundled_tasks import make_tasks

SIZES = {"train": 1000, "dev": 100, "test": 200}
TASKS = task_names()


def load(path):
    return json.loads((BUNDLED_DIR / path).read_text(encoding="utf-8"))


INSTRUCTIONS = load("SUPERNI/instructions.json")
PARAPHRASES = load("paraphrases.json")
ROWS = {task: {split: load(f"SUPERNI/{task}/{split}.json") for split in SIZES} for task in TASKS}


def normal(text):
    return " ".join(text.lower().split())


def all_rows(task):
    return [row for split in SIZES for row in ROWS[task][split]]


def named(part):
    """The one task with this word in its name."""
    (task,) = [task for task in TASKS if part in task]
    return task


def test_there_are_six_tasks_and_nothing_else():
    assert len(TASKS) >= 6
    assert sorted(path.name for path in (BUNDLED_DIR / "SUPERNI").iterdir() if path.is_dir()) == sorted(TASKS)
    assert sorted(PARAPHRASES) == sorted(TASKS)
    assert sum(path.stat().st_size for path in BUNDLED_DIR.rglob("*.json")) < 2.5 * 2**20


@pytest.mark.parametrize("task", TASKS)
def test_prompts(task):
    entry, prompts = INSTRUCTIONS[task], PARAPHRASES[task]
    assert set(entry) == {"instruction", "suffix", "labels", "size"} and entry["size"] == list(SIZES.values())
    assert entry["instruction"].strip() and entry["suffix"].strip() and len(prompts) >= 20
    assert all(prompt == prompt.strip() and prompt for prompt in prompts)
    assert len({normal(prompt) for prompt in [*prompts, entry["instruction"]]}) == len(prompts) + 1
    assert not any(normal(entry["suffix"]) in normal(prompt) for prompt in prompts)
    for label in entry["labels"]:
        if label in entry["instruction"]:
            assert all(re.search(rf"\b{re.escape(label)}\b", prompt) for prompt in prompts), label
    # Wording and form vary: from one short line to several sentences or a list.
    lengths = sorted(map(len, prompts))
    assert lengths[0] < 70 and lengths[-1] > 200 and len({prompt.split()[0] for prompt in prompts}) >= 12
    assert any("\n" in prompt for prompt in prompts) and any("?" in prompt for prompt in prompts)


@pytest.mark.parametrize("task", TASKS)
def test_rows(task):
    """Complete, with known labels in like numbers, and no input twice: neither duplicates nor leaks nor conflicts."""
    assert {split: len(rows) for split, rows in ROWS[task].items()} == SIZES
    labels = INSTRUCTIONS[task]["labels"]
    for row in all_rows(task):
        assert set(row) == {"sentence", "label"} and all(text == text.strip() and text for text in row.values())
        assert not re.search(r"[{}]|  ", row["sentence"] + row["label"]), "an unfilled or empty template field"
        assert not labels or row["label"] in labels
    for split, rows in ROWS[task].items() if labels else ():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(labels) and min(counts.values()) > 0.8 * len(rows) / len(labels), split
    assert max(Counter(normal(row["sentence"]) for row in all_rows(task)).values()) == 1


def test_no_set_of_items_twice():
    """The same words or items in another order, layout or direction would be a leak too."""
    for task in (named("odd_one"), named("order")):
        counts = Counter(tuple(sorted(re.findall(r"[\w$°.:-]+", row["sentence"]))) for row in all_rows(task))
        assert max(counts.values()) == 1
    sets = [frozenset(row["label"].split(", ")) for row in all_rows(named("order"))]
    assert len(set(sets)) == len(sets)


def test_odd_word_fits_elsewhere_only():
    """Over all rows, the members seen for a group never include a word that is odd for that group."""
    members, odd = {}, {}
    groups = {"metals", "fruit", "days of the week", "musical instruments"}
    for row in all_rows(named("odd_one")):
        head = row["sentence"]
        group = next((g for g in groups if g in head.lower()), None)
        assert len(re.findall(rf"\b{re.escape(row['label'])}\b", head)) == 1
        if group:
            rest = set(re.findall(r"\w+", head.lower().replace(group, " "))) - {row["label"].lower()}
            members.setdefault(group, set()).update(rest)
            odd.setdefault(group, set()).add(row["label"].lower())
    assert set(members) == groups
    for group in groups:
        assert not members[group] & odd[group], group


def test_extracted_value_stands_once_in_the_message():
    shapes = {
        "city": r"[A-Z]\w+( [A-Z]\w+)?",
        "date": r"\d{4}-\d\d-\d\d|\d\d/\d\d/\d{4}|\d{1,2} [A-Z][a-z]+( \d{4})?|[A-Z][a-z]+ \d{1,2}(, \d{4})?",
        "amount": r"[$€£]\d+(\.\d\d)?|\d+ (euros|dollars)",
        "name": r"[A-Z]\w+ [A-Z]\w+",
    }
    fields = Counter()
    for row in all_rows(named("field")):
        (field,) = {
            match[0] or match[1]
            for match in re.findall(r"(?:Field|Wanted|Look for): (\w+)|^\[(\w+)\]", row["sentence"], re.MULTILINE)
        }
        fields[field] += 1
        assert row["sentence"].count(row["label"]) == 1, row
        assert re.fullmatch(shapes[field], row["label"]), row
    assert set(fields) == set(shapes) and min(fields.values()) > 300


def test_passive_keeps_the_words():
    """Subject and object change places around "by", and the time expression stays."""
    pronouns = {"she": "her", "he": "him", "they": "them", "we": "us"}
    for row in all_rows(named("passive")):
        active, passive = row["sentence"], row["label"]
        assert active.endswith(".") and passive.endswith(".") and passive[0].isupper() and " by " in passive
        assert re.search(r"\b(is|are|was|were|be|been|being)\b", passive)
        words = re.findall(r"[\w']+", active.lower())
        wanted = Counter(pronouns.get(word, word) for word in words)
        extra = wanted - Counter(re.findall(r"[\w']+", passive.lower()))
        # Only the verb, its auxiliary and "did" may differ from the active sentence.
        assert sum(extra.values()) <= 2, (row, extra)
        if ", " in active:
            assert passive.startswith(active.split(", ")[0] + ", ")


WORDS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
DIGITS = {word: str(number) for number, word in enumerate(WORDS, start=2)}
# A phrase that only one kind of problem has -> the answer from its numbers in the order of the text.
STORIES = {
    "more from": lambda a, b: a + b,
    "stay in the box": lambda a, b: a - b,
    "trays with": lambda a, b: a * b,
    "equally among": lambda a, b: a / b,
    "By how many points": lambda a, b: a - b,
    "A bus sets off": lambda a, b, c: a - b + c,
    "A ticket costs": lambda a, b, c: c - a * b,
    "Pens cost": lambda a, b, c, d: a * c + b * d,
    "years older": lambda a, b, c: a + b + c,
    "rides the train": lambda a, b: a + b,
    "metres of fence": lambda a, b: a + b + a + b,
    "square metres": lambda a, b: a * b,
    "twice as many": lambda a: a + 2 * a,
    "gave half of them": lambda a: a - a / 2,
    "A machine makes": lambda a, b: a * b,
    "saves": lambda a, b: a / b,
    "pages are left": lambda a, b, c: a - b * c,
    "After giving away": lambda a, b: a + b,
    "went missing": lambda a, b: a - b,
    "seats are free": lambda a, b, c: a * b - c,
    "How many legs": lambda a, b: 4 * a + 2 * b,
    "Only full boxes": lambda a, b: a - b * (a // b),
    "the oven": lambda a, b: a - b,
    "average": lambda a, b: (a + b) / 2,
    "voucher": lambda a, b, c: a - (b + c),
    "walk to school": lambda a, b, c: a + b + c,
    "loose": lambda a, b, c: c + a * b,
    "into teams of": lambda a, b: a / b,
    "A snail": lambda a, b, c: a * c - b * c,
    "doubles that number": lambda a, b: a + a - b,
    "A cyclist": lambda a, b, c: a * b + c,
    "A rope": lambda a, b, c: a - (b + c),
    "plates": lambda a, b, c: (a - b) / c,
    "together have": lambda a, b: a - b,
}
ASIDES = (
    r"^The clock shows \d+:00\. ",
    r"^It is day \d+ of .*?\. ",
    r"^Exercise \d+\. ",
    r"^At house .*? happens\. ",
)


def test_arithmetic_answers():
    seen, keys = Counter(), set()
    for row in all_rows(named("arithmetic")):
        text = re.sub("|".join(ASIDES), "", row["sentence"])
        (phrase,) = [phrase for phrase in STORIES if phrase in text]
        text = re.sub(r"\b(" + "|".join(DIGITS) + r")\b", lambda match: DIGITS[match[0]], text)
        numbers = tuple(int(number) for number in re.findall(r"\d+", text))
        answer = STORIES[phrase](*numbers)
        assert answer == int(row["label"]) and str(int(answer)) == row["label"], row
        assert 0 < answer < 1000
        assert (phrase, numbers) not in keys, "the same sum twice"
        keys.add((phrase, numbers))
        seen[phrase] += 1
    assert set(seen) == set(STORIES) and min(seen.values()) > 30


WEEK = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
YEAR = [
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
]


def _number(item):
    return int(re.findall(r"-?\d+", item)[-1])


def _clock(item):
    hours, minutes = item.split(" ")[-1].split(":")
    return 60 * int(hours) + int(minutes)


def _weight(item):
    return _number(item) * (1000 if item.endswith("kg") else 1)


def _span(item):
    return _number(item) * (60 if item.endswith("hours") else 1)


# (pattern for the rule, value of an item, pattern that means falling order); the first that fits counts.
RULES = (
    (r"last letter|final letter", lambda item: item[-1], r"Z to A|backwards"),
    (r"alphabetical", str, r"reverse|Z to A"),
    (
        r"\bweek\b|by day",
        lambda item: (WEEK.index(item.split(" ")[0]), _clock(item)),
        r"from the latest|Sunday first",
    ),
    (r"calendar|by month", YEAR.index, r"backwards|latest"),
    (r"time of day|clock time", _clock, r"from the latest|night"),
    (r"time span|duration", _span, r"from the longest|longest lasting"),
    (r"number of letters|shortest word|longest word", len, r"from the longest|most first"),
    (r"numerical|number to", _number, r"decreasing|from the largest"),
    (r"cheapest|by price", _number, r"from the most expensive|high to low"),
    (r"event|by year", _number, r"from the most recent|latest first"),
    (r"warmest|temperature", _number, r"from the warmest|highest first"),
    (r"lightest|weight", _weight, r"from the heaviest|greatest first"),
    (r"youngest|by age", _number, r"from the oldest|oldest first"),
)
ORDER_LAYOUT = re.compile(
    r"Rule: (?P<r1>.*)\nItems: (?P<i1>.*)|Items: (?P<i2>.*)\nRule: (?P<r2>.*)"
    r"|(?P<i3>.*)\nSort these (?P<r3>.*)\."
    r"|(?:Sort|Please arrange the following) (?P<r4>[^:]*): (?P<i4>.*)"
    r"|Order wanted: (?P<r5>.*)\. List: (?P<i5>.*)"
)


def test_order_of_items():
    seen = Counter()
    for row in all_rows(named("order")):
        parts = {key[0]: value for key, value in ORDER_LAYOUT.fullmatch(row["sentence"]).groupdict().items() if value}
        rule, items = parts["r"], parts["i"].split(", ")
        which, (_, value, falling) = next((n, rule_) for n, rule_ in enumerate(RULES) if re.search(rule_[0], rule))
        down = bool(re.search(falling, rule))
        ordered = sorted(items, key=value, reverse=down)
        assert len({value(item) for item in items}) == len(items), "a tie"
        assert ", ".join(ordered) == row["label"] and ordered != items, row
        seen[which, down] += 1
    assert len(seen) == 2 * len(RULES) and min(seen.values()) > 10


def test_task_orders():
    folders = [path for path in (BUNDLED_DIR / "CL_configs" / "order").iterdir() if path.is_dir()]
    orders = set()
    for folder in folders:
        trained = []
        for number, step in enumerate(sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[0])), start=1):
            place = step.relative_to(BUNDLED_DIR)
            (entry,), dev, test = (load(place / f"{split}_tasks.json") for split in SIZES)
            assert entry["sampling strategy"] == "full" and dev == []
            assert step.name == f"{number}-{entry['dataset_name'].split('_')[0]}"
            trained.append(entry["dataset_name"])
        assert sorted(trained) == sorted(TASKS) and [entry["dataset_name"] for entry in test] == trained
        orders.add(tuple(trained))
    assert len(folders) == len(orders) == 2


def test_generator_reproduces_the_files():
    command = [sys.executable, "-m", "tools.bundled_tasks.make_tasks", "--check"]
    paths = os.pathsep.join((str(ROOT), str(Path(BUNDLED_DIR).parents[2])))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_notices_changes(tmp_path, capsys):
    assert make_tasks.main(["--out", str(tmp_path)]) == 0
    assert make_tasks.main(["--out", str(tmp_path), "--check"]) == 0
    path = tmp_path / "SUPERNI" / TASKS[0] / "dev.json"
    path.write_bytes(path.read_bytes() + b"\n")
    (tmp_path / "SUPERNI" / TASKS[1] / "test.json").unlink()
    (tmp_path / "CL_configs" / "order" / "extra.json").write_text("[]")
    capsys.readouterr()
    assert make_tasks.main(["--out", str(tmp_path), "--check"]) == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        f"differs: SUPERNI/{TASKS[0]}/dev.json",
        f"missing: SUPERNI/{TASKS[1]}/test.json",
        "not generated: CL_configs/order/extra.json",
    ]
