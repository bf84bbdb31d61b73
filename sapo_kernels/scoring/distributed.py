"""score_prompts_sharded: the cells of one job shared out among ranks, with the same bits for any number of them.

The rounding of a matrix product depends on what else is in it, so a cell's last bits depend on which cells are scored
with it. The job is therefore cut into shards that depend on the job alone; a shard is scored as a job of its own, by
whichever rank it falls to. Shards are pieces of the trie's depth-first order: at each cut, the path to it is computed
once more and nothing else is, at most one sequence a cut. Sums come back by cell, and each cell has one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from ..trie.trie import TokenTrie
from .attention import NotTreeable
from .fingerprint import autocast_of
from .model_state import Unrecoverable, compilation_off, is_out_of_memory, scoring_mode
from .paths import ALONE
from .prompt_scores import PromptScores
from .race import Race
from .ranks import GRACE, RankError, Ranks, collective_timeout, is_of_a_collective, ranks_of
from .response_cache import ResponseCache
from .score import ScoringJob, cache_of, check_choices
from .verification import Check, Disagreement, PlainModel

# What all ranks must have alike, in the order of its digests.
ALIKE = ("prompts and examples", "options", "model", "weights")
DEFAULT_TIMEOUT = 60.0
# Numbers of shards to choose from: common numbers of ranks divide them.
COUNTS = (1, 2, 4, 8, 12, 24)
# Values of each weight that are compared.
SAMPLE = 16

# By cache and number of shards: each one's cells and cache.
_cuts: weakref.WeakKeyDictionary[ResponseCache, dict[int, list]] = weakref.WeakKeyDictionary()


def score_prompts_sharded(
    model,
    prompts: Sequence[str] | ResponseCache,
    examples: Sequence[Mapping[str, str]] | None = None,
    *,
    group=None,
    timeout: float = DEFAULT_TIMEOUT,
    shards: int | None = None,
    max_tokens: int | None = None,
    impl: str = "auto",
    race: Race | None = None,
    fuse: str | bool = "auto",
    **layout,
) -> PromptScores:
    """`score_prompts` by all ranks of a process group together: each scores its share, all get the whole matrix.

    Called by every rank with the same arguments, or by one process alone, with or without `torch.distributed`::

        accelerator = Accelerator()
        model = accelerator.prepare(model)
        scores = sk.score_prompts_sharded(model, prompts, examples, tokenizer=tokenizer)   # the same on every rank

    Args:
        model: as for `score_prompts`; the same on every rank, plain, in DDP, or sharded by FSDP2.
        prompts, examples, layout: as for `score_prompts` (tokenizer, template, suffix, text_word, max_source,
            max_target).
        group: a process group of any backend; None: all ranks. The ranks talk through its store.
        timeout: seconds without a sign of a rank (each of its forwards is one) after which the others give it up.
        shards: into how many shards the job is cut; default: 1 to 24, so that each has two passes or more. A multiple
            of the number of ranks keeps all of them busy; the bits depend on it.
        max_tokens, impl, race, fuse: as for `score_prompts`. Each round of a race is shared out.

    Returns:
        `PromptScores`, bitwise the same on every rank. stats also holds "shards" and "world"; "trie_tokens" counts
        what all ranks computed.

    Raises:
        RankError: on every other rank when one raises, is killed, stops or does not come, naming it and saying why.
        ValueError: as `score_prompts`; also naming the rank whose prompts, examples, options, model or weights (a
            sample of each) differ from the others'; a model that is sharded otherwise than by FSDP2.

    Numerics: the same bits whatever the number of ranks, if nothing runs out of memory on the way (halved passes round
    differently) and all ranks compute alike (kind of device, versions, threads). Within the tolerance of
    `score_prompts`, not bitwise, of `score_prompts` itself, which rounds as one job.
    """
    ranks = ranks_of(group, timeout)
    with ranks.together():
        check_choices(impl, max_tokens, race, fuse)
        if shards is not None and (type(shards) is not int or shards < 1):
            raise ValueError(f"shards: expected a whole number of at least 1, got {shards!r}")
        cache = cache_of(prompts, examples, layout.pop("tokenizer", None), layout, model)
        job = ShardedJob(model, cache, impl, max_tokens, ranks, shards, fuse)
        job.check_alike(race)
        scores = job.score(race)
        scores.stats.update(shards=len(job.shards), world=job.world)
        return scores


def cut(trie: TokenTrie, count: int) -> list[np.ndarray]:
    """The cells of a trie in at most `count` parts of about as many tokens, each a piece of the depth-first order.

    A cut looks for the place with the shortest path within an eighth of a part around the even one. Equal sequences
    stay together, so that equal cells keep equal bits.
    """
    order = np.argsort(trie.leaf, kind="stable")
    leaf = trie.leaf[order]
    begin = np.flatnonzero(np.diff(leaf)) + 1
    # The first token that is not on the path of the cell before, and the length of what it shares with it.
    token = leaf[begin - 1] + 1
    shared = trie.depth[token]
    size, chosen = len(trie) / count, []
    for i in range(1, count):
        if not len(begin):
            break
        even = i * size
        first, stop = np.searchsorted(token, [even - size / 8, even + size / 8])
        if first == stop:
            first = min(max(int(np.searchsorted(token, even)), 0), len(token) - 1)
            stop = first + 1
        near = np.lexsort((np.abs(token[first:stop] - even), shared[first:stop]))
        chosen.append(int(begin[first + near[0]]))
    return [np.sort(cells) for cells in np.split(order, np.unique(np.asarray(chosen, dtype=np.int64)))]


class ShardedJob(ScoringJob):
    """A scoring job whose cells are shared out: one call of `score_prompts_sharded`, or a round of its race."""

    def __init__(self, model, cache: ResponseCache, impl: str, max_tokens, ranks: Ranks, shards: int | None, fuse):
        super().__init__(model, cache, impl, max_tokens, False, fuse)
        self.ranks, self.count = ranks, shards
        reason = unshareable(self.model)
        if reason:
            raise ValueError(
                f"model: {reason}; expected one that is whole on each rank, or sharded by FSDP2 alone; "
                "score_prompts can score it, all cells on every rank"
            )
        self.gathers = gathers_in_forward(self.model)
        self.world, self.own = len(ranks.members), ranks.members.index(ranks.rank)
        self.shards = _shards(cache, shards, self.max_tokens)
        self.quiet = self.own > 0

    def _prefix_cache(self) -> None:
        # What a rank has kept would depend on the shards it had, and rounding depends on what is kept.
        return None

    def part(self, cells: np.ndarray) -> ShardedJob:
        part = super().part(cells)
        part.shards = _shards(part.cache, self.count, self.max_tokens)
        return part

    def _checks(self, checks, cells, before, plain) -> list[Check]:
        # On every rank, for all must take the same path.
        with self._with_the_others():
            return super()._checks(checks, cells, before, plain)

    def attempt(self, path: str, checks: Sequence[Check], plain: PlainModel) -> tuple[np.ndarray, int]:
        problem, own = "", []
        with self._with_the_others():
            # In turn: shards are about as large as each other.
            for cells, cache in self.shards[self.own :: self.world]:
                if problem := self._shard(path, cells, cache, checks, plain, own):
                    break
        found = self.ranks.exchange((problem, [(sums.tolist(), int(computed)) for sums, computed in own]))
        for problem, _ in found:
            if problem:
                raise Disagreement(problem)
        nll, total = np.full(len(self.cache.lengths), np.nan), 0
        for place, (_, made) in enumerate(found):
            for (cells, _), (sums, computed) in zip(self.shards[place :: self.world], made, strict=True):
                nll[cells], total = sums, total + computed
        return nll, total

    def _shard(self, path, cells, cache, checks, plain, found: list) -> str:
        """Append the result of one shard to `found`; or return why no rank may take this path."""
        job = copy.copy(self)
        job.cache = cache
        places = {int(cell): place for place, cell in enumerate(cells)}
        mine = {check.cell: replace(check, cell=places[check.cell]) for check in checks if check.cell in places}
        try:
            found.append(job.run(path, list(mine.values()), plain))
        except Exception as error:
            # Weights that could not be gathered are no fault of the path: `_with_the_others` says which rank is lost.
            lost = self.gathers and is_of_a_collective(error)
            if isinstance(error, Unrecoverable) or is_out_of_memory(error) or path == ALONE or lost:
                raise
            return str(error) if isinstance(error, (Disagreement, NotTreeable)) else f"it failed: {error!r}"
        for check in checks:
            if check.cell in mine:
                check.worst = mine[check.cell].worst
        return ""

    @contextlib.contextmanager
    def _with_the_others(self):
        """Every forward in the block begins with a sign to the other ranks.

        A model that gathers its weights in each forward needs all ranks in each: they run in step, and one that is
        through goes on with forwards of one token until all are. Gathering with a rank that is gone or stopped fails,
        and does not say with which. All have begun it together, so whoever is alive comes to an exchange in time.
        """

        def sign(module, args):
            if self.gathers:
                self.ranks.exchange(True)
            else:
                self.ranks.beat()

        with collective_timeout(gathering_groups(self.model), self.ranks.timeout):
            # In front of FSDP's own hook, which gathers.
            handle = self.model.register_forward_pre_hook(sign, prepend=True)
            try:
                yield
                handle.remove()
                while self.gathers and any(self.ranks.exchange(False)):
                    ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
                    with scoring_mode(self.model), compilation_off():
                        self.model(input_ids=ids, use_cache=False)
            except RuntimeError as error:
                if self.gathers and is_of_a_collective(error) and not isinstance(error, RankError):
                    self.ranks.exchange(False, max(GRACE, self.ranks.timeout + GRACE - self.ranks.since_exchange()))
                raise
            finally:
                handle.remove()

    def check_alike(self, race: Race | None) -> None:
        """The first exchange: every rank must hold the same job."""
        cells = (
            np.ascontiguousarray(a, np.int64) for a in (self.cache.ids, self.cache.offsets, self.cache.context_lengths)
        )
        how = (self.impl, self.fuse, self.max_tokens, self.fills_rounds())
        options = (*how, len(self.shards), self.count, *autocast_of(self.device))
        digests = (
            _digest(str(self.cache.num_examples), *self.cache.prompts, *(a.view(np.uint8).data for a in cells)),
            _digest(repr(options), repr(race)),
            *_model_digests(self.model),
        )
        for what, column in zip(ALIKE, zip(*self.ranks.exchange(digests), strict=True), strict=True):
            usual = max(column, key=column.count)
            for rank, value in zip(self.ranks.members, column, strict=True):
                if value != usual:
                    raise ValueError(
                        f"rank {rank}: {what}: expected the same on all {len(column)} ranks, got what "
                        f"differs from {column.count(usual)} of them"
                    )


def _shards(cache: ResponseCache, count: int | None, max_tokens: int) -> list[tuple[np.ndarray, ResponseCache]]:
    """The shards of a cache, cut once for each number of them."""
    if count is None:
        count = max(n for n in COUNTS if n <= max(1, len(cache.trie) // (2 * max_tokens)))
    made = _cuts.setdefault(cache, {})
    if count not in made:
        made[count] = [(cells, cache.select(cells)) for cells in cut(cache.trie, count)]
    return made[count]


def unshareable(model: nn.Module) -> str | None:
    """Why ranks may not score different cells: something of the model is spread over them, and not by FSDP2 alone."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            return f"{name or type(model).__name__!r} is spread over ranks"
    gathered = gathers_in_forward(model)
    for name, parameter in model.named_parameters():
        divided = sum(map(_divides, getattr(parameter, "placements", ())))
        if hasattr(parameter, "ds_id") or divided > 1 or (divided and not gathered):
            return f"{name!r} is spread over ranks"
    return None


def gathers_in_forward(model: nn.Module) -> bool:
    """Whether each forward of `model` needs all ranks, because FSDP2 gathers its weights there."""
    if not any(hasattr(parameter, "placements") for parameter in model.parameters()):
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def gathering_groups(model: nn.Module) -> list:
    """The process groups that FSDP2 gathers weights in."""
    meshes = {parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh")}
    return list({id(group): group for mesh in meshes for group in mesh.get_all_groups()}.values())


def _divides(placement) -> bool:
    return not placement.is_replicate()


def _digest(*parts) -> str:
    state = hashlib.sha256()
    for part in parts:
        part = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else bytes(part)
        state.update(len(part).to_bytes(8, "little") + part)
    return state.hexdigest()


def _model_digests(model: nn.Module) -> tuple[str, str]:
    """(of names, shapes, types and adapters; of some values of each weight that is not spread over ranks)."""
    described = [f"{name} {tuple(p.shape)} {p.dtype}" for name, p in model.named_parameters()]
    for name, module in model.named_modules():
        if hasattr(module, "active_adapters") and isinstance(getattr(module, "scaling", None), dict):
            described.append(f"{name} {module.active_adapters} {module.scaling} {module.disable_adapters}")
    samples: dict[torch.device, list[torch.Tensor]] = {}
    for parameter in model.parameters():
        values = parameter.detach()
        if values.device.type == "meta" or hasattr(parameter, "placements") or not values.numel():
            continue
        values = values.reshape(-1)
        values = values[:: -(-len(values) // SAMPLE)].contiguous().view(torch.uint8)
        samples.setdefault(values.device, []).append(values)
    # One copy from each device.
    read = [torch.cat(values).cpu().numpy().data for values in samples.values()]
    return _digest(*described), _digest(*read)
