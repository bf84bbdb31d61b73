"""What a race saves and what it risks: replays over loss matrices of trained models, with other orders of the examples.

    python -m benchmarks.racing                                   # the committed matrices, 50 replays of each
    python -m benchmarks.racing --sets smollm2/held-out --csv benchmarks/results/racing.csv

A replay is a race over a matrix that is known in full: what it chose is compared with what scoring every cell chooses.
Rules: `race` (the defaults) and `strict` (no tolerance). `memory` and `memory-4` (first rounds of 16 and 4 examples)
know the loss of every cell under the model's state before, which is more than any run does: what a memory could save at
most. Regret is the loss of the prompt chosen above the lowest, in percent of the lowest.

Sets: ``smollm2`` and ``gemma3-270m`` are pretrained models, each as it comes and after 30 LoRA steps on another task;
all claims are judged on these (`benchmarks.real_matrices` makes them). ``tiny-base`` is the base
that ships with the package, ``tiny-early`` an early one, each at three or four steps of a LoRA. Tasks are halved by the
SHA-256 of their names: the rule was chosen on the tuning half alone.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sapo_kernels import PromptScores, Race
from sapo_kernels.files import atomic_write
from sapo_kernels.scoring.race import RaceState

from .documents import table
from .rows import RESULTS, csv_text

MATRICES = tuple(RESULTS / f"race_matrices_{name}.safetensors" for name in ("real", "tiny"))
RULES = {"race": {}, "strict": {"relative": 0.0}, "memory": {}, "memory-4": {"first": 4}}
# A choice is wrong only if it costs more than this share of the loss.
SHARE = 0.005


@dataclass(frozen=True)
class Matrix:
    """Full scores of one task under one state of a model. before: [K, M] nats as the model came, if this is later."""

    set: str
    task: str
    state: str
    scores: PromptScores
    before: np.ndarray | None = None


@dataclass(frozen=True)
class Replays:
    """One rule on one matrix; shares are of the replays, regrets percent of the lowest loss.

    near: prompts within half a percent of the best, itself included. saved: share of the cells not scored.
    """

    set: str
    task: str
    state: str
    rule: str
    prompts: int
    examples: int
    near: int
    replays: int
    saved_p10: float
    saved_p50: float
    saved_p90: float
    wrong: float
    over_half_percent: float
    worst_regret: float
    rounds: float


def half(task: str) -> str:
    """The half that a task belongs to, fixed before anything was scored: rules are chosen on `tuning` alone."""
    return "tuning" if hashlib.sha256(task.encode()).hexdigest()[0] < "8" else "held-out"


def read_matrices() -> list[Matrix]:
    """From files with MODEL/TASK/STATE/nll and MODEL/TASK/tokens."""
    from safetensors.torch import load_file

    found: list[Matrix] = []
    for file in MATRICES:
        tensors = load_file(file)
        for name in sorted(name.removesuffix("/nll") for name in tensors if name.endswith("/nll")):
            model, task, state = name.split("/")
            nll = tensors[f"{name}/nll"].double()
            # A state may have fewer examples, the first ones.
            tokens = tensors[f"{model}/{task}/tokens"].long()[:, : nll.shape[1]]
            scores = PromptScores(nll, tokens, [f"prompt {k}" for k in range(len(nll))])
            before = tensors.get(f"{model}/{task}/base/nll") if state != "base" else None
            before = None if before is None else before[:, : nll.shape[1]].double().numpy()
            found.append(Matrix(f"{model}/{half(task)}", task, state, scores, before))
    return found


class RaceWithMemory(RaceState):
    """A race whose losses are compared less what the losses before predict of them: `before` is a control variate."""

    def __init__(self, race: Race, tokens: np.ndarray, before: np.ndarray):
        super().__init__(race, tokens)
        self.before = before - before.mean(1, keepdims=True)

    def _judge(self) -> None:
        own, seen = self.nll, np.ix_(self.active, self.order[: self.size])
        if self.size < self.num_examples:
            # One slope for all prompts: that of how prompts differ on an example, now and before.
            now, then = (losses[seen] - losses[seen].mean(0) for losses in (own, self.before))
            now, then = (apart - apart.mean(1, keepdims=True) for apart in (now, then))
            self.nll = own - (now * then).sum() / max((then * then).sum(), 1e-12) * self.before
        super()._judge()
        self.nll = own


def replay(full: PromptScores, race: Race, before: np.ndarray | None = None) -> RaceState:
    """The race over a matrix that is known in full, to its end; before: with a memory."""
    tokens, losses = full.tokens.numpy(), full.nll.numpy().ravel()
    state = RaceState(race, tokens) if before is None else RaceWithMemory(race, tokens, before)
    while (cells := state.next_cells()) is not None:
        state.add(cells, losses[cells])
    return state


def replays(one: Matrix, rule: str, count: int) -> Replays:
    """`count` replays of a rule on one matrix."""
    full, loss, before = one.scores, one.scores.loss.numpy(), one.before if rule.startswith("memory") else None
    ended = [replay(full, Race(seed=seed, **RULES[rule]), before).report() for seed in range(count)]
    regret = np.asarray([loss[report.winner] / loss.min() - 1 for report in ended])
    p10, p50, p90 = np.quantile([report.saved for report in ended], [0.1, 0.5, 0.9]).tolist()
    return Replays(
        set=one.set, task=one.task, state=one.state, rule=rule, prompts=len(loss), examples=full.nll.shape[1],
        near=int((loss <= loss.min() * (1 + SHARE)).sum()), replays=count, saved_p10=p10, saved_p50=p50, saved_p90=p90,
        wrong=float((regret > 0).mean()), over_half_percent=float((regret > SHARE).mean()),
        worst_regret=float(100 * regret.max()), rounds=float(np.mean([len(report.rounds) for report in ended])),
    )  # fmt: skip


def summary(rows: list[Replays]) -> str:
    """One line a set and rule: medians over matrices of the median saving, shares of all replays, the worst matrix."""
    lines = [f"{'set':<22}{'rule':<8}matrices  saved p50  lowest   > 0.5 %  worst matrix  worst regret"]
    for name, rule in dict.fromkeys((row.set, row.rule) for row in rows):
        own = [row for row in rows if (row.set, row.rule) == (name, rule)]
        saved, over = [row.saved_p50 for row in own], [row.over_half_percent for row in own]
        lines.append(
            f"{name:<22}{rule:<8}{len(own):>8}{np.median(saved):>11.1%}{min(saved):>8.1%}{np.mean(over):>10.2%}"
            f"{max(over):>14.0%}{max(row.worst_regret for row in own):>12.2f} %"
        )
    return "\n".join(lines)


def filled(matrices: list[Matrix], tokens: int = 16384, seeds: int = 4) -> str:
    """What rounds that fill a part of a GPU's forward of `tokens` save and cost, with inputs of 18 to 140 tokens.

    A forward is taken to last as long as one of `least` tokens at least.
    """
    least, found, draw = (2048, 8192, tokens), defaultdict(list), np.random.default_rng(0)
    for one in matrices:
        full, losses = one.scores, one.scores.loss.numpy()
        cost = draw.integers(31, 153, full.nll.shape[1]) + full.tokens.numpy()
        for fill in (0, tokens // 4, tokens // 2, tokens):
            for seed in range(seeds):
                state, forwards = RaceState(Race(seed=seed), full.tokens.numpy(), cost, fill), []
                while (cells := state.next_cells()) is not None:
                    whole, rest = divmod(int(cost.flat[cells].sum()), tokens)
                    forwards += [tokens] * whole + [rest] * (rest > 0)
                    state.add(cells, full.nll.numpy().ravel()[cells])
                report = state.report()
                lasts = [sum(max(one, n) for one in forwards) / cost.sum() for n in least]
                wrong = losses[report.winner] > losses.min() * (1 + SHARE)
                found[one.set.split("/")[0], fill].append((report.saved, wrong, len(report.rounds), *lasts))
    lines = []
    for (name, fill), values in found.items():
        saved, wrong, rounds, *times = np.asarray(values).T
        spans = [f"{one.mean():.2f} (worst {one.max():.2f})" for one in times]
        shares = [f"{np.median(saved):.1%}", f"{wrong.mean():.1%}", f"{rounds.mean():.1f}"]
        lines.append([name, str(fill), *shares, *spans])
    columns = [f"time, {n} at least" for n in least]
    return "\n".join(table(["set", "fill", "saved p50", "> 0.5 %", "rounds", *columns], lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", help="MODEL/HALF, default: all")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--csv", type=Path, help="a row a matrix and rule")
    parser.add_argument("--fill", action="store_true", help="what rounds that fill a GPU save and cost, instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    matrices = [one for one in read_matrices() if args.sets is None or one.set in args.sets]
    if args.fill:
        print(filled(matrices))
        return
    rows = [
        replays(one, rule, args.replays)
        for rule in RULES for one in matrices if one.before is not None or not rule.startswith("memory")
    ]  # fmt: skip
    print(summary(rows))
    if args.csv:
        atomic_write(args.csv, csv_text(rows))


if __name__ == "__main__":
    main()
