"""The effect experiment: its statistics by hand, its rows, and that the documents say what the rows say."""

import itertools
import json
import math

import pytest

from benchmarks.effect import again, design, rows, table
from benchmarks.effect.__main__ import main
from benchmarks.effect.statistics import bootstrap_mean, paired_difference, spearman, student_mean
from sapo_kernels.files import DataError, read_json
from sapo_peft.assets import tiny_base_folder
from tools.tiny_base.corpus import SEQUENCE


def test_spearman_by_hand():
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, -1, 1, -1, 1: 1 - 24 / 120.
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(0.8)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([0, 0, 7], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3.0))
    assert math.isnan(spearman([1, 1], [1, 2]))
    for x, y in (([1, 2], [1]), ([1.0, math.nan], [1.0, 2.0])):
        with pytest.raises(ValueError, match=r"one length|finite"):
            spearman(x, y)


def test_bootstrap_of_two_values_by_hand():
    # Means of two draws of {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4; both tails hold more than 2.5 %.
    assert bootstrap_mean([0.0, 1.0]) == (0.5, 0.0, 1.0)
    assert bootstrap_mean([2.0]) == (2.0, 2.0, 2.0)
    assert bootstrap_mean([3.0, 1.0, 4.0]) == bootstrap_mean([3.0, 1.0, 4.0])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])


def test_differences_are_paired():
    a = {("a", 1): 10.0, ("a", 2): 0.0, ("b", 1): 5.0}
    b = {("a", 1): 9.0, ("a", 2): -1.0, ("b", 2): 100.0}
    assert paired_difference(a, b) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="common"):
        paired_difference(a, {})


def row(method, policy, order, seed, value):
    metric = {name: value for name in table.MEASURES}
    return {"method": method, "policy": policy, "order": order, "seed": seed, "rougeL": metric, "loss": metric}


def test_a_table_by_hand():
    found = [
        row(method, policy, order, 1, value)
        for method in design.METHODS
        for order in design.ORDERS
        for policy, value in (("sapo", 0.5), ("original", 0.25))
    ]
    lines = table.comparison_table(found, [("sapo", "original")], ("rougeL", "loss"))
    assert lines[2] == "| ROUGE-L, lora-inc | sapo - original | " + " | ".join(["**+25.0 [+25.0, +25.0]**"] * 3) + " |"
    assert lines[-1].count("**+0.25 [+0.25, +0.25]**") == 3


def test_the_interval_of_students_distribution_by_hand():
    # Deviation 1, three values: 4.30265 / sqrt(3).
    assert student_mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 2.48414, 2.0 + 2.48414), abs=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        student_mean([1.0])


def test_seeds_as_the_unit_by_hand():
    a = {("a", 1): 3.0, ("b", 1): 5.0, ("a", 2): 1.0, ("b", 2): 1.0, ("a", 3): 9.0}
    b = {("a", 1): 1.0, ("b", 1): 1.0, ("a", 2): 0.0, ("b", 2): 0.0, ("a", 9): 9.0}
    # 2 and 4 of seed 1 are one value, 3; 1 of seed 2: 2 +- 12.706 * sqrt(2) / sqrt(2).
    assert table.by_seed(a, b) == pytest.approx((2.0, -10.7062, 14.7062), abs=1e-4)


def single(prompt, pre, forgetting):
    row = {"task": design.ODD_ONE, "seed": 1, "prompt": prompt, "pre": pre, "forgetting": forgetting}
    return {**row, "others": 2 * forgetting, "own": 1.0 - forgetting}


def test_single_task_tables_by_hand():
    # Prompts 3 and 7 are known to the base; the others' ranks agree but for one swap of four: 1 - 6 * 2 / 60 = 0.8.
    found = [single(0, 0.5, 0.1), single(1, 0.6, 0.3), single(2, 0.7, 0.2), single(3, 0.1, 0.9), single(4, 0.8, 0.4)]
    lines = table.correlation_table(found)
    assert lines[-1].startswith("| mean, wordings that the base had not met |")
    assert lines[-1].count("+0.80 [+0.80, +0.80]") == 2 and "-0.80 [-0.80, -0.80]" in lines[-1]
    assert "| odd one out | 1 | 5 | 0.10 to 0.80 | 0.10 to 0.90 |" in lines[2]
    # The lowest loss is prompt 3: 0.9 - 0.1, 0.9 - 0.45 and 0.9 - 0.1.
    cells = [line.split(" | ")[1] for line in table.single_choice_table(found)[2:]]
    assert cells == ["**+0.80 [+0.80, +0.80]**", "**+0.45 [+0.45, +0.45]**", "**+0.80 [+0.80, +0.80]**"]


def test_rows_of_another_configuration_are_not_mixed_in(tmp_path):
    rows.put(tmp_path, "single", "one", {"base": "a"}, [{"x": 1.5}])
    assert rows.done(tmp_path, "single", "one", {"base": "a"}) and not rows.done(
        tmp_path, "single", "two", {"base": "a"}
    )
    with pytest.raises(DataError, match="this configuration"):
        rows.done(tmp_path, "single", "one", {"base": "b"})
    rows.put(tmp_path, "single", "two", {"base": "a"}, [{"x": 2.5}, {"x": 3.5}])
    (tmp_path / "out").mkdir()
    assert rows.collect(tmp_path, "single", {"base": "a"}, tmp_path / "out") == 3
    found = rows.load("single", tmp_path / "out")
    assert found["made_by"] == {"base": "a"} and [one["x"] for one in found["rows"]] == [1.5, 2.5, 3.5]
    # One line a row, so that a difference of two versions can be read.
    assert '{"x": 2.5},\n{"x": 3.5}\n' in (tmp_path / "out" / "single.json").read_text()


def test_documents_agree_with_the_rows():
    assert main(["table", "--check"]) == 0


def test_a_changed_row_changes_its_tables(tmp_path):
    document = json.loads((rows.RESULTS / "sequences.json").read_text())
    changed = next(one for one in document["rows"] if one["policy"] == "sapo")
    changed["rougeL"]["AP"] += 0.1
    (tmp_path / "sequences.json").write_text(json.dumps(document))
    assert table.made_table("rouge", tmp_path) != table.made_table("rouge")
    assert table.made_table("exact", tmp_path) == table.made_table("exact")


def test_every_run_is_there_once_and_of_the_base_that_ships():
    runs = [tuple(one[key] for key in ("method", "policy", "order", "seed")) for one in rows.load("sequences")["rows"]]
    planned = itertools.product(design.METHODS, (*design.POLICIES, design.AGAIN), design.ORDERS, design.SEEDS)
    assert sorted(runs) == sorted(planned)
    single = [(one["task"], one["seed"], one["prompt"]) for one in rows.load("single")["rows"]]
    assert sorted(single) == sorted(itertools.product(SEQUENCE, design.SINGLE_SEEDS, range(21)))
    base = read_json(tiny_base_folder() / "made_by.json")["files"]["model.safetensors"]
    for kind in ("single", "sequences"):
        made_by = rows.load(kind)["made_by"]
        assert made_by["base"] == base
        assert made_by["orders"] == {name: list(tasks) for name, tasks in design.ORDERS.items()}


def test_what_scoring_again_changed_is_counted_by_pairs_and_tasks():
    found = again.differences(rows.RESULTS, "again16", None)
    repeated = {
        (one["order"], one["seed"]): one["AP"] for one in rows.load("again")["rows"] if one["variant"] == "again16"
    }
    reported = [one for one in rows.load("sequences")["rows"] if one["method"] == "lora-inc"]
    # The runs that record their choices are the reported ones, run again.
    assert repeated == {
        (one["order"], one["seed"]): pytest.approx(one["rougeL"]["AP"], abs=2e-5)
        for one in reported if one["policy"] == design.AGAIN
    }  # fmt: skip
    assert len(found["AP"]) == 10 and len(found["own kept"]) + len(found["own switched"]) == 30
    assert len(found["later kept"]) + len(found["later switched"]) == 20
    once = {(one["order"], one["seed"]): one for one in reported if one["policy"] == "sapo"}
    first = once["a", 101]
    more = next(
        one
        for one in rows.load("again")["rows"]
        if (one["variant"], one["order"], one["seed"]) == ("again16", "a", 101)
    )
    assert found["AP"][0] == pytest.approx(100 * (more["AP"] - first["rougeL"]["AP"]))
    assert more["chosen"][0] == [16, 6, 17, 17]
    own = more["loss"][1][0] - first["loss"]["R"][1][0]
    later = (more["loss"][3][0] - more["loss"][1][0]) - (first["loss"]["R"][3][0] - first["loss"]["R"][1][0])
    assert found["own switched"][0] == pytest.approx(own) and found["later switched"][0] == pytest.approx(later)


def test_an_unknown_table_is_an_error():
    with pytest.raises(DataError, match="nonsense"):
        table.made_table("nonsense")
