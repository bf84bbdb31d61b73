"""The report of sequence runs: what is on the page is what the folders hold."""

import re
import shutil

import numpy as np
import pytest

from sapo_kernels.files import DataError
from sapo_peft.report import MAX_DETAILED, write_report
from sapo_peft.report.charts import Series, _Scale, plot
from sapo_peft.report.compare import difference, group_runs, student_interval
from sapo_peft.report.runs import find_runs, read_run
from sapo_peft.report.text import fixed, line, name, signed, visible, whole, word_diff
from sapo_peft.sequence.schema import MEASURES
from tests.cli import cli_helpers
from tests.cli.cli_helpers import one_line_error
from tests.report.report_runs import TASKS, TWO, edit, make_run, page, read, section, small

sapo = cli_helpers.sapo
CELL = re.compile(r'<td class="(bad)? ?(own|ahead)?" style="--good:([\d.]+)">([^<]*)</td>')


def heat(html, title):
    """(good, place, text) of every cell of the tables under a measure's heading, table by table."""
    part = re.split("<h4>", section(html, "run1-scores"))
    [part] = [one for one in part if one.startswith(title)]
    return [[(float(g) * (-1 if bad else 1), place, text) for bad, place, g, text in CELL.findall(table)]
            for table in part.split("<table")[1:]]  # fmt: skip


def number(text):
    return float(text.replace("\u2212", "-"))


# What the page says


def test_numbers_are_those_of_the_folder(tmp_path):
    run = make_run(tmp_path / "run", answers=True)
    html, text = page(run)
    assert (
        html.startswith("<!DOCTYPE html>") and "<h1>4 tasks in a row, trained with prompts chosen by SAPO</h1>" in html
    )
    results, last = read(run / "results.json"), read(run / "tasks" / f"04-{TASKS[3]}" / "scores.json")
    for choice in results["choices"]:
        assert choice["prompt"] in text and choice["original"] in text
        gap = signed(choice["loss"] - choice["original_loss"], 4)
        assert f"loss {choice['loss']:.4f} ({gap})" in text or choice["index"] == 0
    for measure in ("rougeL", "exact_match"):
        [cells] = heat(html, MEASURES[measure].title)
        values = [v for row in results["metrics"][measure]["R"] for v in row]
        assert [number(shown) for _, _, shown in cells] == [round(100 * v, 1) for v in values]
        assert [good for good, _, _ in cells] == [round(v, 2) for v in values]
        assert [place for _, place, _ in cells].count("own") == 4
    assert f"<b>{100 * results['metrics']['rougeL']['AP']:.1f}</b>" in html and "AP, average performance" in text
    spent = [results["cost"][f"{part}_seconds"] for part in ("score", "train", "eval")]
    assert f"scoring: {spent[0]:.1f} s, {100 * spent[0] / sum(spent):.1f} %" in text and "91,234 tokens" in text
    assert "labels of task195_sentiment140 were cut at 128 tokens" in text and "1 row of test is also in train" in text
    assert "text 2 good answer 0.2 answer 4.2" in text
    # One run has nothing to be compared with: no bars and no baseline.
    assert "One run says nothing about whether choosing helped" in text and 'class="compare"' not in html
    switched = [(a["chosen"], b) for a, b in zip(last["scorings"], last["scorings"][1:], strict=False)
                if a["chosen"] != b["chosen"]]  # fmt: skip
    for old, scoring in switched:
        assert f"step {scoring['step']} ({scoring['reason']}): {old} \u2192 {scoring['chosen']}" in text


def test_the_baseline_stands_beside_a_run(tmp_path):
    """Its matrix and the differences, blue where the run is better; its training loss in the same chart."""
    runs = [small(tmp_path / "sapo"), small(tmp_path / "worst", "worst"), small(tmp_path / "original", "original")]
    html, text = page(*runs)
    ours, theirs, gaps = heat(html, "ROUGE-L")
    for (_, _, a), (_, _, b), (good, _, gap) in zip(ours, theirs, gaps, strict=True):
        assert number(gap) == pytest.approx(number(a) - number(b), abs=0.11) and good * number(gap) >= 0
    assert max(abs(good) for good, _, _ in gaps) == 1
    level = [read(run / "results.json")["metrics"]["rougeL"]["AP"] for run in runs]
    assert f"% , original {100 * level[2]:.1f}" in text.replace("%,", "% ,")
    for chart in re.findall(r'<svg[^>]*aria-label="Training loss.*?</svg>', html):
        assert re.findall(r'<polyline points="[^"]*" class="line (\w+)"', chart) == ["original", "used"]


def test_a_lower_loss_is_better(tmp_path):
    """A run that was evaluated by its loss alone: nats, no percentages, the lowest is the bluest."""
    runs = [small(tmp_path / f"{policy}-{seed}", policy, seed) for policy in ("sapo", "original") for seed in range(2)]
    for run in runs:
        edit(run / "results.json", "metrics", value={"loss": read(run / "results.json")["metrics"]["rougeL"]})
        for path in (run / "before.json", *run.glob("tasks/*/metrics.json")):
            edit(path, "row", value={"loss": read(path)["row"]["rougeL"]})
    html, text = page(*runs)
    ours, _, gaps = heat(html, "Loss of the targets")
    assert [good for good, _, _ in sorted(ours, key=lambda cell: number(cell[2]))] == sorted((c[0] for c in ours))[::-1]
    assert all(good * number(gap) <= 0 for good, _, gap in gaps)
    assert f"<b>{read(runs[0] / 'results.json')['metrics']['loss']['AP']:.3f}</b>" in html
    assert "above 0 is forgetting" in text and "below 0 is forgetting" not in text and "ROUGE" not in text


def test_one_scoring_is_ranked(tmp_path):
    html, text = page(small(tmp_path / "run", scorings=1, tasks=["one"]))
    scores = read(tmp_path / "run" / "tasks" / "01-one" / "scores.json")
    chart = re.search(r'<svg[^>]*aria-label="Losses of 4 prompts in 1 scoring".*?</svg>', html)[0]
    assert "rank among the prompts" in chart and chart.count("<circle") == 3 and chart.count("<path") == 1
    places = {k: float(y) for y, k in re.findall(r'cy="([\d.]+)" r="3" class="dot faint"><title>prompt (\d)', chart)}
    loss = scores["scorings"][0]["loss"]
    assert sorted(places, key=places.get) == sorted(places, key=lambda k: -loss[int(k)])
    assert "One scoring, at step 0." in text


@pytest.mark.parametrize(
    ("policy", "done", "told"),
    [
        ("original", 2, ["trained with the original prompts", "Not scored: this policy", "0 of 2"]),
        ("sapo", 1, ["This run is not finished: 1 of 2 tasks are done"]),
        ("sapo", 0, ["No task is finished yet, so no prompt", "so there are no scores", "nothing has been measured"]),
        ("sample", 2, ["draws a prompt for every example"]),
    ],
)
def test_what_is_missing_is_said(tmp_path, policy, done, told):
    html, text = page(small(tmp_path / "run", policy, done=done))
    assert all(sentence in text for sentence in told) and html.count("<section ") == 4
    assert ">None<" not in html and "nan" not in text.lower().split()


def test_a_task_that_left_the_original_for_a_while_is_counted(tmp_path):
    run = small(tmp_path / "run", tasks=["one"])
    path = run / "tasks" / "01-one" / "scores.json"
    for i, chosen in enumerate((0, 1, 0)):
        edit(path, "scorings", i, "chosen", value=chosen)
    edit(path, "chosen", value=0)
    original = read(path)["prompts"][0]
    edit(run / "results.json", "choices", 0, "index", value=0)
    edit(run / "results.json", "choices", 0, "prompt", value=original)
    html, text = page(run)
    assert "Tasks trained on another prompt 1 of 1" in text and "Original , which was kept" in text.replace("l,", "l ,")


# Comparison


def test_student_interval():
    # Of [1, 2, 4]: mean 7/3, standard error 0.88192, 4.30265 of them on either side.
    assert student_interval([1.0, 2.0, 4.0]) == pytest.approx((7 / 3 - 3.79462, 7 / 3 + 3.79462), abs=1e-4)
    assert student_interval([0.25, 0.25]) == (0.25, 0.25) and student_interval([0.5]) is None


def test_differences_are_paired_by_seed(tmp_path):
    runs = [small(tmp_path / f"sapo-{seed}", "sapo", seed) for seed in (0, 1, 2)]
    runs += [small(tmp_path / f"original-{seed}", "original", seed) for seed in (2, 1, 7)]
    [group] = group_runs([read_run(run) for run in runs])
    found = difference(*group.arms, "rougeL", "BWT")
    level = {run.name: read(run / "results.json")["metrics"]["rougeL"]["BWT"] for run in runs}
    expected = [level[f"sapo-{seed}"] - level[f"original-{seed}"] for seed in (1, 2)]
    assert found.values == expected and found.mean == sum(expected) / 2
    html, _ = page(*runs)
    row = rf"original</bdi></th><td>3</td><td>[^<]*</td>\s*<td>{re.escape(signed(100 * found.mean))}</td><td>2</td>"
    assert re.search(row, section(html, "comparison"))


def test_verdicts(tmp_path):
    """Every seed better by the same amount is better; a difference of both signs is not shown as one."""
    for seed in range(5):
        shift = {"sapo": 0.5, "original": 0.4, "worst": 0.5 + (0.1 if seed % 2 else -0.09)}
        for policy, level in shift.items():
            run = small(tmp_path / f"{policy}-{seed}", policy, seed, tasks=["one"])
            for measure in ("rougeL", "exact_match"):
                edit(run / "results.json", "metrics", measure, "R", 1, value=[level])
                edit(run / "results.json", "metrics", measure, "AP", value=level)
                edit(run / "tasks" / "01-one" / "metrics.json", "row", measure, value=[level])
    _, text = page(tmp_path / "sapo-0", tmp_path)
    assert "against original : AP +10.0 (+10.0 to +10.0), better." in text.replace("original:", "original :")
    assert re.search(r"against worst ?: AP \S+ \(\u2212\S+ to \+\S+\), no difference shown\.", text)


@pytest.mark.parametrize("change", ["method", "order", "data", "model", "tasks"])
def test_other_runs_are_not_compared(tmp_path, change):
    one = small(tmp_path / "one")
    other = small(tmp_path / "other", "original", **({"tasks": TWO[::-1]} if change == "tasks" else {}))
    if change != "tasks":
        edit(other / "run.json", change, value={"base": "0123"} if change == "data" else "another")
    html, text = page(one, other)
    assert "1 run given, of another method" in text and "less original" not in text and 'id="comparison"' not in html


def test_one_pair_and_unfinished_runs_have_no_interval(tmp_path):
    one = small(tmp_path / "a")
    _, text = page(one, small(tmp_path / "b", "original"))
    assert "one pair, which cannot tell an effect from chance" in text and "whisker" not in text
    _, text = page(one, small(tmp_path / "c", "worst", done=1))
    assert "1 run not finished: not compared" in text and "no pair of finished runs" in text


def test_other_settings_are_said(tmp_path):
    runs = [small(tmp_path / "a"), small(tmp_path / "b", "original", options={"learning_rate": 0.5})]
    assert "differ in learning_rate: 0.0001 and 0.5 ." in page(*runs)[1].replace("0.5.", "0.5 .")
    _, text = page(*runs, small(tmp_path / "c", options={"drift": 2.0}))
    assert "Policy sapo (drift=none) less the others" in text and "against sapo (drift=2.0)" in text


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
                small(tmp_path / method / policy / str(seed), policy, seed, method=method)
    small(tmp_path / "o-lora" / ".being-written")
    assert len(find_runs([tmp_path])) == 12
    html, text = page(tmp_path)
    assert text.startswith("12 runs of tasks in a row") and (tmp_path / "report.html").exists()
    heads = [re.sub("<[^>]*>", "", head) for head in re.findall(r"<h2[^>]*>(.*?)</h2>", html)]
    assert heads[1] == "Run 1: prompts chosen by SAPO, lora-inc, order ni_seq_c1, seed 0"
    assert heads[4] == "Run 4: prompts chosen by SAPO, o-lora, order ni_seq_c1, seed 0"
    assert len(heads) == 1 + MAX_DETAILED and text.count("less the others") == 2
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def test_the_same_folders_give_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        for policy in ("sapo", "original"):
            small(tmp_path / place / policy, policy)
    pages = [write_report(tmp_path / place).read_bytes() for place in ("a", "b", "a")]
    assert pages[0] == pages[1] == pages[2] and b"2026-06-01T10:06:40Z" in pages[0]
    assert str(tmp_path).encode() not in pages[0]


# Pieces


def test_numbers_and_texts():
    assert [fixed(-0.00001, 2), fixed(None, 2), fixed(-1.5, 1)] == ["0.00", "\u2013", "\u22121.5"]
    assert [signed(0.04), signed(0.05001), signed(-2, 0)] == ["0.0", "+0.1", "\u22122"] and whole(
        1234567
    ) == "1,234,567"
    assert visible("a\u200b\n\tb") == "a\\u200b\n\tb" and line("a\n b" * 99, 6) == "a ba \u2026"
    assert name("<a>_b") == "&lt;a&gt;_<wbr>b"


def test_words_of_two_prompts_are_compared():
    one, other = word_diff("Read the long text.\nAnswer.", "Read this text.\n Answer now.")
    assert one == [("Read ", False), ("the long ", True), ("text.\n", False), ("Answer.", True)]
    assert other == [("Read ", False), ("this ", True), ("text.\n ", False), ("Answer now.", True)]
    assert word_diff("a " * 600, "b") == ([("a " * 600, False)], [("b", False)])


@pytest.mark.parametrize(
    "ends", [(0, 1), (3, 3), (0, 0), (-1e-9, 1e-9), (1e300, 1e300), (-1.7e308, 1.7e308), (-5, 1234567), (0.61, 0.62)]
)
def test_ticks_lie_in_the_range(ends):
    scale = _Scale(ends, 0, 100, 0.0)
    places = [scale(tick) for tick in scale.ticks()]
    assert 2 <= len(places) <= 12 and np.all(np.diff(places) > 0) and -1e-6 <= places[0] <= places[-1] <= 100 + 1e-6


def test_gaps_interrupt_a_line():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None), (5, 2.0), (6, 1.0)]
    chart = plot([Series(points, "faint", title="prompt 1")], "losses", "step", "nats")
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


# Command line


def test_command(tmp_path, sapo):
    run = small(tmp_path / "run")
    assert sapo("report", run) == (0, f"Report written to {run / 'report.html'}.\n", "")
    other, file = small(tmp_path / "b", "original"), tmp_path / "other.html"
    for _ in range(2):  # the second time over the first report
        assert sapo("report", run, other, "--out", file) == (0, f"Report written to {file}.\n", "")
    assert file.read_bytes() == write_report([run, other]).read_bytes()


def test_command_errors(tmp_path, sapo):
    (tmp_path / "empty").mkdir()
    one_line_error(sapo("report", tmp_path / "empty"), "run.json", "got none")
    one_line_error(sapo("report", tmp_path / "nowhere"), "expected the folder of a run, got no such path")
    run, mine = small(tmp_path / "run"), tmp_path / "notes.txt"
    mine.write_text("mine")
    one_line_error(sapo("report", run, "--out", mine), "expected no file or an older report, got another file")
    assert mine.read_text() == "mine" and sapo("report", run, "--out", mine, "--overwrite")[0] == 0
    one_line_error(sapo("report", run, "--out", tmp_path), "path for a regular file, got a directory")
    one_line_error(sapo("report", run, "--out", tmp_path / "no" / "where.html"), "No such file or directory")
    (run / "run.json").write_text("[")
    one_line_error(sapo("report", run), "run.json", "not valid JSON")
    one_line_error(sapo("report"), "RUN_DIR")
