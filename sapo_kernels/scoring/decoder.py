"""Run an unmodified transformers decoder over token tries or padded batches and read log-probabilities.

Two hooks do everything: the *attention function* "sapo_trie" (attention.py) and a *pre-hook on the output head*
(head.py), which takes the hidden states of the response rows and turns them into log-probabilities without keeping
logits.
"""

from __future__ import annotations

import torch
from torch import nn

from ..trie.trie import TriePass
from .attention import NotTreeable, TreeState, running
from .head import Batch, HeadReader
from .prefix_cache import PrefixCache


class TreeRunner:
    """Runs the passes of one trie in order, with each layer's past keys and values, those of the current path.

    prefixes: where the tokens are that the passes hold; None: they hold none.
    """

    def __init__(
        self, model: nn.Module, reader: HeadReader, impl: str, device: torch.device, prefixes: PrefixCache | None = None
    ):
        self.model, self.reader, self.impl, self.device, self.prefixes = model, reader, impl, device, prefixes
        self.options = reader.options
        self._past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run(self, trie: TriePass, checks=()) -> torch.Tensor:
        """Log-probabilities that became ready, in the order of the trie's targets; the last pass brings the rest.

        checks: cells to verify that have rows in this pass, see `Batch`.

        If it raises, the past keys and waiting rows are those of the pass before.
        """
        plan = trie.to(self.device)
        prefixes = None if self.prefixes is None else self.prefixes.of_pass(trie, self.device)
        state = TreeState(plan, self.impl, self._past, prefixes)
        # A 4-D integer mask reaches every attention layer untouched and keeps the model from building one of its own.
        carrier = torch.zeros(1, 1, len(plan.input_ids), 2, dtype=torch.int32, device=self.device)
        running.state = state
        try:
            with self.reader.reading(Batch.of_pass(plan, checks)):
                made = self.model(
                    input_ids=plan.input_ids[None],
                    position_ids=plan.position[None, plan.num_past :].long(),
                    attention_mask=carrier,
                    **self.options,
                )
                logprob = self.reader.logprob_of(made.logits)
        finally:
            running.state = None
        if not state.calls:
            raise NotTreeable("it never calls transformers' attention interface")
        self._past = state.next_past
        if prefixes is not None:
            self.prefixes.add(prefixes)
        return logprob


def run_padded(model: nn.Module, reader: HeadReader, batch: Batch, device: torch.device) -> torch.Tensor:
    """Log-probability [P] of the targets of a right-padded batch, by the model's own attention."""
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    with reader.reading(batch):
        return reader.logprob_of(model(input_ids=ids, attention_mask=mask, **reader.options).logits)
