"""The report of sequence runs: text from outside stays text, nothing is fetched, and damaged folders are refused."""

import json
import random
import re
import shutil

import pytest

from sapo_kernels.files import DataError
from sapo_peft.report import write_report
from sapo_peft.report.markup import MAX_BLOCK, block
from tests.cli import cli_helpers
from tests.report.report_runs import make_run, page, read, section, small

# Outside text


HOSTILE = (
    "</style><script>alert('x')</script> \"'&\u202e\u2066\x07 {0} %s \n\n<b>second\tparagraph</b> "
    "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587"
)


OUTSIDE = {"prompts", "notes", "warnings", "prompt", "original", "reason", "suffix", "model"}


def spoiled(value, key=""):
    """`value` with every text under one of the keys `OUTSIDE` replaced."""
    if isinstance(value, dict):
        return {name: spoiled(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key in OUTSIDE else value


def test_outside_text_stays_text(tmp_path):
    names = {"order": "<i>order</i>\u202e", "tasks": ["<u>one</u>", "two&amp;"], "options": {"<x>": "<y>"}}
    run = small(tmp_path / "run<b>", **names)
    for path in run.rglob("*.json"):
        cli_helpers.put(path, spoiled(read(path)))
    html, text = page(run)
    body = html.split("</head>")[1]
    assert not re.search(r"<(script|i>|u>|b>second|y>|x>)", body) and html.count("</style>") == 1
    assert "&lt;/style&gt;&lt;script&gt;" in html and "&lt;u&gt;one" in html
    assert not re.search("[\u202e\u2066\x07]", html)
    assert '<span class="esc">\\u202e</span>' in html and '<span class="esc">\\x07</span>' in html
    assert "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587" in text
    assert "&lt;b&gt;second\tparagraph" in section(html, "chosen")
    # Tags are balanced, so nothing of the outside closed or opened one.
    for tag in ("div", "section", "table", "svg", "bdi", "span", "p", "li", "details", "figure"):
        assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_nothing_is_fetched(tmp_path):
    html, _ = page(make_run(tmp_path / "run"))
    assert not re.search(r"\b(src|href)=(?!\"#)", html) and "url(" not in html and "@import" not in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "default-src 'none'" in html.split("<title>")[0]


def test_size_is_bounded(tmp_path):
    """Long prompts, many prompts and many scorings: shown in part, and the rest is counted."""
    run = small(tmp_path / "run", prompts=90, scorings=600, tasks=["one"])
    path = run / "tasks" / "01-one" / "scores.json"
    scores, results = read(path), read(run / "results.json")
    index = results["choices"][0]["index"]
    scores["prompts"][index] = results["choices"][0]["prompt"] = "long " * 200_000
    cli_helpers.put(path, scores)
    cli_helpers.put(run / "results.json", results)
    html, text = page(run)
    assert len(html) < 3_000_000
    assert "980\u202f000 further characters are not shown" in text
    assert "of 600 scorings are drawn" in text and "lines of prompts that were never in use are left out" in text
    assert len(block("x" * (MAX_BLOCK + 1), "long")) < MAX_BLOCK + 400


# Damaged folders


def damage(run, name, *keys, value):
    path = next(run.rglob(name)) if name != "run.json" else run / name
    data = read(path)
    at = data
    for key in keys[:-1]:
        at = at[key]
    if value is KeyError:
        del at[keys[-1]]
    else:
        at[keys[-1]] = value
    cli_helpers.put(path, data)


DAMAGE = [
    ("run.json", ("version",), 2, "'version': wanted 1, got 2"),
    ("run.json", ("kind",), "train", "wanted 'sequence', got 'train'"),
    ("run.json", ("status",), "lost", "wanted 'running' or 'done', got 'lost'"),
    ("run.json", ("seed",), 1.5, "'seed': wanted a whole number, got 1.5"),
    ("run.json", ("seed",), True, "wanted a whole number, got True"),
    ("run.json", ("tasks",), [], "'tasks': wanted 1 to 256 entries, got 0"),
    ("run.json", ("tasks",), ["a", "a"], "wanted each task once"),
    ("run.json", ("tasks",), ["a", "b"], "results.json: 'tasks': wanted the tasks of run.json, ['a', 'b']"),
    ("run.json", ("method",), KeyError, "wanted the key 'method'"),
    ("run.json", ("warnings",), "none", "'warnings': wanted a list, got 'none'"),
    ("run.json", ("order",), "x" * 301, "wanted at most 300 characters, got 301"),
    ("results.json", ("metrics", "rougeL", "R"), [[0.5, 0.5]], "'R': wanted 3 entries, got 1"),
    ("results.json", ("metrics", "rougeL", "R", 1, 1), 1.5, "'R' 1 1: wanted at least 0 and at most 1.0, got 1.5"),
    ("results.json", ("metrics", "rougeL", "R", 1), [0.5], "'R' 1: wanted 2 entries, got 1"),
    ("results.json", ("metrics", "rougeL", "AP"), 0.99, "which follows from 'R', got 0.99"),
    ("results.json", ("metrics", "rougeL", "BWT"), None, "which follows from 'R', got None"),
    ("results.json", ("choices", 0, "task"), "other", "wanted a task of the run, each once, got 'other'"),
    ("results.json", ("choices", 0, "index"), 4, "'index': wanted at least 0 and at most 3, got 4"),
    ("results.json", ("choices", 0, "prompt"), "other", "the chosen prompt of results.json, 'other'"),
    ("results.json", ("cost", "train_seconds"), -1, "'train_seconds': wanted at least 0, got -1"),
    ("results.json", ("choices", 0, "prompts"), 5, "scores.json: 'prompts': wanted the 5 of results.json, got 4"),
    ("scores.json", ("scorings", 1, "loss"), [1.0], "'scorings' 1: 'loss': wanted 4 entries, got 1"),
    ("scores.json", ("scorings", 1, "loss", 2), "low", "'loss' 2: wanted a number, got 'low'"),
    ("scores.json", ("scorings", 0, "chosen"), 4, "'chosen': wanted at least 0 and at most 3, got 4"),
    ("scores.json", ("scorings", 0, "weights", 0), -0.5, "'weights' 0: wanted at least 0, got -0.5"),
    ("metrics.json", ("row", "rougeL", 0), 0.123, "metrics.json: 'row' 'rougeL' 0: wanted"),
    ("metrics.json", ("row",), {"rougeL": [0.5]}, "'rougeL': wanted 2 entries, got 1"),
    ("train.json", ("losses",), [[1, 2, 3]], "'losses' 0: wanted 2 entries, got 3"),
    ("data.json", ("rows", "train"), "many", "'train': wanted a whole number, got 'many'"),
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small(tmp_path_factory.mktemp("sound") / "run")


def test_damage_is_refused(sound, tmp_path):
    """Each fault alone, in one line that names the file, what was wanted and what was got; nothing is written."""
    for number, (name, keys, value, wanted) in enumerate(DAMAGE):
        run = shutil.copytree(sound, tmp_path / str(number))
        damage(run, name, *keys, value=value)
        with pytest.raises(DataError) as error:
            write_report(run)
        message = str(error.value)
        assert wanted in message and ".json" in message and "\n" not in message, message
        assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("", "wanted a JSON document"), ('{"version": NaN}', "wanted a finite number, got NaN"), ("{" * 99, "nesting")],
)
def test_what_is_no_json_is_refused(sound, tmp_path, text, wanted):
    run = shutil.copytree(sound, tmp_path / "run")
    (run / "results.json").write_text(text)
    with pytest.raises(DataError, match=wanted):
        write_report(run)


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
        data = json.loads(before)
        *way, last = draw.choice(list(places(data)))
        at = data
        for key in way:
            at = at[key]
        at[last] = draw.choice(values)
        path.write_text(json.dumps(data))
        try:
            html = write_report(run).read_text()
            assert "<script" not in html and "\u202e" not in html
            counts["written"] += 1
        except DataError as error:
            assert len(str(error)) < 1500 and str(error).isprintable()
            counts["refused"] += 1
        path.write_text(before)
    assert min(counts.values()) > 20, counts
