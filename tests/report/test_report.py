"""The report of sequence runs: what is on the page is what the folders hold."""

import re
import shutil

import numpy as np
import pytest

from sapo_kernels.files import DataError
from sapo_peft.report import find_runs, write_report
from sapo_peft.report.charts import Series, _Scale, plot
from sapo_peft.report.compare import arms_of, difference
from sapo_peft.report.text import fixed, line, name, signed, visible, whole, word_diff
from sapo_peft.sequence.folder import read_run
from tests.cli import cli_helpers
from tests.cli.cli_helpers import one_line_error
from tests.report.report_runs import TWO, edit, make_run, page, read, sealed, small

sapo = cli_helpers.sapo
CELL = re.compile(r'<td class="(own|ahead|) ?(bad|)" style="--good:([\d.]+)">([^<]*)</td>')


def heat(html, title):
    """(good, place, figure) of every cell of the tables under a measure's heading, table by table."""
    [part] = [one for one in html.split("<h3>") if one.startswith(title)]
    return [[(float(g) * (-1 if bad else 1), place, float(text.replace("\u2212", "-")))
             for place, bad, g, text in CELL.findall(table)] for table in part.split("</table>")[:-1]]  # fmt: skip


def test_numbers_are_those_of_the_folder(tmp_path):
    run = make_run(tmp_path / "run")
    html, text = page(run)
    assert html.startswith("<!DOCTYPE html>") and text.startswith(
        "4 tasks in a row, trained with prompts chosen by SAPO"
    )
    results = read(run / "results.json")
    for choice, scores in zip(results["choices"], sorted(run.rglob("scores.json")), strict=True):
        assert choice["prompt"] in text and choice["original"] in text
        gap = signed(choice["loss"] - choice["original_loss"], 4)
        assert (f"less that of the original: {gap}." in text) == (choice["index"] > 0)
        assert f", loss {choice['loss']:.4f}" in text
        scorings = read(scores)["scorings"]
        for old, new in zip(scorings, scorings[1:], strict=False):
            told = f"step {new['step']} (drift): {old['chosen']} \u2192 {new['chosen']}"
            assert (told in text) == (old["chosen"] != new["chosen"])
    for measure, title in (("rougeL", "ROUGE-L"), ("exact_match", "Exact match")):
        cells, values = heat(html, title)[0], [v for row in results["metrics"][measure]["R"] for v in row]
        assert [shown for _, _, shown in cells] == [round(100 * v, 1) for v in values]
        assert [good for good, _, _ in cells] == [round(v, 2) for v in values]
        assert [place for _, place, _ in cells].count("own") == 4
    spent = [results["cost"][f"{part}_seconds"] for part in ("score", "train", "eval")]
    assert f"{100 * spent[0] / sum(spent):.1f} % Of the" in text and "91,234 tokens" in text
    assert re.search(rf"whole run \S+ \S+ \S+ {100 * spent[0] / sum(spent):.1f} 364,936 ", text)
    for told in ("AP, average performance (ROUGE-L) %.1f" % (100 * results["metrics"]["rougeL"]["AP"]),
                 "labels were cut at 128 tokens", "1 row left out", "text 3.2 good answer 0.2 answer 3.2",
                 "text 4.2 good answer 0.2 answer 4.2",
                 "One run says nothing about whether choosing helped"):  # fmt: skip
        assert told in text
    assert 'class="compare"' not in html


@pytest.mark.parametrize("measure", ["rougeL", "loss"])
def test_the_baseline_stands_beside_a_run(tmp_path, measure):
    """Its matrix and the differences, blue where the run is better; its training loss in the same chart."""
    policies = ("sapo", "worst", "original")
    html, text = page(*(small(tmp_path / policy, policy, measures=(measure,)) for policy in policies))
    ours, theirs, gaps = heat(html, "ROUGE-L" if measure == "rougeL" else "Loss of the targets")
    sign = 1 if measure == "rougeL" else -1
    for (_, _, a), (_, _, b), (good, _, gap) in zip(ours, theirs, gaps, strict=True):
        assert gap == pytest.approx(a - b, abs=0.11) and sign * good * gap >= 0
    assert max(abs(good) for good, _, _ in gaps) == 1
    # One direction of colour: the better, the bluer.
    best = sorted(ours, key=lambda cell: sign * cell[2])
    assert [good for good, _, _ in best] == sorted(good for good, _, _ in ours)
    value = read(tmp_path / "original" / "results.json")["metrics"][measure]["AP"]
    assert f"%, original {100 * value:.1f}" in text if sign > 0 else f"nats per token, original {value:.3f}" in text
    assert ("below 0 is forgetting" in text) == (sign > 0) and ("above 0 is forgetting" in text) == (sign < 0)
    charts = re.findall(r'<svg[^>]*aria-label="Training loss.*?</svg>', html)
    assert [re.findall(r'class="line (\w+)"', chart) for chart in charts] == [["original", "used"]] * 2


@pytest.mark.parametrize(("policy", "done", "told"), [
    ("original", 2, ["trained with the original prompts", "Not scored: this policy", "another prompt 0 of 2"]),
    ("sapo", 1, ["This run is not finished: 1 of 2 tasks are done"]),
    ("sapo", 0, ["No task is finished yet, so no prompt", "so there are no scores", "nothing has been measured"]),
    ("sample", 2, ["draws a prompt for every example"])])  # fmt: skip
def test_what_is_missing_is_reported(tmp_path, policy, done, told):
    html, text = page(small(tmp_path / "run", policy, done=done))
    assert all(sentence in text for sentence in told) and html.count("<section ") == 4
    assert ">None<" not in html and "nan" not in text.lower().split()


def test_a_task_that_left_the_original_for_a_while_is_counted(tmp_path):
    run = small(tmp_path / "run", tasks=["one"])
    scores = run / "tasks" / "01-one" / "scores.json"
    for i, chosen in enumerate((0, 1, 0)):
        edit(scores, "scorings", i, "chosen", value=chosen)
    edit(scores, "chosen", value=0)
    _, text = page(sealed(run))
    assert "Tasks trained on another prompt 1 of 1" in text and "Original, which was kept" in text


def test_differences_are_paired_by_seed(tmp_path):
    runs = [small(tmp_path / f"sapo-{seed}", "sapo", seed) for seed in (0, 1, 2)]
    runs += [small(tmp_path / f"original-{seed}", "original", seed) for seed in (2, 1, 7)]
    read_runs = [read_run(run) for run in runs]
    found = difference(*arms_of(read_runs[0], read_runs), "rougeL", "BWT")
    level = {run.name: read(run / "results.json")["metrics"]["rougeL"]["BWT"] for run in runs}
    assert found.values == [level[f"sapo-{seed}"] - level[f"original-{seed}"] for seed in (1, 2)]
    # Student's 97.5 % point with one degree of freedom; the standard error of two values is half their distance.
    half = 12.7062 * abs(found.values[0] - found.values[1]) / 2
    assert found.interval == pytest.approx((found.mean - half, found.mean + half), rel=1e-4)
    assert found.mean == sum(found.values) / 2
    assert re.search(rf"BWT original 3 \S+ {re.escape(signed(100 * found.mean))} 2 ", page(*runs)[1])


def test_verdicts(tmp_path):
    """Every seed better by much is better; a difference of both signs is not shown as one."""
    for seed in range(3):
        for policy, gain in {"sapo": 0.0, "original": -0.3, "worst": 0.08 if seed % 2 else -0.08}.items():
            small(tmp_path / f"{policy}-{seed}", policy, seed, tasks=["one"], gain=gain)
    _, text = page(tmp_path / "sapo-0", tmp_path)
    assert re.search(r"AP original 3 \S+ \+\d\S+ 3 \+\S+ to \+\S+ better ", text)
    assert re.search(r"AP worst 3 \S+ \S+ 3 \u2212\S+ to \+\S+ no difference shown ", text)


@pytest.mark.parametrize("change", ["method", "data", "tasks"])
def test_other_runs_are_not_compared(tmp_path, change):
    one = small(tmp_path / "one")
    other = small(tmp_path / "other", "original", **({"tasks": TWO[::-1]} if change == "tasks" else {}))
    if change != "tasks":
        edit(other / "run.json", change, value={"base": "0123"} if change == "data" else "another")
        sealed(other)
    html, text = page(one, other)
    assert "1 run given, of another method" in text and "less original" not in text and 'id="comparison"' not in html


def test_what_a_comparison_lacks_is_reported(tmp_path):
    one = small(tmp_path / "a")
    _, text = page(one, small(tmp_path / "b", "original", options={"learning_rate": 0.5}))
    assert "1 none one pair, which cannot tell an effect from chance" in text
    assert "AP original (learning_rate=0.5) 1" in text
    _, text = page(one, small(tmp_path / "c", "worst", done=1), small(tmp_path / "d", options={"drift": 2.0}))
    assert "1 run not finished: not compared" in text and "AP worst 0 none BWT" in text
    assert "AP sapo 1" in text and "AP sapo (drift=2.0) 1" in text


def test_the_same_run_twice(tmp_path):
    run = small(tmp_path / "a")
    shutil.copytree(run, tmp_path / "b")
    with pytest.raises(DataError, match=r"b: expected each run once, got policy 'sapo' with seed 0 in .*a too"):
        write_report([run, tmp_path / "b"])
    # The same folder by two names is one run.
    (tmp_path / "link").symlink_to(run)
    write_report([run, tmp_path / "link", run / ".." / "a"])


def test_a_folder_of_runs(tmp_path):
    for method in ("lora-inc", "o-lora"):
        for policy in ("worst", "sapo", "original"):
            for seed in (1, 0):
                small(tmp_path / method / policy / str(seed), policy, seed, method=method, tasks=["one"], prompts=2)
    small(tmp_path / "o-lora" / ".being-written")
    assert len(find_runs([tmp_path])) == 12
    html, text = page(tmp_path)
    assert (tmp_path / "report.html").read_text() == html
    assert "lora-inc" not in text.partition("seed 0")[0] and "trained with prompts chosen by SAPO" in text
    assert re.search(r"AP sapo 2 .* AP original 2 \S+ \S+ 2 .* AP worst 2 ", text)
    assert "6 runs given, of another method" in text and html.count("<caption>ROUGE-L, %</caption>") == 1
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)
    # The same folders give the same bytes, which do not say where they lay.
    assert page(shutil.copytree(tmp_path, tmp_path / "again"))[0] == html and str(tmp_path) not in html


def test_numbers_and_texts():
    assert [fixed(-0.00001, 2), fixed(None, 2), fixed(-1.5, 1)] == ["0.00", "\u2013", "\u22121.5"]
    assert [signed(0.04), signed(0.05001), signed(-2, 0), whole(1234567)] == ["0.0", "+0.1", "\u22122", "1,234,567"]
    assert visible("a\u200b\n\tb") == "a\\u200b\n\tb" and line("a\n b" * 99, 6) == "a ba \u2026"
    assert name("<a>_b") == "&lt;a&gt;_<wbr>b"
    one, other = word_diff("Read the long text.\nAnswer.", "Read this text.\n Answer now.")
    assert one == [("Read ", False), ("the long ", True), ("text.\n", False), ("Answer.", True)]
    assert other == [("Read ", False), ("this ", True), ("text.\n ", False), ("Answer now.", True)]
    assert word_diff("a " * 600, "b") == ([("a " * 600, False)], [("b", False)])


def test_charts_bear_any_numbers():
    """Ticks lie in the range, in order, and gaps interrupt a line."""
    ranges = [(0, 1), (3, 3), (-1e-9, 1e-9), (1e15, 1e15), (-5, 1234567), (0.61, 0.62)]
    for scale in (_Scale(ends, 0, 100, 0.0) for ends in ranges):
        places = [scale(tick) for tick in scale.ticks()]
        assert 2 <= len(places) <= 12 and np.all(np.diff(places) > 0) and -1e-6 <= places[0] <= places[-1] <= 100 + 1e-6
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None), (5, 2.0), (6, 1.0)]
    chart = plot([Series(points, "faint", title="prompt 1")], "losses", "step", "nats")
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


def test_command(tmp_path, sapo):
    run, file = small(tmp_path / "run"), tmp_path / "other.html"
    assert sapo("report", run) == (0, f"Report written to {run / 'report.html'}.\n", "")
    for _ in range(2):  # the second time over the first report
        assert sapo("report", run, "--out", file) == (0, f"Report written to {file}.\n", "")
    assert file.read_bytes() == write_report(run).read_bytes()
    mine = tmp_path / "notes.txt"
    mine.write_text("mine")
    one_line_error(sapo("report", run, "--out", mine), "expected no file or an older report, got another file")
    assert mine.read_text() == "mine" and sapo("report", run, "--out", mine, "--overwrite")[0] == 0
    one_line_error(sapo("report", run, "--out", tmp_path / "no" / "where.html"), "No such file or directory")
    one_line_error(sapo("report", tmp_path / "nowhere"), "expected the folder of a run, got no such path")
    (tmp_path / "empty").mkdir()
    one_line_error(sapo("report", tmp_path / "empty"), "run.json", "got none")
    (run / "run.json").write_text("[")
    one_line_error(sapo("report", run), "run.json", "not valid JSON")
