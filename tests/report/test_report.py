"""The report of sequence runs: what is on the page is what the folders hold, and damaged folders are refused."""

import re
import shutil

import numpy as np
import pytest

from sapo_kernels.files import DataError
from sapo_peft.report import MAX_DETAILED, write_report
from sapo_peft.report.compare import difference, group_runs, paired_interval
from sapo_peft.report.markup import escape, fixed, signed, whole
from sapo_peft.report.measures import MEASURES
from sapo_peft.report.run_data import find_runs, read_run
from sapo_peft.report.style import DARK, LIGHT, RAMP_DARK, RAMP_LIGHT, contrast, luminance, ramp
from sapo_peft.report.svg import Line, Scale, line_chart
from tests.cli import cli_helpers
from tests.cli.cli_helpers import one_line_error
from tests.report.report_runs import TASKS, TWO, make_run, page, read, section, small

sapo = cli_helpers.sapo
TABLES = re.compile(r"<table.*?</table>", re.DOTALL)


# What the page says


def test_numbers_are_those_of_the_folder(tmp_path):
    run = make_run(tmp_path / "run")
    html, text = page(run)
    results = read(run / "results.json")
    for choice in results["choices"]:
        assert choice["prompt"] in text and choice["original"] in text
        assert f"<b>{choice['loss']:.4f}</b>" in html and f"<b>{choice['original_loss']:.4f}</b>" in html
    for name in ("rougeL", "exact_match"):
        matrix = results["metrics"][name]["R"]
        table = next(t for t in TABLES.findall(section(html, "matrix")) if f"<b>{MEASURES[name].title}</b>" in t)
        cells = re.findall(r'<td class="h(\d+)([^"]*)">([^<]*)</td>', table)
        assert [float(value) for _, _, value in cells] == [round(100 * v, 1) for row in matrix for v in row]
        assert [int(step) for step, _, _ in cells] == [round(20 * v) for row in matrix for v in row]
        assert [mark for _, mark, _ in cells].count(" own") == len(TASKS)
        assert "before training" in table
    ap = results["metrics"]["rougeL"]["AP"]
    assert f"<dd>{100 * ap:.1f} <small>%</small></dd>" in html
    assert f"{results['cost']['overhead_fraction'] * 100:.1f} <small>%</small>" in html
    assert "labels of task195_sentiment140 were cut at 128 tokens" in text
    assert "2 rows with an empty label are left out" in text and "91\u202f234" in text
    assert "2.56" in section(html, "cost")


def test_switches_and_weights_are_shown(tmp_path):
    run = small(tmp_path / "run", scorings=6)
    path = run / "tasks" / f"01-{TWO[0]}" / "scores.json"
    scores, results = read(path), read(run / "results.json")
    for scoring, chosen in zip(scores["scorings"], (2, 2, 1, 1, 0, 0), strict=True):
        scoring["chosen"], scoring["weights"] = chosen, [float(k == chosen) for k in range(4)]
    cli_helpers.put(path, scores)
    results["choices"][0] |= {"index": 0, "prompt": scores["prompts"][0]}
    cli_helpers.put(run / "results.json", results)
    html, text = page(run)
    losses = section(html, "losses").split("<figure>")[1]
    reasons = [scoring["reason"] for scoring in scores["scorings"]]
    assert f"step 80 ({reasons[2]}): 2 \u2192 1; step 160 ({reasons[4]}): 1 \u2192 0" in text
    assert losses.count('class="switch"') == 2 and losses.count('class="ring"') == 3
    # Each line of the chart ends where the loss of that prompt ends, top down in the order of the losses.
    ends = [
        re.findall(r"[\d.]+,([\d.]+)", line)[-1]
        for line in re.findall(r'points="([^"]*)" class="(?:faint|used|orig)', losses)
    ]
    assert len(ends) == 4
    last = scores["scorings"][-1]["loss"]
    by_kind = sorted(range(4), key=lambda k: k != 3)
    assert np.argsort([float(end) for end in ends]).tolist() == np.argsort([-last[k] for k in by_kind]).tolist()
    bars = section(html, "weights").split("<figure>")[1]
    titles = re.findall(r"<title>([^<]*)</title>", bars)
    assert titles == ["prompt 2: 0 to 80", "prompt 1: 80 to 160", "original: 160 to 200"]


def test_one_scoring_is_ranked(tmp_path):
    run = small(tmp_path / "run", scorings=1)
    html, text = page(run)
    scoring = read(run / "tasks" / f"01-{TWO[0]}" / "scores.json")["scorings"][0]
    chart = section(html, "losses").split("<figure>")[1]
    titles = re.findall(r"<title>prompt (\d+): ([\d.]+)</title>", chart)
    assert titles == [(str(i), f"{scoring['loss'][i]:.4f}") for i in np.argsort(scoring["loss"])]
    assert f"all weight is on prompt {scoring['chosen']}." in text


def test_soft_weights_are_drawn_as_lines(tmp_path):
    html, _ = page(small(tmp_path / "run", soft=True))
    weights = section(html, "weights")
    assert weights.count("<figure>") == 2 and weights.count("<polyline") >= 8 and "weight</text>" in weights


@pytest.mark.parametrize(
    ("policy", "done", "sentences"),
    [
        ("original", 2, ["policy original trains with the instruction as it is", "keeps every instruction as it is"]),
        ("sapo", 1, ["not finished: 1 of 2 tasks are done", "Task 2 (task195_sentiment140) is not finished."]),
        ("sapo", 0, ["no choice is recorded", "There is no results.json yet", "nothing has been measured"]),
        ("sample", 2, ["draws a prompt for every example"]),
    ],
)
def test_what_is_missing_is_said(tmp_path, policy, done, sentences):
    html, text = page(small(tmp_path / "run", policy, done=done))
    for sentence in sentences:
        assert sentence in text
    assert html.count("<section ") == 9 and ">None<" not in html and "nan" not in text.lower().split()


@pytest.mark.parametrize("name", ["scores", "metrics", "train", "data"])
def test_a_file_may_be_missing(tmp_path, name):
    run = small(tmp_path / "run")
    (run / "tasks" / f"01-{TWO[0]}" / f"{name}.json").unlink()
    html, text = page(run)
    assert html.count("<section ") == 9
    if name in ("scores", "data"):
        assert f"tasks/01-{TWO[0]} has no scores.json" in text or "No data.json in" in text


def test_loss_of_the_targets_is_a_measure(tmp_path):
    """A run that was evaluated by its loss alone: nats, no percentages, lower is better."""
    runs = [small(tmp_path / f"{policy}-{seed}", policy, seed) for policy in ("sapo", "original") for seed in range(2)]
    for run in runs:
        results = read(run / "results.json")
        results["metrics"] = {"loss": results["metrics"]["rougeL"]}
        cli_helpers.put(run / "results.json", results)
        for path in run.glob("tasks/*/metrics.json"):
            metrics = read(path)
            cli_helpers.put(path, metrics | {"row": {"loss": metrics["row"]["rougeL"]}})
    html, text = page(*runs)
    assert "ROUGE-L and Exact match: not evaluated in this run." in text and "lower is better" in text
    assert f"{read(runs[0] / 'results.json')['metrics']['loss']['AP']:.3f} <small>nats per token</small>" in html
    assert "above 0 is forgetting" in text and "below 0" not in text


@pytest.mark.parametrize(("policy", "chosen", "told"), [
    ("sapo", (0, 0, 0), "0 of 2"), ("sapo", (0, 1, 0), "1 of 2"), ("sample", (0, 0, 0), None)])  # fmt: skip
def test_tasks_on_another_prompt_are_counted_with_their_switches(tmp_path, policy, chosen, told):
    run = small(tmp_path / "run", policy)
    results = read(run / "results.json")
    for number, choice in enumerate(results["choices"]):
        [path] = run.glob(f"tasks/{number + 1:02d}-*/scores.json")
        scores = read(path)
        for scoring, index in zip(scores["scorings"], chosen if not number else (0, 0, 0), strict=True):
            scoring["chosen"] = index
        cli_helpers.put(path, scores)
        choice |= {"index": 0, "prompt": scores["prompts"][0]}
    cli_helpers.put(run / "results.json", results)
    _, text = page(run)
    label = "Tasks trained on another prompt than the original"
    assert f"{label} {told}" in text if told else label not in text


def test_whatever_a_sequence_may_hold_has_room(tmp_path):
    name = "t" * 300
    _, text = page(small(tmp_path / "run", tasks=[name], prompts=5000, scorings=1))
    assert "all 5\u202f000 prompts" in text


# Comparison


def test_paired_interval_is_the_bootstrap_of_the_mean():
    values = [0.031, -0.012, 0.044, 0.027, 0.019, 0.052]
    low, high = paired_interval(values)
    draws = np.random.default_rng(7)
    means = [np.mean(draws.choice(values, len(values))) for _ in range(20_000)]
    # Two independent bootstraps of 10,000 and 20,000 draws; the spread of the mean is 0.0084.
    assert np.allclose([low, high], np.quantile(means, [0.025, 0.975]), atol=1e-3)
    assert paired_interval(values) == (low, high)
    assert paired_interval([0.5]) is None and paired_interval([]) is None
    assert paired_interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def test_differences_are_paired_by_seed(tmp_path):
    runs = [small(tmp_path / f"sapo-{seed}", "sapo", seed) for seed in (0, 1, 2)]
    runs += [small(tmp_path / f"original-{seed}", "original", seed) for seed in (2, 1, 7)]
    [group] = group_runs([read_run(run) for run in runs])
    ours, theirs = group.arms
    found = difference(ours, theirs, "rougeL", "BWT")
    level = {run.name: read(run / "results.json")["metrics"]["rougeL"]["BWT"] for run in runs}
    wanted = [level[f"sapo-{seed}"] - level[f"original-{seed}"] for seed in (1, 2)]
    assert found.values == wanted and found.mean == sum(wanted) / 2
    html, text = page(*runs)
    assert "2 pairs" in text and "Intervals of 2 pairs are usually too narrow" in text
    assert f"{signed(100 * found.mean, 1)}" in section(html, "comparison")


def test_verdicts(tmp_path):
    """Every seed better by the same amount is "higher"; a difference of both signs is not shown as one."""
    for seed in range(5):
        for policy in ("sapo", "original", "worst"):
            run = small(tmp_path / f"{policy}-{seed}", policy, seed, tasks=["one"])
            for path in (run / "results.json", run / "tasks" / "01-one" / "metrics.json"):
                shift = {"sapo": 0.5, "original": 0.4, "worst": 0.5 + (0.1 if seed % 2 else -0.09)}[policy]
                value = read(path)
                row = value.get("row") or value["metrics"]
                for name in row:
                    row[name] = [shift] if "row" in value else row[name] | {"R": [[0.1], [shift]], "AP": shift}
                cli_helpers.put(path, value)
    _, text = page(tmp_path / "sapo-0", tmp_path)
    assert "sapo against original, 5 pairs: AP +10.0 (+10.0 to +10.0). Higher: AP." in text
    assert re.search(r"sapo against worst, 5 pairs: AP \+1\.4 \(\u2212\S+ to \+\S+\)\. No difference shown: AP\.", text)


@pytest.mark.parametrize("change", ["method", "order", "data", "model", "tasks"])
def test_other_runs_are_not_compared(tmp_path, change):
    one = small(tmp_path / "one")
    options = {"tasks": TWO[::-1]} if change == "tasks" else {}
    other = small(tmp_path / "other", "original", **options)
    run = read(other / "run.json")
    if change != "tasks":
        run[change] = {"base": "0123"} if change == "data" else "another"
    cli_helpers.put(other / "run.json", run)
    html, text = page(one, other)
    assert "cannot be said from the runs given" in text and "1 run given, of another" in text
    assert "95 % interval</th>" not in html


def test_one_pair_has_no_interval(tmp_path):
    html, text = page(small(tmp_path / "a"), small(tmp_path / "b", "original"))
    assert "One pair has no interval" in text and ">none</td>" in html and "whisker" not in section(html, "comparison")


def test_unfinished_runs_are_not_compared(tmp_path):
    _, text = page(small(tmp_path / "a"), small(tmp_path / "b", "original", done=1))
    assert "1 run not finished: not compared" in text and "cannot be said" in text


def test_other_settings_are_said(tmp_path):
    runs = [small(tmp_path / "a"), small(tmp_path / "b", "original", options={"learning_rate": 0.5})]
    _, text = page(*runs)
    assert "differ in learning_rate: 0.0001 and 0.5." in text
    variant = small(tmp_path / "c", options={"drift": 2.0})
    _, text = page(*runs, variant)
    assert "sapo (drift=2.0)" in text and "sapo (drift=none) against sapo (drift=2.0)" in text


def test_the_same_run_twice(tmp_path):
    run = small(tmp_path / "a")
    shutil.copytree(run, tmp_path / "b")
    with pytest.raises(DataError, match=r"b: wanted each run once, got policy 'sapo' with seed 0 in .*a too"):
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
    assert text.startswith("SAPO report of 12 runs") and (tmp_path / "report.html").exists()
    heads = re.findall(r"<h2[^>]*><bdi>(.*?)</bdi></h2>", html)
    assert heads[2] == "Run 1: lora-inc, policy sapo, order ni_seq_c1, seed 0" and len(heads) == 2 + MAX_DETAILED
    assert heads[5] == "Run 4: o-lora, policy sapo, order ni_seq_c1, seed 0"
    assert text.count("Did choosing the prompt help?") == 2
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_the_same_folders_give_the_same_bytes(tmp_path):
    for place in ("a", "b"):
        for policy in ("sapo", "original"):
            small(tmp_path / place / policy, policy)
    pages = [write_report(tmp_path / place).read_bytes() for place in ("a", "b", "a")]
    assert pages[0] == pages[1] == pages[2] and b"2026-06-01T10:06:40Z" in pages[0]
    assert str(tmp_path).encode() not in pages[0]


# Pieces


def test_colours_are_legible():
    for stops, palette in ((RAMP_LIGHT, LIGHT), (RAMP_DARK, DARK)):
        colours = ramp(stops)
        assert all(contrast(cell, ink) >= 4.5 for cell, ink in colours)
        light = [luminance(cell) for cell, _ in colours]
        assert light == sorted(light, reverse=palette is LIGHT) and len(set(light)) == len(light)
        for surface in ("bg", "card", "soft", "warn"):
            for ink in ("fg", "muted", "accent", "other"):
                assert contrast(palette[ink], palette[surface]) >= 4.5, (ink, surface)
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") == pytest.approx(
        4.48, abs=0.01
    )


def test_numbers_as_text():
    assert [fixed(-0.00001, 2), fixed(None, 2), fixed(-1.5, 1)] == ["0.00", "\u2013", "\u22121.5"]
    assert [signed(0.04, 1), signed(0.05001, 1), signed(-2, 0)] == ["0.0", "+0.1", "\u22122"]
    assert whole(1234567) == "1\u202f234\u202f567"
    assert escape("a<b\u200b") == 'a&lt;b<span class="esc">\\u200b</span>'


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3, 3), (0, 0), (-1e-9, 1e-9), (1e300, 1e300), (-5, 1234567), (0.61, 0.62)]
)
def test_ticks_lie_in_the_range(low, high):
    scale = Scale(low, high, 0, 100)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 12 and all(-1e-6 <= scale(tick) <= 100 + 1e-6 for tick in ticks)
    assert scale(scale.low) == 0 and scale(scale.high) == pytest.approx(100)


def test_gaps_interrupt_a_line():
    points = [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, None), (5, 2.0), (6, 1.0)]
    chart = line_chart([Line(points, "faint", "prompt 1")], "losses", "step", "nats")
    assert chart.count("<polyline") == 2 and chart.count("<circle") == 1


# Command line


def test_command(tmp_path, sapo):
    run = small(tmp_path / "run")
    code, out, err = sapo("report", run)
    assert (code, err) == (0, "") and out == f"Report written to {run / 'report.html'}.\n"
    other, file = small(tmp_path / "b", "original"), tmp_path / "other.html"
    assert sapo("report", run, other, "--out", file) == (0, f"Report written to {file}.\n", "")
    assert file.read_bytes() == write_report([run, other]).read_bytes()


def test_command_errors(tmp_path, sapo):
    (tmp_path / "empty").mkdir()
    one_line_error(sapo("report", tmp_path / "empty"), "run.json", "got none")
    one_line_error(sapo("report", tmp_path / "nowhere"), "wanted the folder of a run, got nothing there")
    run = small(tmp_path / "run")
    one_line_error(sapo("report", run, "--out", tmp_path), "wanted a path for a regular file, got a directory")
    one_line_error(sapo("report", run, "--out", tmp_path / "no" / "where.html"), "No such file or directory")
    (run / "run.json").write_text("[")
    one_line_error(sapo("report", run), "run.json", "not valid JSON")
    one_line_error(sapo("report"), "RUN_DIR")
