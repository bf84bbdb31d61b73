"""`tree_attention` behind transformers' attention interface, under the name "sapo_trie".

The attention mask says which token sees which: an int32 tensor [1, 1, T, 2], position and subtree end of each token.
It reaches every layer untouched and keeps the model from building a mask of its own. Scoring, whose passes have past
keys, sets its state for the thread instead.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..tree_attention.api import tree_attention
from ..trie.trie import TriePass
from . import model_support as support
from .fingerprint import configurations
from .model_state import BUSY, Unrecoverable
from .prefix_cache import PassPrefixes

ATTENTION_NAME = "sapo_trie"
# Arguments of an attention call that change its mathematics in ways the trie does not know.
FOREIGN_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "head_mask", "encoder_hidden_states")
# Tries whose mask may come back without its plan.
_REMEMBERED = 64

running = threading.local()


class NotTreeable(RuntimeError):
    """The model asks its attention for something that the tree path does not have; the message names it."""


@dataclass
class TreeState:
    """Attention state of one scoring pass: the layers' past keys and values, by order of attention calls.

    The order of calls, not the layer, is the key: some models attend twice in a layer.
    """

    trie: TriePass
    impl: str
    past: dict[int, tuple[torch.Tensor, torch.Tensor]]
    prefixes: PassPrefixes | None = None
    next_past: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    calls: int = 0

    def keys_of(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple | None]:
        """(k, v, past) for `tree_attention`, of k, v [T, Hkv, D] of this pass; the past of the next one is kept."""
        call, self.calls = self.calls, self.calls + 1
        past = self.past[call] if self.trie.num_past > self.trie.num_cached else None
        if self.trie.num_cached or self.prefixes is not None:
            before = [past] if past is not None else []
            if self.trie.num_cached:
                before.append(self.prefixes.cached(call))
            if before:
                k, v = (torch.cat(parts) for parts in zip(*before, (k, v), strict=True))
                past = None
            if self.prefixes is not None:
                self.prefixes.take(call, k, v)
        if len(self.trie.next_past):
            self.next_past[call] = tuple(self._kept(*pair) for pair in zip(past or (None, None), (k, v), strict=True))
        return k, v, past

    def _kept(self, past: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        """Past keys or values of the next pass: the first `_again` of those before, and some of the new."""
        index = self.trie.to(new.device).next_past
        if past is None:
            return new[index]
        return torch.cat([past[: self._again], new[index[self._again :] - len(past)]])

    @cached_property
    def _again(self) -> int:
        return int((self.trie.to("cpu").next_past < self.trie.num_past).sum())


_recent: OrderedDict[bytes, TriePass] = OrderedDict()
_recent_lock = threading.Lock()


def mask_of(trie: TriePass, device: torch.device) -> torch.Tensor:
    """The attention mask [1, 1, T, 2] int32 that brings a pass without past keys to `trie_attention`."""
    on_host = trie.to("cpu")
    content = torch.stack([on_host.position, on_host.subtree_end], -1)[None, None].contiguous()
    with _recent_lock:
        _recent[content.numpy().tobytes()] = trie
        while len(_recent) > _REMEMBERED:
            _recent.popitem(last=False)
    mask = content.to(device)
    mask.sapo_trie = trie
    return mask


def _trie_of(mask: torch.Tensor) -> TriePass:
    """The pass of a mask. A copy of it (reentrant checkpointing, another device) is known by its content, which waits
    for the device."""
    trie = getattr(mask, "sapo_trie", None)
    if trie is None:
        with _recent_lock:
            trie = _recent.get(mask.detach().cpu().contiguous().numpy().tobytes())
    if trie is None:
        raise NotTreeable("its attention got the mask of a trie that this process does not know (any more)")
    return trie


def trie_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The function behind transformers' attention interface: query [1, Hq, T, D] -> ([1, T, Hq, Dv], None)."""
    state: TreeState | None = getattr(running, "state", None)
    ours = attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4
    if state is None and not ours:
        return _own_function(module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs,
            **{name: value for name, value in (("sliding_window", sliding_window), ("softcap", softcap),
                                               ("s_aux", s_aux)) if value is not None},
        )  # fmt: skip
    for name in FOREIGN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotTreeable(f"its attention takes {name}")
    if kwargs.get("is_causal") is False:
        raise NotTreeable("its attention is not causal")
    if dropout:
        raise NotTreeable(f"its attention has a dropout of {dropout}")
    fresh = query.shape[2]
    if not ours or attention_mask.shape[-2:] != (fresh, 2):
        raise NotTreeable("it builds its own attention mask")
    trie = _trie_of(attention_mask) if state is None else state.trie
    if query.shape[0] != 1 or fresh != len(trie.input_ids) or key.shape[2] != fresh:
        raise NotTreeable(f"its attention sees {key.shape[2]} keys for {fresh} tokens")

    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast rotary embeddings leave q and k in float32; the plain attention would cast them too.
        common = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
        q, k, v = q.to(common), k.to(common), v.to(common)
    impl, past = "auto", None
    if state is not None:
        impl = state.impl
        k, v, past = state.keys_of(k, v)
    if sliding_window is not None and sliding_window <= 0:
        sliding_window = None
    out = tree_attention(
        q, k, v, trie.to(q.device), scale=scaling if scaling is not None else getattr(module, "scaling", None),
        window=sliding_window, softcap=softcap, sinks=s_aux, past=past, impl=impl,
    )  # fmt: skip
    return out[None], None


# What each configuration had before the switch, by its identity, while the switch lasts.
_own: dict[int, str] = {}


def _own_function(module: nn.Module):
    """The attention that a module had before the switch, for batches that are no tries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = _own.get(id(getattr(module, "config", None)))
    if name is None:
        raise Unrecoverable(BUSY)
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _own_mask(*args, config=None, **kwargs):
    """The mask that goes with it."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = _own.get(id(config))
    if name not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, config=config, **kwargs)


def is_installed(inner: nn.Module) -> bool:
    return getattr(support.text_config(inner), "_attn_implementation", None) == ATTENTION_NAME


class TrieAttention:
    """The switch of a model's text decoder to `trie_attention`.

    The model itself is asked once, what it then had in its configurations is put there for every block after that.
    """

    def __init__(self, inner: nn.Module):
        self.inner, self.configs = inner, configurations(inner)
        self._switched: list[str] | None = None

    @contextlib.contextmanager
    def installed(self):
        """Switch for the block; raises NotTreeable if the switch does not take."""
        before = [config._attn_implementation_internal for config in self.configs]
        _own.update({id(config): config._attn_implementation for config in self.configs})
        try:
            if self._switched is None:
                self._switch()
                self._switched = [config._attn_implementation_internal for config in self.configs]
            self._set(self._switched)
            yield
        finally:
            try:
                self._set(before)
            finally:
                # Once more where Ctrl-C came between two of them.
                self._set(before)
            for config in self.configs:
                _own.pop(id(config), None)

    def _set(self, names: list[str]) -> None:
        for config, name in zip(self.configs, names, strict=True):
            config._attn_implementation_internal = name

    def _switch(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(ATTENTION_NAME, trie_attention)
        AttentionMaskInterface.register(ATTENTION_NAME, _own_mask)
        inner, text = self.inner, support.text_config(self.inner)
        nested = text is not inner.config and "text_config" in getattr(inner.config, "sub_configs", {})
        inner.set_attn_implementation({"text_config": ATTENTION_NAME} if nested else ATTENTION_NAME)
        if text._attn_implementation != ATTENTION_NAME:
            raise NotTreeable("its attention implementation cannot be switched")


@contextlib.contextmanager
def own_attention(inner: nn.Module):
    """The model's own attention for the block, inside `trie_attention_installed`."""
    now = [(c, c._attn_implementation_internal) for c in configurations(inner)]
    try:
        for config, _ in now:
            config._attn_implementation_internal = _own.get(id(config), config._attn_implementation_internal)
        yield
    finally:
        for config, name in now:
            config._attn_implementation_internal = name
