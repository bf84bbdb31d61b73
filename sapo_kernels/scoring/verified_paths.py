"""Which path scores a job: the fastest whose log-probabilities are the plain model's on some of the job's own cells.

1. Where to begin. Code of the user's own in the forward (foreign_code.py): alone. What the class of model rules out
   (`model_support.fastest_path`), or the caller's `impl`: that path. A path that the same model, used in the same way
   (fingerprint.py), was found to need before: that one.
2. One or two cells go through the plain model (verification.py). If no loss is finite, nothing can be compared, and no
   sequence is packed or padded.
3. The path scores the job (paths.py); while it does, its logits for these cells are compared. If they differ, or the
   path fails, the next slower one is tried, with its own cells. Alone is last: it fails only where a model does not
   give the same twice.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from . import model_support
from .attention import NotTreeable
from .fingerprint import configurations, fingerprint
from .foreign_code import foreign_code
from .model_state import (
    Unrecoverable,
    claimed,
    compilation_off,
    forwards_undone,
    is_out_of_memory,
    only_this_thread,
    scoring_mode,
)
from .paths import ALONE, EQUAL, PADDED, PATHS, TREE, Paths, most_batched
from .verification import UNMEASURED, Check, Disagreement, PlainModel, chosen_cells

logger = logging.getLogger("sapo_kernels")

# Cells from which on a second one is verified, at most one in ten; of fewer where there is more than one pass.
TWO_CHECKS = 20
# How many passes have their ends verified where unknown code is packed because the caller insists.
VERIFIED_PASSES = 4
# Of one model: it may be used in a few ways in turn (under autocast, with another adapter).
REMEMBERED = 16
_FAILED = "it failed"
# The first path of each `impl`; of the others the tree.
_ASKED = {"padded": PADDED, "alone": EQUAL}
_SPOKEN = {PADDED: "by the padded path", EQUAL: "each sequence without padding", ALONE: "each sequence alone"}


@dataclass
class Settled:
    """What is known of a model as one fingerprint has it: the path that agreed, why not a faster one, its noise.

    For a race's later rounds: length, tokens of the longest sequence that was verified; cells, how many were scored up
    to the latest round with a check, and since, how many after it.
    """

    path: str
    reason: str | None
    through_model: bool
    noise: tuple[float, float] | None
    length: int = 0
    cells: int = 0
    since: int = 0

    @property
    def name(self) -> str:
        """The path as people know it."""
        return ALONE if self.path == EQUAL else self.path


@dataclass
class Measured:
    """What a job found: [cells] nll in nats, computed tokens, by which path.

    verified: how far each cell that was compared with the plain model is from it, nats, by its name.
    """

    nll: np.ndarray
    computed: int
    settled: Settled
    verified: dict[str, float]


_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Settled]] = weakref.WeakKeyDictionary()


class VerifiedPaths(Paths):
    """The cells of one cache on one model, by the first path that agrees with the plain model.

    impl: what the caller insists on, see `score_prompts`. quiet: another part of the same job, or another rank, says in
    the log what there is to say. settled: what an earlier part of the job found, then this one.
    """

    impl = "auto"
    quiet = False
    settled: Settled | None = None

    @property
    def insists(self) -> bool:
        """Whether the caller wants the tree and no other path."""
        return self.impl not in ("auto", "padded", "alone")

    @contextlib.contextmanager
    def prepared(self):
        """Around one call: the model is this job's, and looked at once for all rounds of a race."""
        with (
            claimed(self.inner),
            scoring_mode(self.model),
            compilation_off(),
            forwards_undone(self.inner) as self.put_back,
        ):
            self.configs = configurations(self.model)
            self._look(self._fingerprint())
            with only_this_thread(self.inner):
                self.during = self._fingerprint()
                yield

    def _fingerprint(self) -> int:
        return fingerprint(self.model, self.device, self.configs, f"{self.impl}, fuse={self.fuse}")

    def _look(self, key: int) -> None:
        self.key, self.foreign = key, foreign_code(self.model, self.configs)
        self.plain = PlainModel(self.model, self.inner, self.device, keep_rows=self.foreign is None)

    def measure(self) -> Measured:
        """Score all cells, by the first path that agrees with the plain model; inside `prepared`."""
        self.put_back()
        if (now := self._fingerprint()) != self.during:  # changed since the call began, by who watches the progress
            self.look_up()
            self._look(now)
            self.during, self.settled = now, None
        one = self.settled
        # Batches of other rounds have other company: only the tree is taken at its word for shorter sequences.
        # One of their cells is verified now and then, whenever twice as many have been scored.
        if one is not None and one.path == TREE and self.longest <= one.length and one.since < one.cells:
            self.through_model = one.through_model
            one.since += len(self.cache.lengths)
            return Measured(*self.attempt(TREE, [], self.plain), one, {})
        known = _known.setdefault(self.inner, {})
        found, lasting = self._first_that_agrees(one or known.get(self.key), self.foreign, self.plain)
        if one is not None and found.settled.path == one.path:
            found.settled.length = max(one.length, self.longest)
            found.settled.cells += one.cells + one.since
        self.settled = found.settled
        if lasting:
            while len(known) >= REMEMBERED:
                known.pop(next(iter(known)))
            known[self.key] = self.settled
        return found

    def _first_that_agrees(
        self, before: Settled | None, foreign: str | None, plain: PlainModel
    ) -> tuple[Measured, bool]:
        """(the result, whether its path may be remembered)."""
        start, reason = self._start(foreign)
        if before is not None and PATHS.index(before.path) > PATHS.index(start):
            start, reason = self._allowed(before.path, before.reason)
        checks = self._checks([], self._cells(start, before, foreign), before, plain)
        lasting = any(check.finite for check in checks)
        if not lasting and start in (TREE, PADDED):
            start, reason = self._allowed(EQUAL, "its log-probabilities are not finite: nothing can be verified")
        for path in PATHS[PATHS.index(start) :]:
            checks = self._checks(checks, self._cells(path, before, foreign), before, plain)
            self.through_model = not all(check.head for check in checks)
            if any(check.head is None for check in checks) and path != ALONE:
                _, reason = self._allowed(ALONE, "its forward does not go through its output embeddings")
                continue
            self._say(path, reason)
            found, problem = self._try(path, checks, plain)
            if found is not None:
                cells, noise = len(self.cache.lengths), checks[0].noise
                settled = Settled(path, reason, self.through_model, noise, self.longest, cells)
                verified = {self.cache.cell_name(check.cell): check.worst for check in checks}
                return Measured(*found, settled, verified), lasting
            # What failed may have been a passing fault.
            lasting = lasting and not problem.startswith(_FAILED)
            if before is not None:
                # What is remembered may have changed: the model's own error, which cells show a difference.
                return self._first_that_agrees(None, foreign, plain)
            following = PATHS[min(PATHS.index(path) + 1, len(PATHS) - 1)]
            _, reason = self._allowed(following, f"{type(self.inner).__name__} by the {path} path: {problem}")
        raise RuntimeError(
            f"model: expected the same log-probabilities each time, got different ones for the same sequence "
            f"({reason}); it cannot be scored"
        )

    def _try(
        self, path: str, checks: list[Check], plain: PlainModel
    ) -> tuple[tuple[np.ndarray, int] | None, str | None]:
        """What `attempt` gives, or (None, why another path is needed); errors that no path avoids are raised."""
        try:
            return self.attempt(path, checks, plain), None
        except (Disagreement, NotTreeable) as error:
            return None, str(error)
        except Exception as error:
            if isinstance(error, Unrecoverable) or is_out_of_memory(error) or path == ALONE:
                raise
            return None, f"{_FAILED}: {type(error).__name__}: {str(error)[:200]}"

    def _say(self, path: str, reason: str | None) -> None:
        """A line in the log for a path that is slower than the one asked for, once a job."""
        asked = _ASKED.get(self.impl, TREE)
        told = self.quiet or (self.settled is not None and self.settled.path == path)
        if PATHS.index(path) > PATHS.index(asked) and reason is not None and not told:
            logger.warning("scoring %s: %s", _SPOKEN[path], reason)

    def _start(self, foreign: str | None) -> tuple[str, str | None]:
        """(the first path to try, why not a faster one), before anything is computed."""
        if foreign is not None and not self.insists:
            return ALONE, f"{foreign} is not code of a known library and may look at other sequences of its batch"
        path, reason = model_support.fastest_path(self.model, self.inner, self.longest)
        return (_ASKED.get(self.impl, TREE), None) if reason is None else self._allowed(path, reason)

    def _allowed(self, path: str, reason: str) -> tuple[str, str]:
        """`path` and `reason`; raises if the caller insists on a faster path."""
        if self.insists:
            raise RuntimeError(f"impl={self.impl!r}: {reason}")
        return (EQUAL if self.impl == "alone" and path == PADDED else path), reason

    def _cells(self, path: str, before: Settled | None, foreign: str | None) -> list[int]:
        """The cells to verify on a path, the longest first."""
        ends = chosen_cells(self.cache, 2)
        longest, shortest = ends[0], ends[-1]
        if path in (PADDED, EQUAL):
            return [longest, most_batched(self.cache, self._budget(), path == EQUAL)]
        if path == ALONE:  # whether the model gives the same twice
            return [longest, shortest]
        # In front of every other sequence a cell has the same place in the pass as alone, and shows no neighbour.
        first, last = self.cache.extremes
        if before is not None and before is self.settled and self.longest <= before.length:
            return [last]
        if longest == first or (before is None and self._large()):
            cells = [longest, last if last != longest else shortest]
        else:
            cells = [longest]
        if foreign is None or not self.insists:
            return cells
        plan = self.cache.plan(self._budget())
        passes = [*plan.passes[: VERIFIED_PASSES // 2], *plan.passes[-VERIFIED_PASSES // 2 :]]
        # The next leaf in depth-first order belongs to a cell that holds the token.
        order = np.argsort(plan.trie.leaf, kind="stable")
        tokens = [token for step in passes for token in (step.start, step.stop - 1)]
        return [*cells, shortest, *order[np.searchsorted(plan.trie.leaf[order], tokens)].tolist()]

    def _large(self) -> bool:
        return len(self.cache.lengths) >= TWO_CHECKS or len(self.cache.plan(self._budget()).passes) > 1

    def _checks(self, checks: list[Check], cells: list[int], before: Settled | None, plain: PlainModel) -> list[Check]:
        """`checks` and those of more cells; of others too as long as no cell's loss is finite."""
        reader, found = self.reader(), {check.cell: check for check in checks}
        noise = before.noise if before and before.noise and before.noise < UNMEASURED else None
        for cell in [*cells, *chosen_cells(self.cache, len(cells) + 3)]:
            cell = int(self.cache.first_equal[cell])
            if cell in found or (cell not in cells and any(check.finite for check in found.values())):
                continue
            self.put_back()
            found[cell] = plain.check(self.cache, cell, reader.observed, noise)
        self.put_back()
        return list(found.values())

    def attempt(self, path: str, checks: Sequence[Check], plain: PlainModel) -> tuple[np.ndarray, int]:
        """`run`; a job that is shared among ranks shares this out."""
        return self.run(path, checks, plain)
