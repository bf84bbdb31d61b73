"""The report of sequence runs: text from outside stays text, nothing is fetched, and damaged folders are refused."""

import json
import random
import re
import shutil

import pytest

from sapo_kernels.files import DataError
from sapo_peft.report import write_report
from tests.report.report_runs import edit, make_run, page, read, small

HOSTILE = (
    "</style><script>alert('x')</script> \"'&\u202e\u2066\x07 {0} %s {{ 7*7 }} \n\n<b>second\tparagraph</b> "
    "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587"
)
OUTSIDE = {"prompts", "notes", "warnings", "prompt", "original", "reason", "suffix", "model", "input", "target",
           "answer", "started", "finished", "versions"}  # fmt: skip


def spoiled(value, key=""):
    """`value` with every text under one of the keys `OUTSIDE` replaced."""
    if isinstance(value, dict):
        return {name: spoiled(item, key if key in OUTSIDE else name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key in OUTSIDE else value


def test_outside_text_stays_text(tmp_path):
    names = {"order": "<i>order</i>\u202e", "tasks": ["<u>one</u>", "two&amp;"], "options": {"<x>": "<y>"}}
    run = small(tmp_path / "run<b>", answers=True, **names)
    for path in run.rglob("*.json"):
        path.write_text(json.dumps(spoiled(read(path))))
    # One that was drawn from a folder of runs has another heading.
    for runs in ((run, small(tmp_path / "other", "original", **names)), (tmp_path,)):
        html, text = page(*runs, out=tmp_path / "report.html")
        body = html.split("</head>")[1]
        assert not re.search(r"<(script|i>o|u>|b>second|y>|x>)", body) and html.count("</style>") == 1
        assert "&lt;/style&gt;&lt;script&gt;" in html and "&lt;u&gt;one" in html and "{{ 7*7 }}" in html
        assert not re.search("[\u202e\u2066\x07]", html) and "\\u202e" in html and "\\x07" in html
        assert "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587" in text and "&lt;b&gt;second\tparagraph" in html
        # Tags are balanced, so nothing of the outside closed or opened one.
        for tag in (
            "div",
            "section",
            "table",
            "tr",
            "svg",
            "bdi",
            "span",
            "p",
            "ul",
            "li",
            "details",
            "figure",
            "th",
            "td",
        ):
            assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_nothing_is_fetched(tmp_path):
    html, _ = page(make_run(tmp_path / "run"))
    assert not re.search(r"\b(src|href)=(?!\"#)", html) and "url(" not in html and "@import" not in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "default-src 'none'" in html.split("<title>")[0]


def test_size_is_bounded(tmp_path):
    """Long prompts, many prompts and many scorings: shown in part, and the rest is counted."""
    run = small(tmp_path / "run", prompts=300, scorings=600, tasks=["t" * 300])
    index, long = read(run / "results.json")["choices"][0]["index"], "long " * 200_000
    edit(next(run.rglob("scores.json")), "prompts", index, value=long)
    edit(run / "results.json", "choices", 0, "prompt", value=long)
    html, text = page(run)
    assert len(html) < 1_500_000
    assert "(980,000 more characters)" in text and "the first 200 of 300" in text and " more. Last scoring" in text
    assert max(line.count(",") for line in re.findall(r'points="([^"]*)"', html)) <= 402


# Damaged folders

DAMAGE = [
    ("run.json", ("version",), 2, "'version': expected 1, got 2"),
    ("run.json", ("kind",), "train", "expected 'sequence', got 'train'"),
    ("run.json", ("status",), "lost", "expected 'running' or 'done', got 'lost'"),
    ("run.json", ("seed",), 1.5, "'seed': expected a valid integer, got 1.5"),
    ("run.json", ("seed",), True, "expected a valid integer, got True"),
    ("run.json", ("tasks",), [], "'tasks': expected at least 1 item, got []"),
    ("run.json", ("tasks",), ["a", "a"], "expected each task once"),
    ("run.json", ("tasks",), ["a", "b"], "results.json: 'tasks': expected those of run.json, ['a', 'b']"),
    ("run.json", ("method",), KeyError, "'method': expected a value, got none"),
    ("run.json", ("more",), 1, "'more': expected no such key, got 1"),
    ("run.json", ("warnings",), "none", "'warnings': expected a valid list, got 'none'"),
    ("run.json", ("order",), "x" * 301, "'order': expected at most 300 characters, got 'xxx"),
    ("before.json", ("examples",), [1], "before.json: 'row' 'rougeL' 0: expected 1 entries, got 2"),
    ("results.json", ("metrics", "rougeL", "R"), [[0.5, 0.5]], "'R': expected N + 1 rows of N entries"),
    ("results.json", ("metrics", "rougeL", "R", 1), [0.5], "'R': expected N + 1 rows of N entries, got [2, 1, 2]"),
    ("results.json", ("metrics", "rougeL", "AP"), 0.99, "which follows from 'R', got 0.99"),
    ("results.json", ("metrics", "rougeL", "BWT"), None, "which follows from 'R', got None"),
    ("metrics.json", ("row",), {"bleu": [1.0, 1.0]}, "'row': expected one of rougeL, exact_match, loss, got 'bleu'"),
    ("results.json", ("choices", 0, "task"), "other", "expected the tasks of the run in order, got ['other'"),
    ("results.json", ("choices", 0, "index"), 4, "'index': expected less than 4, got 4"),
    ("results.json", ("choices", 0, "prompt"), "other", "chosen, 'other', got 4 with"),
    ("results.json", ("choices", 0, "prompts"), 5, "scores.json: 'prompts': expected the 5 of results.json"),
    ("results.json", ("cost", "train_seconds"), -1, "'train_seconds': expected greater than or equal to 0, got -1"),
    ("results.json", ("cost", "eval_seconds"), 1e308, "expected less than or equal to 1000000000000000, got 1e+308"),
    ("scores.json", ("scorings", 1, "loss"), [1.0], "'scorings' 1: 'loss': expected 4 entries, got 1"),
    ("scores.json", ("scorings", 1, "loss", 2), "low", "'loss': 2: expected a valid number, got 'low'"),
    ("scores.json", ("scorings", 0, "chosen"), 4, "'scorings' 0: 'chosen': expected less than 4, got 4"),
    ("scores.json", ("scorings", 0, "weights", 0), -0.5, "'weights': 0: expected greater than or equal to 0, got -0.5"),
    ("metrics.json", ("row", "rougeL", 0), 0.123, "metrics.json: 'row' 'rougeL': expected ["),
    ("metrics.json", ("row", "rougeL"), [0.5], "'row' 'rougeL' 0: expected 2 entries, got 1"),
    ("metrics.json", ("row", "rougeL", 0), 1.5, "'row' 'rougeL' 0: expected at most 1, got 1.5"),
    ("metrics.json", ("answers",), [[]], "'answers': expected 2 entries, got 1"),
    ("train.json", ("losses",), [[1, 2, 3]], "'losses': 0: expected at most 2 items, got [1, 2, 3]"),
    ("data.json", ("rows", "train"), "many", "'train': expected a valid integer, got 'many'"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small(tmp_path_factory.mktemp("sound") / "run", answers=True)


@pytest.mark.parametrize(("name", "keys", "value", "expected"), DAMAGE)
def test_damage_is_refused(sound, tmp_path, name, keys, value, expected):
    """Each fault alone, in one line that names the file, what was expected and got; nothing is written."""
    run = shutil.copytree(sound, tmp_path / "run")
    edit(next(run.rglob(name)), *keys, value=value)
    with pytest.raises(DataError) as error:
        write_report(run)
    message = str(error.value)
    assert expected in message and ".json: " in message and "\n" not in message, message
    assert not (run / "report.html").exists()


def test_random_damage_never_escapes(sound, tmp_path):
    """Values of the wrong kind at random places: a report or a `DataError`, and no foreign markup."""
    draw = random.Random(5)
    run = shutil.copytree(sound, tmp_path / "run")
    values = [
        None,
        True,
        -1,
        2,
        10**40,
        1e300,
        0.5,
        "",
        "</script><script>",
        "\u202e",
        "a" * 5000,
        [],
        {},
        [None],
        [[]],
    ]

    def places(value, keys=()):
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from places(item, (*keys, key))
        if keys:
            yield keys

    counts = {"written": 0, "refused": 0}
    files = sorted(run.rglob("*.json"))
    for _ in range(150):
        path = draw.choice(files)
        before = path.read_text()
        edit(path, *draw.choice(list(places(json.loads(before)))), value=draw.choice(values))
        try:
            html = write_report(run).read_text()
            assert "<script" not in html and "\u202e" not in html
            counts["written"] += 1
        except DataError as error:
            assert len(str(error)) < 1500 and str(error).isprintable()
            counts["refused"] += 1
        path.write_text(before)
    assert min(counts.values()) > 20, counts
