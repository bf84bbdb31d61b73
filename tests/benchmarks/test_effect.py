"""The effect experiment: its statistics by hand, its rows, and that the documents say what the rows say."""

import itertools
import math

import pytest

from benchmarks.effect import rows, table
from benchmarks.effect.__main__ import main
from benchmarks.effect.statistics import spearman, student_mean
from sapo_kernels.files import DataError, read_json
from sapo_peft.assets import tiny_base_folder
from tools.tiny_base.corpus import SEQUENCE


def test_spearman_by_hand():
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)) with d = 0, -1, 1, -1, 1: 1 - 24 / 120.
    assert spearman([1, 2, 3, 4, 5], [1, 3, 2, 5, 4]) == pytest.approx(0.8)
    # Ranks 1.5, 1.5, 3 against 1, 2, 3: covariance 1.5, variances 1.5 and 2.
    assert spearman([0, 0, 7], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3.0))


def test_the_interval_of_students_distribution_by_hand():
    # Deviation 1, three values: 4.30265 / sqrt(3).
    assert student_mean([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - 2.48414, 2.0 + 2.48414), abs=1e-5)
    assert math.isnan(student_mean([1.0]).low)


def test_seeds_as_the_unit_by_hand():
    a = {("a", 1): 3.0, ("b", 1): 5.0, ("a", 2): 1.0, ("b", 2): 1.0, ("a", 3): 9.0}
    b = {("a", 1): 1.0, ("b", 1): 1.0, ("a", 2): 0.0, ("b", 2): 0.0, ("a", 9): 9.0}
    # 2 and 4 of seed 1 are one value, 3; 1 of seed 2: 2 +- 12.706 * sqrt(2) / sqrt(2).
    assert table.by_seed(a, b) == pytest.approx((2.0, -10.7062, 14.7062), abs=1e-4)


def test_tables_of_sequences_by_hand():
    found = [
        {
            "method": "o-lora",
            "policy": policy,
            "order": "a",
            "seed": seed,
            **dict.fromkeys(table.LABELS, {"AP": ap, "BWT": 0.0, "FWT": 0.0}),
        }
        for policy, seed, ap in (
            ("original", 1, 1.0),
            ("original", 2, 2.0),
            ("sapo", 1, 0.9),
            ("sapo", 2, 1.9),
            ("random", 2, 4.0),
        )
    ]
    original, sapo, random = (line.split(" | ")[1:3] for line in table.sequences_table(found)[2:])
    assert original == ["2", "1.500"] and random == ["1", "4.000 (+2.000)"], "pairs are of one seed"
    assert sapo == ["2", "1.400 (**-0.100 [-0.100, -0.100]**)"]
    found += [{**one, "method": "lora-inc"} for one in found]
    found += [
        {**one, "policy": policy}
        for one in found
        if one["policy"] == "random"
        for policy in ("worst", "sample", "sapo-again")
    ]
    lines = table.comparison_table(found)
    assert lines[7].startswith("| ROUGE-L, o-lora | sapo - original | **-10.0 [-10.0, -10.0]** | +0.0")
    assert lines[8].startswith("| ROUGE-L, o-lora | sapo - random | -210.0 |"), "in percent; one seed has no interval"


def test_rows_of_another_configuration_are_not_mixed_in(tmp_path):
    rows.put(tmp_path, "single", "one", {"base": "a"}, [{"x": 1.5}])
    assert rows.done(tmp_path, "single", "one", {"base": "a"}) and not rows.done(
        tmp_path, "single", "two", {"base": "a"}
    )
    assert rows.done(tmp_path, "single", "one", {"base": "a", "sequence": {"max_steps": 3}})
    for other in ({"base": "b"}, {"base": "a", "single": {"max_steps": 3}}):
        with pytest.raises(DataError, match="this configuration"):
            rows.done(tmp_path, "single", "one", other)
    rows.put(tmp_path, "single", "two", {"base": "a"}, [{"x": 2.5}, {"x": 3.5}])
    (tmp_path / "out").mkdir()
    assert rows.collect(tmp_path, "single", {"base": "a"}, tmp_path / "out") == 3
    found = rows.load("single", tmp_path / "out")
    assert found["made_by"] == {"base": "a"} and [one["x"] for one in found["rows"]] == [1.5, 2.5, 3.5]
    # One line a row, so that a difference of two versions can be read.
    assert '{"x": 2.5},\n{"x": 3.5}\n' in (tmp_path / "out" / "single.json").read_text()


def test_documents_agree_with_the_rows():
    assert main(["table", "--check"]) == 0


def test_every_run_is_there_once_and_of_the_base_that_ships():
    """What was planned at commit aa0c360, which has the code of the runs."""
    runs = [tuple(one[key] for key in ("method", "policy", "order", "seed")) for one in rows.load("sequences")["rows"]]
    policies = ("original", "sapo", "random", "worst", "sample", "sapo-again")
    assert sorted(runs) == sorted(itertools.product(table.METHODS, policies, "ab", range(101, 106)))
    single = [(one["task"], one["seed"], one["prompt"]) for one in rows.load("single")["rows"]]
    assert sorted(single) == sorted(itertools.product(SEQUENCE, (101, 102), range(21)))
    base = read_json(tiny_base_folder() / "made_by.json")["files"]["model.safetensors"]
    assert {rows.load(kind)["made_by"]["base"] for kind in ("single", "sequences")} == {base}


def test_an_unknown_table_is_an_error():
    with pytest.raises(DataError, match="nonsense"):
        table.made_table("nonsense")
