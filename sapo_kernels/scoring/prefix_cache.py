"""Prefix cache: keys and values of what all sequences of a prompt begin with, kept from round to round of a race.

The first round that scores a prompt computes its prefix; in the rounds after, it is among the keys of the attention and
the model computes the other tokens only. A round keeps what it had among its own keys, so the prefixes of prompts that
left the race go with it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy as np
import torch

from ..trie.tiles import ranges
from ..trie.trie import TriePass, copied
from .response_cache import ResponseCache, ScorePlan

# Keys and values of all layers that are kept at most; twice that while a round replaces those of the one before.
KEPT_BYTES = 1 << 30

logger = logging.getLogger("sapo_kernels")

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
_NONE = np.zeros(0, np.int64)


@dataclass
class PassPrefixes:
    """What one pass has of a prefix cache, and leaves to it.

    Attributes:
        slots: [H] int64 rows of `kept` that are the keys this pass holds.
        kept: by number of the attention call, ([S, Hkv, D], [S, Hkv, Dv]).
        wanted: [W] int64 key indices that are to be kept, of the tokens `places` of the trie.
        taken: by number of the attention call, keys and values of these.
    """

    slots: torch.Tensor
    kept: dict[int, KeysAndValues]
    wanted: torch.Tensor
    places: np.ndarray
    taken: dict[int, KeysAndValues] = field(default_factory=dict)

    def held(self, call: int) -> KeysAndValues:
        """([H, Hkv, D], [H, Hkv, Dv]) of the tokens that this pass holds."""
        key, value = self.kept[call]
        slots = self.slots.to(key.device)
        return key[slots], value[slots]

    def take(self, call: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what is wanted of all keys and values of a call, [Tk, Hkv, D] and [Tk, Hkv, Dv]."""
        if len(self.wanted):
            wanted = self.wanted.to(key.device)
            self.taken[call] = key[wanted], value[wanted]


class PrefixCache:
    """The prefixes of the prompts of one race: `begin` a round, `of_pass` and `add` for each pass, and `end` it."""

    def __init__(self, cache: ResponseCache, room: int = KEPT_BYTES):
        self.lengths, self.room = cache.prefix_lengths, room
        self._token_bytes = 0  # of all layers; known once a pass was kept
        # All prefixes end to end, each from `_ptr` on: where in `_kept` each token is, or -1; as in `PassPrefixes`.
        self._ptr = np.concatenate([[0], np.cumsum(self.lengths)])
        self._slots = np.full(self._ptr[-1], -1)
        self._kept: dict[int, KeysAndValues] = {}
        self._reset()

    def _reset(self, places=_NONE, paths=_NONE, tokens=_NONE, slots=_NONE) -> None:
        """Prefix tokens of a round, as places in `_slots`, and as tokens of its trie; these once each, ascending, and
        where in `_kept` they are, or -1."""
        self._places, self._paths, self._tokens, self._slot_of_token, self._added = places, paths, tokens, slots, []

    def begin(self, cache: ResponseCache, max_tokens: int) -> ScorePlan:
        """The plan of a round that scores the cells of `cache`, a selection: its passes hold what is kept."""
        trie, (prompts, first) = cache.trie, np.unique(cache.selected // cache.num_examples, return_index=True)
        # A leaf predicts something and is no part of a prefix.
        paths = trie.paths(trie.leaf[first], self.lengths[prompts])
        places = ranges(self._ptr[prompts], self.lengths[prompts])
        kept, slots = self._slots[places], np.full(len(trie), -1)
        # Prompts that begin alike share tokens; one that was not in the round before has none of its own.
        slots[paths[kept >= 0]] = kept[kept >= 0]
        # Where the response to another prompt begins within a prefix, the hidden state is needed too.
        slots[trie.row_token] = -1
        inside = np.zeros(len(trie), dtype=bool)
        inside[paths] = True
        tokens = np.flatnonzero(inside)
        self._reset(places, paths, tokens, slots[tokens])
        return ScorePlan(trie, trie.passes(max_tokens, held=slots >= 0))

    def of_pass(self, step: TriePass, device: torch.device) -> PassPrefixes:
        """What a pass of this round holds and leaves, on `device`."""
        lo, hi = self._tokens.searchsorted((step.start, step.stop))
        tokens, slots = self._tokens[lo:hi], self._slot_of_token[lo:hi]
        held = slots >= 0
        before = np.cumsum(held) - held
        keys = np.where(held, step.carried - step.held + before, step.carried + tokens - step.start - before)
        space = self._space()
        slots, wanted = copied([torch.from_numpy(slots[held]), torch.from_numpy(keys[:space])], device)
        return PassPrefixes(slots, self._kept, wanted, tokens[:space])

    def _space(self) -> int | None:
        """How many tokens more may be kept; None: that is not known yet."""
        if not self._token_bytes:
            return None
        return max(0, self.room // self._token_bytes - sum(len(one.places) for one in self._added))

    def add(self, found: PassPrefixes) -> None:
        """A pass went through. Nothing here may fail: what the pass computed is on its way already."""
        found.kept = {}
        if not found.taken:
            return
        self._token_bytes = sum(part[0].nbytes for pair in found.taken.values() for part in pair)
        if (space := self._space()) < len(found.places):  # the first pass, before it was known
            found.places = found.places[:space]
            found.taken = {call: tuple(part[:space] for part in pair) for call, pair in found.taken.items()}
        if len(found.places):
            self._added.append(found)

    def end(self) -> int:
        """The round went through: what its passes left replaces what was kept; how many tokens that is."""
        self._kept, self._slots[:] = {}, -1
        tokens = np.concatenate([_NONE, *(one.places for one in self._added)])
        if len(tokens):
            for call in list(self._added[0].taken):
                # One call after the other is let go, so that never more than one is there twice.
                pairs = zip(*(one.taken.pop(call) for one in self._added), strict=True)
                self._kept[call] = tuple(torch.cat(parts) for parts in pairs)
            slots = np.full(self._paths.max() + 1, -1)
            slots[tokens] = np.arange(len(tokens))
            self._slots[self._places] = slots[self._paths]
        self._reset()
        return len(tokens)

    def give_up(self) -> bool:
        """Keep nothing from now on, as memory ran out; whether that frees any."""
        had = bool(self._kept or self._added)
        if self.lengths.any():
            logger.warning("out of memory; the rest of the race keeps no prefixes from round to round")
        self.lengths = np.zeros_like(self.lengths)
        self._kept, self._slots[:] = {}, -1
        self._reset()
        return had
