"""Run an unmodified transformers decoder over token tries or padded batches and read log-probabilities.

Two hooks do everything. The *attention function* ``sapo_trie`` replaces each layer's attention for the length of a call
and carries the keys and values of the current path from pass to pass. A *pre-hook on the output head* (head.py) takes
the hidden states of the response rows and turns them into log-probabilities without keeping logits.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field

import torch
from torch import nn

from ..tree_attention.api import tree_attention
from ..trie.trie import TriePass
from . import model_support as support
from .fingerprint import configurations
from .head import Batch, HeadReader
from .model_state import BUSY, Unrecoverable
from .prefix_cache import PassPrefixes, PrefixCache

ATTENTION_NAME = "sapo_trie"
# Arguments of an attention call that change its mathematics in ways the trie does not know.
FOREIGN_ARGUMENTS = ("position_bias", "indices", "block_indices", "sinks", "head_mask", "encoder_hidden_states")

_running = threading.local()


class NotTreeable(RuntimeError):
    """The model asked its attention for something that the tree path cannot give; the message says what."""


@dataclass
class _TreeState:
    """Attention state of one pass: the layers' carried keys and values, by order of attention calls.

    The order of calls, not the layer, is the key: some models attend twice in a layer.
    """

    trie: TriePass
    impl: str
    carried: dict[int, tuple[torch.Tensor, torch.Tensor]]
    prefixes: PassPrefixes | None = None
    carry_on: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    calls: int = 0


def trie_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, sliding_window=None,
                   softcap=None, s_aux=None, **kwargs):  # fmt: skip
    """The function behind transformers' attention interface: query [1, Hq, T, D] -> ([1, T, Hq, Dv], None)."""
    state: _TreeState | None = getattr(_running, "state", None)
    if state is None:
        raise Unrecoverable(BUSY)
    for name in FOREIGN_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise NotTreeable(f"its attention takes {name}")
    if kwargs.get("is_causal") is False:
        raise NotTreeable("its attention is not causal")
    fresh = len(state.trie.input_ids)
    ours = attention_mask is not None and not attention_mask.is_floating_point() and attention_mask.dim() == 4
    if not ours or attention_mask.shape[-2:] != (fresh, 2):
        raise NotTreeable("it builds its own attention mask")
    if query.shape[0] != 1 or query.shape[2] != fresh or key.shape[2] != fresh:
        raise NotTreeable(f"its attention sees {key.shape[2]} keys for {fresh} tokens")

    call, state.calls = state.calls, state.calls + 1
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    if not q.dtype == k.dtype == v.dtype:
        # Under autocast rotary embeddings leave q and k in float32; the plain attention would cast them too.
        common = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else v.dtype
        q, k, v = q.to(common), k.to(common), v.to(common)
    before = [state.carried[call]] if state.trie.carried > state.trie.held else []
    if state.trie.held:
        before.append(state.prefixes.held(call))
    if before:
        k, v = (torch.cat(parts) for parts in zip(*before, (k, v), strict=True))
    if state.prefixes is not None:
        state.prefixes.take(call, k, v)
    plan = state.trie.to(q.device)
    if len(plan.carry_index):
        state.carry_on[call] = (k[plan.carry_index], v[plan.carry_index])
    if sliding_window is not None and sliding_window <= 0:
        sliding_window = None
    out = tree_attention(
        q, k, v, plan, scale=scaling if scaling is not None else getattr(module, "scaling", None),
        window=sliding_window, softcap=softcap, sinks=s_aux, impl=state.impl,
    )  # fmt: skip
    return out[None], None


@contextlib.contextmanager
def trie_attention_installed(inner: nn.Module):
    """Switch the text decoder to `trie_attention` for the block; raises NotTreeable if the switch does not take."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION_NAME, trie_attention)
    before = [(c, c._attn_implementation_internal) for c in configurations(inner)]
    text = support.text_config(inner)
    try:
        nested = text is not inner.config and "text_config" in getattr(inner.config, "sub_configs", {})
        inner.set_attn_implementation({"text_config": ATTENTION_NAME} if nested else ATTENTION_NAME)
        if text._attn_implementation != ATTENTION_NAME:
            raise NotTreeable("its attention implementation cannot be switched")
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


class TreeRunner:
    """Runs the passes of one trie in order, carrying each layer's keys and values of the current path.

    prefixes: where the tokens are that the passes hold; None: they hold none.
    """

    def __init__(
        self, model: nn.Module, reader: HeadReader, impl: str, device: torch.device, prefixes: PrefixCache | None = None
    ):
        self.model, self.reader, self.impl, self.device, self.prefixes = model, reader, impl, device, prefixes
        self.options = reader.options
        self._carried: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, trie: TriePass, checks=()) -> torch.Tensor:
        """Log-probabilities that became ready, in the order of the trie's targets; the last pass brings the rest.

        checks: cells to verify that have rows in this pass, see `Batch`.

        If it raises, the carried keys and waiting rows are those of the pass before.
        """
        plan = trie.to(self.device)
        prefixes = None if self.prefixes is None else self.prefixes.of_pass(trie, self.device)
        state = _TreeState(plan, self.impl, self._carried, prefixes)
        # A 4-D integer mask reaches every attention layer untouched and keeps the model from building one of its own.
        carrier = torch.zeros(1, 1, len(plan.input_ids), 2, dtype=torch.int32, device=self.device)
        _running.state = state
        try:
            logprob = self.reader.read(
                lambda: self.model(
                    input_ids=plan.input_ids[None],
                    position_ids=plan.position[None, plan.carried :].long(),
                    attention_mask=carrier,
                    **self.options,
                ),
                Batch.of_pass(plan, checks),
            )
        finally:
            _running.state = None
        if not state.calls:
            raise NotTreeable("it never calls transformers' attention interface")
        self._carried = state.carry_on
        if prefixes is not None:
            self.prefixes.add(prefixes)
        return logprob


def run_padded(model: nn.Module, reader: HeadReader, batch: Batch, device: torch.device) -> torch.Tensor:
    """Log-probability [P] of the targets of a right-padded batch, by the model's own attention."""
    mask = batch.attention_mask.to(device)
    return reader.read(
        lambda: model(input_ids=batch.input_ids.to(device), attention_mask=mask, **reader.options),
        batch,
    )
