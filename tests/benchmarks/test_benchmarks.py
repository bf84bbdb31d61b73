"""The benchmarks' own promises: rows are checked, times follow agreement, tables and plots are the committed rows'."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import aot, documents, exactness, racing, tables, train_step
from benchmarks.__main__ import main as run_benchmarks
from benchmarks.ops import end_to_end
from benchmarks.registry import OPS, Op, Setting
from benchmarks.rows import RESULTS, Environment, Row, append_rows, csv_text, read_csv, read_rows
from benchmarks.timing import Case, Disagreement, Provider, quantiles, run_case
from benchmarks.workload import Cells
from sapo_kernels.files import DataError
from tests.oracles import small_qwen3

ROOT = Path(__file__).resolve().parents[2]
CHECKOUT = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="looks at the checkout's files")
HERE = Environment("2026-01-02T03:04:05Z", "abc", "a CPU, 2 cores", "none", 1, "3.11.1", "2.13.0", "3.9.0", "5.23.0")


def row(**changed) -> Row:
    given = dict(
        op="tasks", case="one", provider="ours", dtype="fp32", shape="K=2 dense/trie=2.000", rounds=3, p20_s=1.0,
        p50_s=2.0, p80_s=3.0, peak_bytes=-1, tokens=10, work=4.0, work_unit="FLOP", formula="2*a", error=1e-6,
        tolerance=1e-4, note="", environment=HERE,
    )  # fmt: skip
    return Row(**{**given, **changed})


def test_rows_come_back_as_they_were(tmp_path):
    rows = [row(), row(provider="trainer_loop", note='a "note", with\ncommas', p80_s=3.25)]
    append_rows(tmp_path / "new" / "tasks.csv", rows[:1])
    first = (tmp_path / "new" / "tasks.csv").read_bytes()
    append_rows(tmp_path / "new" / "tasks.csv", rows[1:])
    assert (tmp_path / "new" / "tasks.csv").read_bytes().startswith(first)
    assert read_rows(tmp_path / "new" / "tasks.csv") == [
        rows[0],
        dataclasses.replace(rows[1], note='a "note", with commas'),
    ]
    assert read_rows(tmp_path / "absent.csv") == []


@pytest.mark.parametrize(
    "changed",
    [
        {"error": 1e-3}, {"error": math.nan}, {"p50_s": 0.5}, {"p20_s": 0.0}, {"p80_s": math.inf}, {"rounds": 0},
    ],
    ids=lambda changed: " ".join(changed),
)  # fmt: skip
def test_a_row_that_says_nonsense_cannot_be_made(changed):
    with pytest.raises(DataError):
        row(**changed)


GOOD = csv_text([row(), row(case="two")])


@pytest.mark.parametrize(
    "text",
    [
        "", GOOD.replace("p50_s", "p51_s"), GOOD.replace(",2,", ",two,"), GOOD[: len(GOOD) // 2], GOOD + "a,b\n",
        GOOD.replace("1e-06", "nan"), GOOD + '"',
    ],
    ids=["empty", "column", "word", "half", "short line", "nan", "open quote"],
)  # fmt: skip
def test_a_damaged_file_is_named_and_left_alone(text, tmp_path):
    path = tmp_path / "tasks.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"tasks\.csv|tasks, "):
        append_rows(path, [row()])
    assert path.read_text(encoding="utf-8") == text


def test_committed_rows_are_whole_and_no_toys():
    kinds = {"exactness": exactness.Difference, "racing": racing.Replays, "train_step": train_step.Step}
    for path in (*RESULTS.glob("*.csv"), *RESULTS.glob("gpu/*.csv")):
        if kind := kinds.get(path.stem):
            assert [kind(**row) for row in read_csv(path, kind)]
        else:
            rows = read_rows(path)
            assert rows and not [r for r in rows if r.case.startswith("toy")]


def test_times_follow_agreement_and_turns_rotate():
    ran = []

    def provider(name, value):
        return Provider(lambda: ran.append(name) or value)

    case = Case("op", "case", {n: provider(n, 0.0) for n in "abc"}, float, 0.5, rounds=2)
    rows = run_case(case)
    assert ran == list("abcabcbca"), "one turn to warm up, then another provider first each time"
    assert [r.provider for r in rows] == list("abc") and all(r.rounds == 2 for r in rows)
    for wrong in (0.6, math.nan):
        case.providers["b"], case.left_out, said = provider("b", wrong), {}, []
        assert [row.provider for row in run_case(case, say=said.append)] == ["a", "c"]
        assert "op, case: b: left out: Disagreement: expected within 0.5" in said[0] and len(said) == 1
    case.providers["a"] = provider("a", 0.6)
    with pytest.raises(Disagreement, match=r"expected within 0\.5"):
        run_case(case)
    assert quantiles([3.0, 1.0, 2.0, 5.0, 4.0]) == (1.0, 3.0, 4.0)
    assert quantiles([2.0]) == (2.0, 2.0, 2.0)


def test_of_a_peers_sizes_the_fastest_goes_on():
    def takes(seconds: float, peer: str = "") -> Provider:
        return Provider(lambda: time.sleep(seconds) or 0.0, peer=peer)

    providers = {"ours": takes(0.08), "p_8": takes(0.02, "p"), "p_32": takes(0.25, "p"), "q_8": takes(0.04, "q")}
    rows = run_case(Case("op", "case", providers, float, 0.5, rounds=3))
    assert {row.provider: row.rounds for row in rows} == {"ours": 3, "p_8": 3, "p_32": 1, "q_8": 3}
    rows = run_case(Case("op", "case", providers, float, 0.5, rounds=3), deadline=time.monotonic())
    assert [row.rounds for row in rows] == [1, 1, 1, 1], "past the deadline no turn begins but the first"


def test_peak_memory_sees_what_a_provider_holds():
    def hungry():
        return torch.ones(1 << 24).sum()  # 64 MiB

    providers = {"a": Provider(hungry), "b": Provider(lambda: 0.0)}
    peaks = {row.provider: row.peak_bytes for row in run_case(Case("op", "case", providers, lambda _: 0.0, rounds=1))}
    if peaks["a"] < 0:
        pytest.skip("this kernel does not let a process reset its peak")
    assert peaks["a"] > 50 * 2**20 > peaks["b"]


def some_results(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, loop, plain in (("task1", 8.0, 4.0), ("task2", 6.0, 1.5)):
        rows = [row(case=name, tokens=5), row(case=name, provider="trainer_loop", p50_s=loop, p80_s=9.0)]
        others = {"tuned_plain_8": plain, "tuned_plain_32": plain + 1, "prefix_cache_32": 8.0}
        rows += [row(case=name, provider=n, p50_s=t, p80_s=9.0) for n, t in others.items()]
        append_rows(folder / "tasks.csv", rows)
        append_rows(
            folder / "sweep.csv", [dataclasses.replace(r, op="sweep") for r in rows if r.provider != "trainer_loop"]
        )
    return folder


def test_tables_say_what_the_rows_say(tmp_path):
    results = some_results(tmp_path / "results")
    text = "a\n<!-- table: tasks -->\n\nold\n\n<!-- end of table -->\nb\n<!-- effect: x -->\ny\n<!-- /effect -->\n"

    def replaced(text: str) -> str:
        return documents.filled(text, "table", lambda name: tables.made_table(name, results))

    made = replaced(text)
    for line in ("| task1 | - | 2.00 | 4.00 | 2.00 | 4.00 | 100% |", "| task2 | - | 2.00 | 3.00 | 0.75 | 4.00 | 38% |",
                 "| geometric mean |  |  | 3.46 | 1.22 | 4.00 |  |"):  # fmt: skip
        assert line in made
    assert "old" not in made and made.startswith("a\n") and replaced(made) == made
    assert made.endswith("<!-- end of table -->\nb\n<!-- effect: x -->\ny\n<!-- /effect -->\n")
    assert "Slower than the fastest peer at: task2 (0.75x, tuned_plain)." in tables.made_table("sweep", results)
    # The newest run of a case is the one that counts, whole.
    later = dataclasses.replace(HERE, date="2026-02-02T00:00:00Z")
    newer = [row(case="task1", environment=later), row(case="task1", provider="trainer_loop", environment=later)]
    append_rows(results / "tasks.csv", [*newer, row(case="task1", provider="tuned_plain_8", environment=later)])
    assert "| task1 | - | 2.00 | 1.00 | 1.00 | - | 50% |" in replaced(text)
    for name in tables.TABLES.keys() - {"ahead of time"}:
        assert "No rows yet" in tables.made_table(name, tmp_path / "nothing")[0]
    with pytest.raises(DataError, match="expected one of"):
        replaced(text.replace("tasks", "taks"))
    with pytest.raises(DataError, match="no end"):
        replaced("<!-- table: tasks -->\n" + text)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(text)
    make = lambda name: tables.made_table(name, results)
    assert [documents.outdated("table", make, write, tmp_path) for write in (False, True, True)] == [
        ["docs/page.md"], ["docs/page.md"], [],
    ]  # fmt: skip


@CHECKOUT
def test_the_documents_and_plots_agree_with_the_committed_rows(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 128, 0, 8, "16 of 64"), ("sm_90", 32, 0, 32, "64 of 64"), ("sm_90", 40, 100 * 1024, 4, "8 of 64"),
        ("sm_80", 255, 8 * 1024, 4, "8 of 64"), ("sm_89", 16, 0, 1, "24 of 48"),
    ],
)  # fmt: skip
def test_occupancy_bounds(target, registers, shared, warps, expected):
    """By hand: 65,536 registers, 228 KiB less 1 KiB a block and so on."""
    assert aot.occupancy(target, registers, shared, warps) == expected


def test_the_command_runs_an_operation_and_writes_its_rows(tmp_path):
    assert run_benchmarks(["--size", "toy", "--only", "planner", "--minutes", "1", "--out", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "planner.csv")
    assert {r.provider for r in rows} >= {"numpy"} and all(r.case.startswith("toy ") for r in rows)


def test_the_cases_run_under_pytest_benchmark():
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_ops.py", "-q", "-k", "accumulate"]
    # A worker of pytest-xdist would measure nothing.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name} | {"SAPO_BENCH": "toy"}
    done = subprocess.run(
        command, cwd=RESULTS.parents[1], env=alone, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "accumulate" in done.stdout and "Min" in done.stdout, done.stdout[-2000:]


def test_toy_figures_do_not_get_among_the_results(capsys):
    with pytest.raises(SystemExit):
        run_benchmarks(["--size", "toy", "--only", "planner"])
    assert "do not belong among the results" in capsys.readouterr().err


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("end_to_end", "tasks", "race")])
def test_every_provider_of_an_operation_agrees(op):
    setting = Setting(toy=True)
    (name,) = OPS[op].names(setting)
    rows = run_case(dataclasses.replace(OPS[op].build(name, setting), rounds=1))
    assert len(rows) > 1 and all(row.op == op and row.tokens > 0 for row in rows)
    assert not {row.provider for row in rows} & OPS[op].left_out("cpu").keys()


def test_what_cannot_run_here_is_left_out_and_named(monkeypatch):
    monkeypatch.setitem(OPS, "none", None)  # and gone afterwards
    op = Op("none", lambda setting, name, n: (Case("none", name, check=float, tolerance=0.0), n), cpu={"small": (3,)})
    op.provider("ours")(lambda n: lambda: 0.0)
    op.provider("far", needs="no_such_package")(None)
    op.provider("elsewhere", on="cuda")(None)
    assert op.left_out("cpu") == {"far": "no_such_package is not installed", "elsewhere": "it runs on cuda only"}
    assert list(op.build("small", Setting()).providers) == ["ours"]


def test_a_nan_anywhere_is_an_error():
    """Python's `max` keeps whichever number comes first when the other is NaN."""
    model, cache = small_qwen3(300), Cells(6, 8, 6, 8, 2).cache(300)
    check = end_to_end.Agreement(model, cache)
    nll = check.ours.nll.flatten().clone()
    assert check.error_of_cells(nll) <= check.tolerance
    nll[next(c for c in range(len(nll)) if c not in check.sample)] = math.nan
    assert math.isnan(check.error_of_cells(nll))
    case = OPS["tree_attention"].build("small", Setting(toy=True))
    apart, ours = case.providers["sdpa_sequences"], case.providers["ours"].run().clone()
    assert math.isnan(apart.check(torch.full_like(apart.run(), math.nan)))
    ours[-1] = math.nan
    assert math.isnan(case.check(ours))


class InDtype(Setting):
    """On a CPU in the dtype of a GPU."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.given = dtype

    dtype = property(lambda self: self.given)


def test_one_wrong_cell_among_many_ends_the_case():
    """Also in low precision, where a root mean square alone would let it pass; rows and tokens likewise."""

    def refuse(case: Case, name: str, place, by: float) -> None:
        run_case(case)
        wrong = case.providers[name].run().clone()
        wrong[place] += by
        case.providers[name].run = lambda: wrong
        with pytest.raises(Disagreement) if name == "ours" else contextlib.nullcontext():
            run_case(case)
        assert name == "ours" or isinstance(case.left_out[name], Disagreement)

    cache = Cells(12, 20, 4, 5, 2).cache(300)
    check = end_to_end.Agreement(small_qwen3(300).bfloat16(), cache)
    nll = check.ours.nll.flatten().clone()
    assert check.error_of_cells(nll) <= check.tolerance
    nll[3] += 6 * check.tolerance * math.sqrt(cache.response_lengths[3])
    assert check.error_of_cells(nll) > check.tolerance
    for dtype in (torch.float32, torch.bfloat16):
        setting = InDtype(dtype)
        case = OPS["linear_logprob"].build("rows", setting, shape=(100, 300, 16))
        refuse(case, "ours", 1, 3 * case.tolerance)
        for name, place in (("sdpa_sequences", (1, 3, 0, 5)), ("ours", (20, 3, 5))):
            case = OPS["tree_attention"].build("tokens", setting, shape=(Cells(4, 6, 6, 8, 1), (4, 2, 16)))
            refuse(case, name, place, 3 * case.tolerance)
