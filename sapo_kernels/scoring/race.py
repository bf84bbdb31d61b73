"""Race: score the prompts on more and more examples, and stop scoring those that cannot be the best.

`Race` says how, `Contest` holds one: it names the cells of the next round, takes their losses, and judges.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .prompt_scores import PromptScores
from .race_bounds import WARM_UP, Evidence, log_mean
from .race_report import RaceReport
from .race_strata import strata, without_strata


@dataclass(frozen=True)
class Shares:
    """Where delta goes, for each prompt that might be the best; they add up to 1.

    leader: to the bets against whoever leads. everyone: to those against every other prompt alike. openings: to those
    against whoever leads after so many examples. old_winner: to those against the winner that a memory names.
    """

    leader: float
    everyone: float
    openings: dict[int, float]
    old_winner: float


FRESH = Shares(0.6, 0.1, {8: 0.15, 16: 0.1, 32: 0.05}, 0.0)
REMEMBERED = Shares(0.4, 0.15, {8: 0.075, 16: 0.05, 32: 0.025}, 0.3)


@dataclass(frozen=True)
class Race:
    """How to look for the best of K prompts without scoring all K * M cells; for `score_prompts(..., race=Race())`.

    Round after round all prompts that are still in are scored on the next examples of a random order. After each, they
    are compared with the one that has the lowest loss so far, pair by pair on the examples that both have; what
    examples with the same response, or with one of like length, have in common is no noise. A prompt that is shown not
    to be the best leaves for good. One that is shown to be no more than the tolerance better waits; it may come back
    if another takes the lead. The race ends when one prompt is left: at the latest after all examples, where those left
    are told apart as by scoring every cell (lowest loss, then lowest index). A prompt with a loss that is not finite is
    out, and all bets against it are taken back.

    What is promised: with probability at least ``1 - delta`` over the random order, the winner's loss over all M
    examples (`reduce("token")`) is at most the tolerance above the lowest. This holds at any number of rounds, for any
    K and M, and for losses of any distribution, on one condition: among the differences between the best prompt and
    another (less what strata and memory say of them), none that is still to come lies further below the mean of the n
    before it than `reach * (1 + 2 / n)` times the lowest of these. Nearly every order of ordinary differences breaks
    that a little, most of all while few have been seen, and then the lower tail of the differences decides how often
    the promise is broken (`scoring.race_bounds` has the argument). What no race can promise is a prompt that is
    best because of a few examples that nobody has scored yet. `benchmarks.racing` counts how often the promise was
    broken on real matrices.

    Args:
        delta: probability of choosing worse than promised, in (0, 1).
        tolerance: nats per token that the winner may be above the best.
        relative: the same as a share of the winner's loss on the examples seen; the larger of the two counts. 0 with
            tolerance 0 decides between near ties too, for which most examples are needed.
        first: examples of the first round.
        growth: each round ends at this multiple of the examples of the one before. More rounds save cells and make
            smaller forwards; `score_prompts_sharded` also computes shared prefixes again in each.
        reach: see above; larger is safer and slower.
        seed: of the order of the examples. The same seed and losses give the same race.
        memory: scores of the same prompts on the same examples under an earlier state of the model, or several of
            them, the newest last. A prompt that was once scored on every example has a whole row; the newest one takes
            part of the noise out of the prompt's differences. The newest winner is expected to win again, and a
            part of delta is kept for it. A race leaves few whole rows: keep the last scores of all
            cells, and give ``memory=(all_cells, last_race)``; the two races need different seeds, as what a memory was
            chosen by must not be what the next race sees first. A memory that predicts nothing costs examples, never
            the promise.

    Raises:
        ValueError, TypeError: naming the option, what was wanted and what was got.
    """

    delta: float = 0.05
    tolerance: float = 0.0
    relative: float = 0.005
    first: int = 8
    growth: float = 1.1
    reach: float = 1.0
    seed: int = 0
    memory: PromptScores | Sequence[PromptScores] | None = None

    def __post_init__(self):
        if not (_number(self.delta) and 0.0 < self.delta < 1.0):
            raise ValueError(f"delta: wanted a number between 0 and 1, got {self.delta!r}")
        for name, low, high in (("tolerance", 0.0, math.inf), ("relative", 0.0, 1.0), ("reach", 1.0, math.inf)):
            value = getattr(self, name)
            if not (_number(value) and low <= value < high):
                raise ValueError(f"{name}: wanted a number of at least {low:g} and below {high:g}, got {value!r}")
        if not (_number(self.growth) and 1.0 < self.growth < math.inf):
            raise ValueError(f"growth: wanted a number above 1, got {self.growth!r}")
        if type(self.first) is not int or self.first <= WARM_UP:
            raise ValueError(f"first: wanted a whole number above {WARM_UP}, got {self.first!r}")
        if type(self.seed) is not int:
            raise ValueError(f"seed: wanted a whole number, got {self.seed!r}")
        memory = () if self.memory is None else self.memory
        memory = (memory,) if isinstance(memory, PromptScores) else memory
        if not isinstance(memory, (tuple, list)) or not all(isinstance(one, PromptScores) for one in memory):
            raise TypeError(f"memory: wanted PromptScores, several of them or None, got {type(memory).__name__}")
        # Frozen, and no list of somebody else's.
        object.__setattr__(self, "memory", tuple(memory))

    def order(self, num_examples: int) -> list[int]:
        """The examples in the order in which they are scored: that of a hash, the same in every version and process."""

        def place(example: int) -> bytes:
            return hashlib.blake2b(f"{self.seed} {example}".encode(), digest_size=16).digest()

        return sorted(range(num_examples), key=place)


class Contest:
    """One race over K prompts x M examples.

    Args:
        race: the options.
        tokens: [K, M] int64, response tokens of every cell, also of those never scored.
        prompts: K strings, compared with the memory's.
        responses: [M] equal numbers for equal responses; default: the lengths.

    Use::

        while (cells := contest.wanted()) is not None:      # flat numbers k * M + m, ascending
            contest.add(cells, nll)                         # [len(cells)] float64, nats
        contest.report()
    """

    def __init__(self, race: Race, tokens: np.ndarray, prompts: list[str], responses: np.ndarray | None = None):
        self.race, self.tokens = race, tokens
        self.num_prompts, self.num_examples = tokens.shape
        self.order = np.asarray(race.order(self.num_examples))
        self.nll = np.full(tokens.shape, np.nan)
        self.scored = np.zeros(tokens.shape, dtype=bool)
        # The loss sum(nll) / sum(tokens) is the mean of these multiples of the cells, as all tokens are known ahead.
        self._weight = self.num_examples / tokens.sum(1, keepdims=True)
        lengths = tokens.mean(0)
        self._stratum = strata(lengths if responses is None else responses, lengths)[self.order]
        self._old, self._old_winner = np.full(tokens.shape, np.nan), -1
        for memory in race.memory:
            self._remember(memory, prompts)
        self._has_control = bool(np.isfinite(self._old).any())
        self._plan = FRESH if self._old_winner < 0 else REMEMBERED
        self.removed = np.zeros(self.num_prompts, dtype=bool)  # shown to be worse
        self.broken = np.zeros(self.num_prompts, dtype=bool)  # a cell that is not finite
        self.waiting = np.zeros(self.num_prompts, dtype=bool)  # within the tolerance of the leader
        self.against = np.arange(self.num_prompts)
        self.left = np.zeros(self.num_prompts, dtype=np.int64)
        self.leader, self.tolerance, self.size = -1, 0.0, min(race.first, self.num_examples)
        self.rounds: list[int] = []
        # [2, n] for each example the leader after the examples before and the one behind it, and who was in then.
        self._leads, self._fields = np.zeros((2, 0), dtype=np.int64), []
        self._aim = 0.0
        # [rules, K, M] what the bets against whoever led added to each prompt's log capital; NaN: not yet worked out.
        self._growth = np.full((4 if self._has_control else 2, *tokens.shape), np.nan)

    def _remember(self, memory: PromptScores, prompts: list[str]) -> None:
        """Take over a memory's whole rows and its winner."""
        if list(memory.prompts) != list(prompts):
            raise ValueError("memory: wanted scores of the same prompts in the same order, got others")
        if tuple(memory.nll.shape) != self.tokens.shape:
            raise ValueError(f"memory: wanted scores {list(self.tokens.shape)}, got {list(memory.nll.shape)}")
        old, count = memory.nll.double().cpu().numpy(), memory.tokens.cpu().numpy()
        other = np.argwhere((count > 0) & (count != self.tokens))
        if len(other):
            k, m = other[0].tolist()
            raise ValueError(
                f"memory: prompt {k}, example {m}: wanted {self.tokens[k, m]} response tokens as in this job, got "
                f"{count[k, m]}"
            )
        whole = ((count > 0) & np.isfinite(old)).all(1)
        self._old[whole] = (old * self._weight)[whole][:, self.order]
        if memory.loss.isfinite().any():
            self._old_winner = memory.best

    @property
    def active(self) -> np.ndarray:
        """[K] bool, the prompts that the next round scores."""
        return ~(self.removed | self.broken | self.waiting)

    def wanted(self) -> np.ndarray | None:
        """The cells of the next round, or None if the race is over."""
        if self.rounds and self.active.sum() <= 1:
            return None
        while True:
            block = np.zeros(self.tokens.shape, dtype=bool)
            block[np.ix_(self.active, self.order[: self.size])] = True
            cells = np.flatnonzero(block & ~self.scored)
            if len(cells) or self.size == self.num_examples:
                return cells if len(cells) else None
            self._grow()

    def add(self, cells: np.ndarray, nll: np.ndarray) -> None:
        """The losses of the cells that `wanted` named; decides who leaves."""
        self.nll.flat[cells] = nll
        self.scored.flat[cells] = True
        self.rounds.append(self.size)
        self.left[self.active] = len(self.rounds)
        self._fields.append((self._leads.shape[1], self.size, self.active))
        self._leave_broken()
        self._lead()
        if self.active.any():
            self._judge()
        self._grow()

    def _grow(self) -> None:
        self.size = math.ceil(min(self.num_examples, self.size * self.race.growth))

    def _leave_broken(self) -> None:
        """Whoever has a cell that is not finite is out and never led; what was shown of the others is judged anew."""
        fresh = (self.scored & ~np.isfinite(self.nll)).any(1) & ~self.broken
        if fresh.any():
            self.broken |= fresh
            self.against[fresh] = np.flatnonzero(fresh)
            self.removed[:] = self.waiting[:] = False
            self._leads = self._leads[:, :0]
            self._growth[:] = np.nan

    def _lead(self) -> None:
        """Who leads after each number of examples, among the fit ones that were in when the next was scored."""
        for start, stop, field in self._fields:
            members, done = np.flatnonzero(field & ~self.broken), self._leads.shape[1]
            if stop <= max(start, done) or not len(members):
                continue
            values = without_strata(self._values(members, stop), self._stratum)[0]
            sums = (np.cumsum(values, 1) - values)[:, done:]
            rank = np.argsort(sums, axis=0, kind="stable")[[0, min(1, len(members) - 1)]]
            self._leads = np.concatenate([self._leads, members[rank]], 1)

    def _judge(self) -> None:
        """Find the leader among those scored furthest, and compare everyone who is not out with it."""
        counts = self.scored.sum(1)
        ready = np.flatnonzero(self.active & (counts == counts[self.active].max()))
        done = counts[ready[0]] == self.num_examples
        losses = self._full_losses()[ready] if done else self._values(ready, counts[ready[0]]).mean(1)
        leader = int(ready[np.argmin(losses)])
        if not done:
            # The strata and the memory may know better than the few examples seen.
            leader = int(ready[np.argmin(self._evidence(ready, leader, counts[leader]).estimate)])
        self.leader, self.against[leader] = leader, leader
        self.tolerance = max(self.race.tolerance, self.race.relative * float(losses.min()))
        if len(self.rounds) == 1:
            # What the stakes aim at must not depend on the examples that are bet on.
            aim = self._values(ready, min(WARM_UP, self.num_examples)).mean(1).min()
            self._aim = max(self.race.tolerance, self.race.relative * float(aim))
        others = np.flatnonzero(~(self.removed | self.broken))
        others = others[others != leader]
        for n in np.unique(counts[others]).tolist():
            group = others[counts[others] == n]
            evidence = self._evidence(group, leader, n, self._shares(group, leader))
            if evidence.complete:  # the leader has the lowest loss of these, and the lowest index of equals
                worse, close = np.ones(len(group), dtype=bool), np.zeros(len(group), dtype=bool)
            else:
                capital = self._against_leaders(group, n)
                worse = capital >= self._level
                capital = np.logaddexp(capital, evidence.log_capital(-self.tolerance))
                close = ~worse & (evidence.estimate >= 0.0) & (capital >= self._level)
            out = worse | close
            self.against[group] = np.where(out, leader, self.against[group])
            self.removed[group], self.waiting[group] = worse, close

    def _full_losses(self) -> np.ndarray:
        """[K] losses exactly as a call without a race has them; NaN for a prompt that was not scored everywhere."""
        whole = torch.from_numpy(np.where(self.scored.all(1, keepdims=True), self.nll, np.nan))
        return PromptScores(whole, torch.from_numpy(self.tokens), []).loss.numpy()

    def _values(self, prompts: np.ndarray, n: int) -> np.ndarray:
        """[P, n] what the first n examples bring to the losses of these prompts, in the order drawn."""
        return self.nll[np.ix_(prompts, self.order[:n])] * self._weight[prompts]

    @property
    def _level(self) -> float:
        """Log capital at which a belief is given up."""
        return -math.log(self.race.delta)

    def _control(self, prompts: np.ndarray, other: np.ndarray | int) -> np.ndarray | None:
        """[P, M] what the memory says of the losses of `prompts` minus that of `other`; 0, which changes nothing, for a
        prompt without a whole row. None without a memory of any.
        """
        if not self._has_control:
            return None
        control = self._old[prompts] - self._old[other]
        return np.where(np.isfinite(control), control, 0.0)

    def _evidence(
        self, prompts: np.ndarray, other: int, n: int, openings=((WARM_UP, 1.0),), sign=1.0, margin=None
    ) -> Evidence:
        """On the losses of `prompts` minus that of `other` after n examples; with sign -1 the reverse.

        margin: what the stakes aim at, the tolerance by default.
        """
        margin = self._aim if margin is None else margin
        drawn = sign * (self._values(prompts, n) - self._values(np.asarray([other]), n))
        control = self._control(prompts, other)
        control = None if control is None else sign * control
        return Evidence(drawn, self.num_examples, margin, self.race.reach, openings, self._stratum, control)

    def _shares(self, prompts: np.ndarray, other: int) -> list[tuple[int, np.ndarray]]:
        """What delta leaves for the bets against the belief that each of `prompts` is better than `other`.

        Only the best prompt can leave wrongly, and only if the winner lies more than the tolerance above it. Then the
        bets against all such winners, at the tolerance, and those against whoever led, at 0, are fair, and delta is
        what they start with together. One that was likely to win from what was known before a bet may have more of it.
        The tolerance may change with the rounds: no capital at it is above that at the true difference.
        """
        found = [(WARM_UP, np.full(len(prompts), self._plan.everyone / max(self.num_prompts - 1, 1)))]
        if other == self._old_winner:
            found.append((WARM_UP, np.full(len(prompts), self._plan.old_winner)))
        for first, share in self._plan.openings.items():
            if first < self._leads.shape[1]:
                lead, second = self._leads[:, first]
                rivals = np.where(prompts == lead, second, lead)
                found.append((first, np.where(rivals == other, share, 0.0)))
        return found

    def _against_leaders(self, prompts: np.ndarray, n: int) -> np.ndarray:
        """[P] log capital of the bets against the belief that nobody is better than each of `prompts`, n < M examples.

        Each example is bet on against the prompt that led before it, or the second if that is oneself.
        """
        lead, second = self._leads[:, :n]
        rivals = np.where(prompts[:, None] == lead, second, lead)
        for rival in np.unique(rivals).tolist():
            # A prompt's bets stay what they were: only those on examples that are new are worked out.
            new = (rivals == rival) & np.isnan(self._growth[0][prompts, :n])
            rows = new.any(1)
            if rows.any():
                growth = self._evidence(prompts[rows], rival, n, margin=0.0).growth(0.0)
                known = self._growth[:, prompts[rows], :n]
                self._growth[:, prompts[rows], :n] = np.where(new[rows], growth, known)
        made = self._growth[:, prompts, :n].sum(2)
        return math.log(self._plan.leader) + log_mean(made)

    def report(self) -> RaceReport:
        """What came out; call it when `wanted` has said None."""
        counts, winner = self.scored.sum(1), -1 if not self.active.any() else self.leader
        lower, upper = np.full((2, self.num_prompts), np.nan)
        above, regret = np.zeros(self.num_prompts), math.nan
        if winner >= 0:
            fit = np.flatnonzero(~self.broken)
            lower[winner] = upper[winner] = 0.0
            for n in np.unique(counts[fit]).tolist():
                group = fit[(np.minimum(counts, counts[winner])[fit] == n) & (fit != winner)]
                lower[group] = self._evidence(group, winner, n).lower_bound(self._level)
                upper[group] = -self._evidence(group, winner, n, sign=-1.0).lower_bound(self._level)
                # Who waits was shown to be at most the tolerance better, maybe by less.
                group = group[self.waiting[group]]
                if len(group):
                    shown = self._evidence(group, winner, n, self._shares(group, winner)).lower_bound(self._level)
                    above[group] = np.clip(-shown, 0.0, self.tolerance)
            regret = float(above.max())
        worse = self.removed | (self.waiting & (above == 0.0))
        reason = np.where(worse, "worse", "within tolerance")
        reason = np.where(self.broken, "not finite", np.where(np.arange(self.num_prompts) == winner, "winner", reason))
        return RaceReport(
            winner=winner,
            examples=counts.tolist(),
            left=self.left.tolist(),
            reason=reason.tolist(),
            against=self.against.tolist(),
            lower=lower.tolist(),
            upper=upper.tolist(),
            regret=regret,
            tolerance=self.tolerance,
            delta=self.race.delta,
            rounds=self.rounds,
            cells=int(self.scored.sum()),
            total=self.scored.size,
        )


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
