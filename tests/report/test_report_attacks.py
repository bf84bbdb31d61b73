"""The report of sequence runs: text from outside stays text, nothing is fetched, and damaged folders are refused."""

import json
import random
import re
import shutil

import pytest

from sapo_kernels.files import DataError
from sapo_kernels.manifest import MANIFEST
from sapo_peft.report import write_report
from tests.report.report_runs import edit, page, read, sealed, small

HOSTILE = (
    "</style><script>alert('x')</script> \"'&\u202e\u2066\x07 {0} %s {{ 7*7 }} \n\n<b>second\tparagraph</b> "
    "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587"
)
OUTSIDE = {"prompts", "notes", "warnings", "prompt", "original", "reason", "suffix", "model", "input", "target",
           "answer", "started", "finished", "versions", "policy", "method"}  # fmt: skip


def spoiled(value, key=""):
    """`value` with every text under one of the keys `OUTSIDE` replaced."""
    if isinstance(value, dict):
        return {name: spoiled(item, key if key in OUTSIDE else name) for name, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item, key) for item in value]
    return HOSTILE if isinstance(value, str) and key in OUTSIDE else value


def test_outside_text_stays_text(tmp_path):
    names = {"order": "<i>order</i>\u202e", "tasks": ["<u>one</u>", "two&amp;"], "options": {"<x>": "<y>"}}
    run = small(tmp_path / "run<b>", **names)
    for path in run.rglob("*.json"):
        path.write_text(json.dumps(spoiled(read(path))))
    sealed(run)
    # A folder of runs makes other headings.
    for runs in ((run, small(tmp_path / "other", "original", **names)), (tmp_path,)):
        html, text = page(*runs, out=tmp_path / "report.html")
        body = html.split("</head>")[1]
        assert not re.search(r"<(script|i>o|u>|b>second|y>|x>)", body) and html.count("</style>") == 1
        assert "&lt;/style&gt;&lt;script&gt;" in html and "&lt;u&gt;one" in html and "{{ 7*7 }}" in html
        assert not re.search("[\u202e\u2066\x07]", html) and "\\u202e" in html and "\\x07" in html
        assert "\u0627\u0644\u0644\u063a\u0629 \u4e2d\u6587" in text and "&lt;b&gt;second\tparagraph" in html
        # Nothing is fetched.
        assert not re.search(r"<[^>]*\b(src|href)=(?!\"#)", html) and "url(" not in html and "@import" not in html
        assert "default-src 'none'" in html.split("<title>")[0]
        # Tags are balanced, so nothing of the outside closed or opened one.
        for tag in ("div", "section", "table", "tr", "svg", "bdi", "span", "p", "ul", "li", "details", "figure", "td"):
            assert len(re.findall(rf"<{tag}[ >]", html)) == html.count(f"</{tag}>"), tag


def test_size_is_bounded(tmp_path):
    """Long prompts, many prompts and many scorings: shown in part, and the rest is counted."""
    run = small(tmp_path / "run", prompts=300, scorings=600, tasks=["t" * 300])
    scores = next(run.rglob("scores.json"))
    edit(scores, "prompts", read(scores)["chosen"], value="long " * 200_000)
    sealed(run)
    html, text = page(run)
    assert len(html) < 1_500_000
    assert "(980,000 more characters)" in text and "the first 200 of 300" in text and " more. Last scoring" in text
    assert max(line.count(",") for line in re.findall(r'points="([^"]*)"', html)) <= 402


# Damaged folders

# A file, the keys that lead to a value, the value put there: what the message says.
DAMAGE = """
run version 1 : 'version': expected 2, got 1
run tasks ["a","b"] : expected this task of a finished run, got no folder
run more 1 : expected no key 'more', got one
before examples [1] : 'rougeL': expected 1 entries, got 2
scores scorings.1.loss [1.0] : 'scorings' 1 'loss': expected 4 entries, got 1
scores scorings.0.chosen 4 : 'chosen': expected less than 4, got 4
metrics row.rougeL.0 1e300 : 'row' 'rougeL' 0: expected less than or equal to 1000000000000000
metrics answers [[]] : 'answers': expected 2 entries, got 1
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return small(tmp_path_factory.mktemp("sound") / "run")


@pytest.mark.parametrize("fault", DAMAGE.strip().splitlines())
def test_damage_is_refused(sound, tmp_path, fault):
    """Each fault alone, in one line that names the file, what was expected and got; nothing is written."""
    name, keys, value = fault.partition(" : ")[0].split(" ", 2)
    run = shutil.copytree(sound, tmp_path / "run")
    keys = [int(key) if key.isdigit() else key for key in keys.split(".")]
    edit(next(run.rglob(f"{name}.json")), *keys, value=json.loads(value))
    sealed(run)
    with pytest.raises(DataError) as error:
        write_report(run)
    message = str(error.value)
    assert fault.partition(" : ")[2] in message and str(run) in message and "\n" not in message, message
    assert not (run / "report.html").exists()


def test_random_damage_never_escapes(sound, tmp_path):
    """Values of the wrong kind at random places: a report or a `DataError`, and no foreign markup."""
    draw = random.Random(5)
    run = shutil.copytree(sound, tmp_path / "run")
    values = [None, True, -1, 2, 10**40, 1e300, 0.5, "", "</script><script>", "\u202e", "a" * 5000, [], {}, [[]]]

    def places(value, keys=()):
        if isinstance(value, (dict, list)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from places(item, (*keys, key))
        if keys:
            yield keys

    counts = {"written": 0, "refused": 0}
    files = [file for file in sorted(run.rglob("*.json")) if file.name != MANIFEST]
    for _ in range(100):
        path = draw.choice(files)
        before = path.read_text()
        edit(path, *draw.choice(list(places(json.loads(before)))), value=draw.choice(values))
        sealed(run)
        try:
            html = write_report(run).read_text()
            assert "<script" not in html and "\u202e" not in html
            counts["written"] += 1
        except DataError as error:
            assert len(str(error)) < 1500 and str(error).isprintable()
            counts["refused"] += 1
        path.write_text(before)
    assert min(counts.values()) > 10, counts
