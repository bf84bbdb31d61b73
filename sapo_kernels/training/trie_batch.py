"""TrieBatch: the sequences of one training batch as a token trie, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..scoring.response_cache import ResponseCache
from ..trie.trie import TriePass, plan_trie

IGNORED = -100


@dataclass(frozen=True, eq=False)
class TrieBatch:
    """Sequences whose shared beginnings are computed once, and which of their tokens a loss is over.

    Make one with `pack` (lists of token ids), `of_padded` (what a collator returns) or `of_cache` (`ResponseCache`).
    It can be pickled, so collators in worker processes may make it.

    Attributes:
        trie: the one pass over all sequences, on the CPU or where `to` moved it.
        target_of: [N] int64, for each token of the loss its place among ``trie.targets``; sequences in order.
        sequence_ptr: [C + 1] int64 on the CPU; sequence c has the tokens ``[sequence_ptr[c], sequence_ptr[c + 1])`` of
            the N.
        ids, offsets, context_lengths: the sequences that are in the trie end to end, numpy int64.
    """

    trie: TriePass
    target_of: torch.Tensor
    sequence_ptr: torch.Tensor
    ids: np.ndarray
    offsets: np.ndarray
    context_lengths: np.ndarray

    @property
    def num_sequences(self) -> int:
        """How many were packed."""
        return len(self.sequence_ptr) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward computes."""
        return len(self.trie.input_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return int(np.diff(self.offsets).max())

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        """Context and response of each sequence that is in the trie."""
        cut = zip(self.offsets[:-1], self.offsets[:-1] + self.context_lengths, self.offsets[1:], strict=True)
        return [(self.ids[a:b].tolist(), self.ids[b:c].tolist()) for a, b, c in cut]

    def lengthened(self, length: int) -> TrieBatch:
        """These sequences, the longest of them with `length` tokens: its context begins with its own tokens again."""
        sequences = self.sequences()
        context, response = sequences[int(np.diff(self.offsets).argmax())]
        more = length - len(context) - len(response)
        context[:0] = (context * (1 + more // len(context)))[:more]
        return TrieBatch.pack(*zip(*sequences, strict=True))

    def groups(self, max_tokens: int) -> list[list[int]]:
        """The sequences that have tokens in groups of at most `max_tokens` trie tokens (or one sequence) each."""
        whole = [context + response for context, response in self.sequences()]
        names = np.flatnonzero(np.diff(self.sequence_ptr.numpy())).tolist()
        groups: list[list[int]] = []
        used, before = 0, []
        # In this order neighbours share most.
        for c in sorted(range(len(whole)), key=lambda c: whole[c]):
            fresh = len(whole[c]) - _common(whole[c], before)
            if groups and used + fresh <= max_tokens:
                groups[-1].append(names[c])
                used += fresh
            else:
                groups.append([names[c]])
                used = len(whole[c])
            before = whole[c]
        return groups

    def check_ids(self, vocabulary: int) -> None:
        """Raise ValueError naming the first sequence with an id of `vocabulary` or more."""
        if self.ids.max() >= vocabulary:
            at = int(np.argmax(self.ids >= vocabulary))
            row = int(np.searchsorted(self.offsets, at, side="right")) - 1
            # Those without a label are not in the trie.
            row = int(np.flatnonzero(np.diff(self.sequence_ptr.numpy()))[row])
            raise ValueError(
                f"sequence {row}: token ids must be below the model's vocabulary of {vocabulary}, got "
                f"{int(self.ids[at])}; is this the model's tokenizer?"
            )

    def to(self, device: torch.device | str, **_) -> TrieBatch:
        """This batch with its tensors on `device`."""
        return replace(self, trie=self.trie.to(device), target_of=self.target_of.to(device))

    @classmethod
    def pack(cls, contexts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> TrieBatch:
        """Sequence c is ``contexts[c] + responses[c]``; the loss is over the responses.

        Raises:
            ValueError, TypeError: a context or response without tokens, ids that are no whole numbers; which sequence.
        """
        return cls.of_cache(ResponseCache.from_token_ids([list(contexts)], [list(responses)]))

    @classmethod
    def of_cache(cls, cache: ResponseCache) -> TrieBatch:
        """All cells of a cache, those of prompt 0 first."""
        return cls._planned(cache.ids, cache.offsets, cache.context_lengths, None)

    @classmethod
    def of_padded(cls, batch: Mapping[str, torch.Tensor]) -> TrieBatch:
        """What most collators return: input_ids, labels and attention_mask [B, L], padded on the right.

        labels: the token's own id where it is part of the loss, else -100. Rows without a label are left out of the
        trie, and have no tokens among the N.

        Raises:
            ValueError: padding on the left, labels that are not the tokens' or stand on padding, no label at all,
                packed rows (``position_ids``).
        """
        for name in ("position_ids", "cu_seq_lens_q", "token_type_ids", "inputs_embeds"):
            if batch.get(name) is not None:
                raise ValueError(f"batch: expected input_ids, attention_mask and labels alone, got {name} too")
        ids, labels = (batch[name].detach().cpu().numpy() for name in ("input_ids", "labels"))
        mask = batch.get("attention_mask")
        lengths = np.full(len(ids), ids.shape[1]) if mask is None else mask.sum(1).cpu().numpy()
        inside = np.arange(ids.shape[1]) < lengths[:, None]
        if mask is not None and (mask.cpu().numpy().astype(bool) != inside).any():
            raise ValueError("batch: attention_mask: expected padding on the right, got another mask")
        in_loss = labels != IGNORED
        # Nothing predicts the first token.
        in_loss[:, :1] = False
        if (in_loss & ~inside).any():
            raise ValueError("batch: labels: expected -100 where attention_mask is 0, got others, which a loss counts")
        if (labels != ids)[in_loss].any():
            raise ValueError("batch: labels: expected the token's own id or -100, got another id")
        rows = np.flatnonzero(in_loss.any(1))
        first = in_loss[rows].argmax(1)
        stop = ids.shape[1] - in_loss[rows][:, ::-1].argmax(1)
        # What follows the last token of the loss changes nothing before it.
        flat = [ids[row, :end] for row, end in zip(rows, stop, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(stop)])
        kept = [in_loss[row, start:end] for row, start, end in zip(rows, first, stop, strict=True)]
        counts = np.zeros(len(ids), np.int64)
        counts[rows] = [keep.sum() for keep in kept]
        if not len(rows):
            raise ValueError("batch: labels: expected at least one that is not -100, got none")
        return cls._planned(np.concatenate(flat), offsets, first, np.concatenate(kept), counts)

    @classmethod
    def _planned(cls, ids, offsets, context_lengths, keep, counts=None) -> TrieBatch:
        trie = plan_trie(ids, offsets, context_lengths)
        target_of = trie.cell_target if keep is None else trie.cell_target[keep]
        counts = np.diff(trie.cell_ptr) if counts is None else counts
        return cls(
            trie=trie.passes()[0],
            target_of=torch.from_numpy(np.ascontiguousarray(target_of)),
            sequence_ptr=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)])),
            ids=ids,
            offsets=offsets,
            context_lengths=context_lengths,
        )


def padded_rows(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int = 0, multiple_of: int = 1
) -> dict[str, torch.Tensor]:
    """(context, response) rows as a batch padded on the right: input_ids, attention_mask, labels [B, L] int64.

    The labels are the response's ids, else -100. L is the longest row, rounded up to `multiple_of`.
    """
    width = max(len(context) + len(response) for context, response in rows)
    width = -(-width // multiple_of) * multiple_of
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (context, response) in enumerate(rows):
        length = len(context) + len(response)
        ids[i, :length] = torch.tensor([*context, *response])
        mask[i, :length] = 1
        labels[i, len(context) : length] = torch.tensor(response)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _common(one: list[int], other: list[int]) -> int:
    """How many ids the beginnings of two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))  # noqa: B905
