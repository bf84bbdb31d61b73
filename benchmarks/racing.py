"""What a race saves and what it risks: replays over loss matrices of real models, with shuffled examples.

    python -m benchmarks.racing                                   # the committed matrices, 50 replays of each
    python -m benchmarks.racing --replays 200 --csv benchmarks/results/racing.csv

A replay is a race over a matrix that is known in full, with another order of the examples: what it chose is compared
with what scoring every cell chooses. Rules: `race` (the defaults), `strict` (no tolerance), `memory` (the state before
as memory), and `plain`, the usual asymptotic rule: after every 16 examples, whoever is 1.645 standard errors behind the
leader leaves, with no correction for the prompts or the rounds. `wald` and `wald-memory` are no rules but a scale: what
a sequential test with the same error would need that is told the winner, and of each pair the gap and the variance.

Regret is the loss of the prompt chosen above the lowest, in percent of the lowest. "promise broken" counts replays in
which it was above the race's own tolerance; the promise is that these are at most delta. The matrices are made by
`benchmarks.race_matrices`. Three sets: `tuning` and `held-out` are matrices of the base that ships, halves of the 16
tasks by the SHA-256 of their names; the defaults were chosen on the first alone. `early` are those of an early base.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import io
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch

from sapo_kernels import PromptScores, Race
from sapo_kernels.files import atomic_write
from sapo_kernels.scoring.race import Contest
from sapo_kernels.scoring.race_strata import strata

RESULTS = Path(__file__).resolve().parent / "results"
MATRICES = (RESULTS / "race_matrices.safetensors", RESULTS / "race_matrices_shipped.safetensors")
TUNING = 8  # of the 16 tasks of the shipped base
RACES = ("race", "strict", "memory")
RULES = (*RACES, "plain", "wald", "wald-memory")
SETS = ("held-out", "tuning", "early")
# What the issue calls a wrong choice only if it costs more than this share of the loss.
SHARE = 0.005


@dataclass(frozen=True)
class Replays:
    """One rule on one matrix; shares are of the replays, regrets percent of the lowest loss.

    set: see the module. near: prompts within half a percent of the best, itself included. saved: share of the cells
    not scored.
    """

    set: str
    task: str
    state: int
    rule: str
    prompts: int
    examples: int
    near: int
    delta: float
    replays: int
    saved_p10: float
    saved_p50: float
    saved_p90: float
    wrong: float
    broken: float
    over_half_percent: float
    worst_regret: float
    rounds: float


@dataclass(frozen=True)
class Matrices:
    """Full scores of one task in the order of the model's states; responses: [M] equal numbers for equal responses."""

    set: str
    task: str
    states: list[PromptScores]
    responses: np.ndarray | None = None


def read_matrices(paths: Iterable[Path] = MATRICES) -> list[Matrices]:
    """From files of `race_matrices`; those without responses are the early base's."""
    from safetensors.torch import load_file

    found: list[Matrices] = []
    for file in paths:
        tensors = load_file(file)
        names = [name.rpartition("/")[0] for name in sorted(tensors) if name.endswith("/nll")]
        digests = sorted(hashlib.sha256(name.encode()).hexdigest() for name in names)
        for task in names:
            nll, tokens = tensors[f"{task}/nll"].double(), tensors[f"{task}/tokens"].long().contiguous()
            states = [PromptScores(state, tokens, [f"prompt {k}" for k in range(nll.shape[1])]) for state in nll]
            responses, which = tensors.get(f"{task}/responses"), "early"
            if responses is not None:
                responses = responses.numpy()
                tuned = hashlib.sha256(task.encode()).hexdigest() in digests[:TUNING]
                which = "tuning" if tuned else "held-out"
            found.append(Matrices(which, task, states, responses))
    if not found:
        raise SystemExit("no matrices")
    return found


def replay(full: PromptScores, race: Race, responses: np.ndarray | None = None) -> Contest:
    """The race over a matrix that is known in full, to its end."""
    contest, losses = Contest(race, full.tokens.numpy(), full.prompts, responses), full.nll.numpy().ravel()
    while (cells := contest.wanted()) is not None:
        contest.add(cells, losses[cells])
    return contest


def brought(full: PromptScores) -> np.ndarray:
    """[K, M] what each cell brings to its prompt's loss, which is their mean."""
    return (full.nll / full.tokens.sum(1, keepdim=True) * full.nll.shape[1]).numpy()


def plain_rule(full: PromptScores, order: np.ndarray, step: int = 16) -> tuple[int, int, int]:
    """(winner, cells, rounds) of the usual rule."""
    values = brought(full)[:, order]
    size, live, cells, n = values.shape[1], np.arange(len(values)), 0, 0
    while True:
        before, n = n, min(n + step, size)
        cells += len(live) * (n - before)
        means = values[live, :n].mean(1)
        leader = live[np.argmin(means)]
        apart = values[live, :n] - values[leader, :n]
        error = apart.std(1, ddof=1) * np.sqrt((1 - n / size) / n)
        live = live[(apart.mean(1) <= 1.645 * error) | (live == leader)]
        if len(live) == 1 or n == size:
            return int(leader), cells, -(-n // step)


def wald(full: PromptScores, delta: float, responses: np.ndarray | None, memory: PromptScores | None = None) -> float:
    """Share of the cells saved if each prompt took the examples of Wald's test for normal differences.

    That is ``2 ln(1 / delta) * variance / gap**2`` to tell it from the winner, corrected for the finite number of
    examples; the gap includes half a percent of the loss, and the variance is what is left by the strata and, with a
    memory, by the best multiple of the old difference.
    """
    size, values, old = full.nll.shape[1], brought(full), brought(memory or full)
    lengths, best = full.tokens.numpy().mean(0), full.best
    stratum = strata(lengths if responses is None else responses, lengths)
    known, needed = (stratum[:, None] == np.unique(stratum)).astype(float), np.zeros(len(values))
    for k in range(len(values)):
        seen = known if memory is None else np.concatenate([known, (old[k] - old[best])[:, None]], 1)
        apart = values[k] - values[best]
        rest = apart - seen @ np.linalg.lstsq(seen, apart, rcond=None)[0]
        gap = apart.mean() + SHARE * values[best].mean()
        examples = -2 * np.log(delta) * (rest @ rest) / max(size - seen.shape[1], 1) / gap**2
        needed[k] = max(1.0, examples / (1 + examples / size))
    needed[best] = np.delete(needed, best).max(initial=1.0)
    return float(1 - needed.mean() / size)


def replays(one: Matrices, state: int, rule: str, count: int, delta: float) -> Replays:
    """`count` replays of a rule on one matrix."""
    if rule.startswith("wald"):
        count = 1  # no order is drawn
    states, full = one.states, one.states[state]
    loss, best = full.loss.numpy(), full.best
    options = {"strict": {"relative": 0.0}, "memory": {"memory": states[state - 1]}}.get(rule, {})
    saved, regret, rounds, broken = [], [], [], 0
    for seed in range(count):
        if rule == "plain":
            winner, cells, turns = plain_rule(full, np.random.default_rng(seed).permutation(full.nll.shape[1]))
        elif rule.startswith("wald"):
            memory = states[state - 1] if rule == "wald-memory" else None
            cells, winner, turns = (1 - wald(full, delta, one.responses, memory)) * full.nll.numel(), best, 1
        else:
            contest = replay(full, Race(delta=delta, seed=seed, **options), one.responses)
            winner, cells, turns = contest.leader, contest.scored.sum(), len(contest.rounds)
            broken += loss[winner] - loss[best] > contest.tolerance
        saved.append(1 - cells / full.nll.numel())
        regret.append(float(loss[winner] / loss[best] - 1))
        rounds.append(turns)
    p10, p50, p90 = (float(x) for x in np.quantile(saved, [0.1, 0.5, 0.9]))
    return Replays(
        set=one.set, task=one.task, state=state, rule=rule, prompts=len(loss), examples=full.nll.shape[1],
        near=int((loss <= loss[best] * (1 + SHARE)).sum()), delta=delta, replays=count, saved_p10=p10, saved_p50=p50,
        saved_p90=p90, wrong=float(np.mean(np.asarray(regret) > 0)), broken=float(broken) / count,
        over_half_percent=float(np.mean(np.asarray(regret) > SHARE)), worst_regret=100 * max(regret),
        rounds=float(np.mean(rounds)),
    )  # fmt: skip


def _one(job) -> Replays:
    return replays(*job)


def all_replays(matrices: list[Matrices], rules, count: int, delta: float, workers: int = 1) -> Iterator[Replays]:
    """Every rule on every matrix; `memory` needs a state before."""
    jobs = [
        (one, state, rule, count, delta)
        for rule in rules
        for one in matrices
        for state in range("memory" in rule, len(one.states))
    ]
    if workers == 1:
        yield from map(_one, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(_one, jobs)


def summary(rows: list[Replays]) -> str:
    """One line a set and rule: medians over matrices of the median saving, shares of all replays, the worst matrix."""
    lines = [
        f"{'set':<9}{'rule':<12}matrices  replays  saved p50  lowest  wrong  promise broken, worst  > 0.5 %, worst  "
        "worst regret"
    ]
    for name, rule in dict.fromkeys((row.set, row.rule) for row in rows):
        own = [row for row in rows if (row.set, row.rule) == (name, rule)]
        weights = [row.replays for row in own]
        wrong, broken, over = (
            np.average([getattr(row, part) for row in own], weights=weights)
            for part in ("wrong", "broken", "over_half_percent")
        )
        kept = f"{broken:.2%}, {max(row.broken for row in own):.1%}" if rule in RACES else "-"
        most = f"{over:.2%}, {max(row.over_half_percent for row in own):.1%}"
        lines.append(
            f"{name:<9}{rule:<12}{len(own):>8}{sum(weights):>9}{np.median([row.saved_p50 for row in own]):>11.1%}"
            f"{min(row.saved_p50 for row in own):>8.1%}{wrong:>7.1%}{kept:>23}{most:>16}"
            f"{max(row.worst_regret for row in own):>12.2f} %"
        )
    return "\n".join(lines)


def table(rows: list[Replays]) -> str:
    """One line a matrix and rule."""
    lines = [
        f"{'set':<9}{'task':<26}state rule        near  saved p10   p50   p90  wrong broken >0.5 %  worst %  rounds"
    ]
    for row in rows:
        lines.append(
            f"{row.set:<9}{row.task[:25]:<26}{row.state:>5} {row.rule:<12}{row.near:>4}{row.saved_p10:>11.1%}"
            f"{row.saved_p50:>6.1%}{row.saved_p90:>6.1%}{row.wrong:>7.1%}{row.broken:>7.1%}{row.over_half_percent:>7.1%}"
            f"{row.worst_regret:>9.2f}{row.rounds:>8.1f}"
        )
    return "\n".join(lines)


def write_rows(path: Path, rows: list[Replays]) -> None:
    """All rows as CSV, with the day they were made."""
    text, day = io.StringIO(), datetime.datetime.now(datetime.UTC).date().isoformat()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["date", *(field.name for field in fields(Replays))])
    for row in rows:
        writer.writerow([day, *(round(v, 5) if isinstance(v, float) else v for v in asdict(row).values())])
    atomic_write(path, text.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=Path, nargs="*", default=MATRICES, help="files (default: committed ones)")
    parser.add_argument("--sets", nargs="*", default=SETS, choices=SETS)
    parser.add_argument("--rules", nargs="*", default=RULES, choices=RULES)
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--delta", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    matrices = [one for one in read_matrices(args.matrices) if one.set in args.sets]
    for row in all_replays(matrices, args.rules, args.replays, args.delta, args.workers):
        rows.append(row)
        print("\n".join(table([row]).splitlines()[len(rows) > 1 :]), flush=True)
    print(f"\n{args.replays} replays each, delta {args.delta}, {time.perf_counter() - started:.0f} s\n{summary(rows)}")
    if args.csv:
        write_rows(args.csv, rows)


if __name__ == "__main__":
    main()
