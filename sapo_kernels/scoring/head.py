"""From the hidden states of response rows to log-probabilities, inside the model's own forward.

A pre-hook on the output head sees what the model itself would feed it. It takes the response rows and lets the model go
on with none of them, so the model computes no logits; rows of several passes wait for each other, because a large
vocabulary's weights are worth reading only for many rows at once. The first forward of a job sends one row through the
model, and its logits check what the family does between the matrix product and the logits.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass

import torch
from torch import nn

from ..linear_logprob.torch import chunk_rows, logprob_of_logits
from ..trie.trie import TriePass
from . import model_support as support
from .model_state import BUSY
from .response_cache import ResponseCache

# The head's backend that goes with each choice of attention backend.
OP_IMPL = {"auto": "auto", "triton": "triton", "sdpa": "torch", "reference": "reference"}


@dataclass
class Batch:
    """What one forward scores: inputs, the rows to read and what each row predicts.

    input_ids: [B, L]. rows: [R] indices into the B * L flattened rows. target_ptr, targets: as in `TriePass`.
    attention_mask: [B, L] for the padded road, None for a trie pass. last: no later forward of the job will bring rows
    to wait for.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    target_ptr: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None
    last: bool = True

    @classmethod
    def of_pass(cls, trie: TriePass) -> Batch:
        return cls(trie.input_ids[None], trie.rows, trie.target_ptr, trie.targets, last=trie.last)


def padded_batch(cache: ResponseCache, cells: list[int]) -> Batch:
    """A right-padded batch of cells; the response rows are counted over the flattened [B, L] rows."""
    lengths = cache.lengths[cells]
    width = int(lengths.max())
    input_ids = torch.zeros(len(cells), width, dtype=torch.int64)
    mask = torch.zeros(len(cells), width, dtype=torch.int64)
    rows, targets = [], []
    for b, c in enumerate(cells):
        first, context, length = int(cache.offsets[c]), int(cache.context_lengths[c]), int(lengths[b])
        ids = torch.from_numpy(cache.ids[first : first + length + 1])
        input_ids[b, :length] = ids[:-1]
        mask[b, :length] = 1
        rows.append(b * width + torch.arange(context - 1, length))
        targets.append(ids[context:])
    targets = torch.cat(targets)
    return Batch(input_ids, torch.cat(rows), torch.arange(len(targets) + 1), targets, attention_mask=mask)


class HeadReader:
    """Reads the log-probabilities of one job; install it around the job's forwards.

    ``through_model`` leaves all rows to the model and reads its logits: slower and exact whatever the head does.
    """

    def __init__(self, inner: nn.Module, impl: str, through_model: bool = False):
        self.head, self.impl, self.through_model = inner.get_output_embeddings(), impl, through_model
        self.scale, self.softcap = support.head_transform(inner)
        self.vocabulary = support.vocabulary_size(inner)
        self.dtype = torch.float32
        self._excess: torch.Tensor | None = None
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._batch: Batch | None = None
        self._logprob: torch.Tensor | None = None
        self._expected: torch.Tensor | None = None
        self._own_call = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def installed(self):
        """Hook the head for the block, for this thread."""
        self._thread = threading.get_ident()
        handle = self.head.register_forward_pre_hook(self._hook)
        try:
            yield self
        finally:
            handle.remove()

    def read(self, call, batch: Batch) -> torch.Tensor:
        """Run ``call()``, a forward over `batch`; return the log-probabilities that are ready, in order of targets.

        After a forward whose batch is the last one, all of them are.
        """
        self._batch, self._logprob, self._expected = batch, None, None
        waiting = list(self._waiting)
        try:
            logits = call().logits
            if self._logprob is None:
                raise RuntimeError("model: its forward does not go through its output embeddings; it cannot be scored")
            if self.through_model:
                rows = logits.reshape(-1, logits.shape[-1])
                return logprob_of_logits(rows, batch.targets.to(rows.device), batch.target_ptr.to(rows.device))[0]
            if self._expected is not None:
                self._check(logits)
            return self._logprob
        except BaseException:
            self._waiting = waiting
            raise
        finally:
            self._batch = self._logprob = self._expected = None

    def _hook(self, module, args):
        if threading.get_ident() != self._thread:
            raise RuntimeError(BUSY)
        if self._own_call or self._batch is None:
            return None
        batch, hidden = self._batch, args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = flat[batch.rows.to(hidden.device)]
        # Asked here, inside the forward: trainers wrap it in autocast and hand the logits out in float32.
        autocast = torch.is_autocast_enabled(rows.device.type)
        self.dtype = torch.get_autocast_dtype(rows.device.type) if autocast else rows.dtype
        self._logprob = torch.empty(0, device=hidden.device)
        if self.through_model:
            return (rows[None], *args[1:])
        if len(rows):
            self._waiting.append((rows, batch.targets.to(rows.device), batch.target_ptr.diff().to(rows.device)))
        count = sum(len(waiting[0]) for waiting in self._waiting)
        if count and (batch.last or count >= chunk_rows(self.vocabulary)):
            # Inside the forward, where a sharded head has its weights together.
            self._logprob = self._project(*(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))[0]
            self._waiting = []
        if len(rows) and self._excess is None:
            nothing = batch.targets[:0].to(rows.device)
            self._expected = self._project(rows[:1], nothing, torch.zeros_like(batch.target_ptr[:1]).to(rows.device))[1]
            return (rows[None, :1], *args[1:])
        # Heads that are more than a matrix may not expect an empty input.
        keep = 0 if support.plain_head(self.head, rows, own_hooks=1) else 1
        return (flat[None, :keep], *args[1:])

    def _project(self, rows, targets, counts) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [R, D], targets [P], counts [R] (targets of each row) -> logprob [P], lse [R]."""
        pointer = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if not support.plain_head(self.head, rows, own_hooks=1):
            self._own_call = True
            try:
                return self._through_module(rows, targets, pointer)
            finally:
                self._own_call = False
        weight, bias = self.head.weight, self.head.bias
        autocast = torch.is_autocast_enabled(rows.device.type)
        dtype = torch.get_autocast_dtype(rows.device.type) if autocast else weight.dtype
        rows, weight = rows.to(dtype), weight.to(dtype)
        # The operator itself: the public function would wait for the device to check ids that were checked on the host.
        return torch.ops.sapo_kernels.linear_logprob(
            rows.contiguous(), weight if weight.stride(-1) == 1 else weight.contiguous(), targets, pointer,
            None if bias is None else bias.to(dtype), self.scale, self.softcap, self.impl,
        )  # fmt: skip

    def _through_module(self, rows, targets, pointer):
        """A head that is more than a matrix (LoRA, quantised): the module itself, on response rows, chunk by chunk."""
        step = chunk_rows(self.vocabulary)
        edges = [*range(0, len(rows), step), len(rows)]
        cuts, parts = pointer[torch.tensor(edges, device=pointer.device)].tolist(), []
        for i, (first, stop) in enumerate(zip(edges, edges[1:])):  # noqa: B905 (pairs of neighbours)
            logits = self.head(rows[None, first:stop])[0]
            mine, begin = targets[cuts[i] : cuts[i + 1]], pointer[first : stop + 1] - cuts[i]
            parts.append(logprob_of_logits(logits, mine, begin, self.scale, self.softcap))
        return torch.cat([p for p, _ in parts]), torch.cat([lse for _, lse in parts])

    def _check(self, logits: torch.Tensor) -> None:
        """Keep the distance of our log-sum-exp from the model's on one row; reading it would wait for the device."""
        own = torch.logsumexp(logits.reshape(-1, logits.shape[-1])[:1].float(), -1)
        low = self.dtype in (torch.bfloat16, torch.float16)
        slack = 0.05 + 0.02 * own.abs() if low else 1e-3 + 1e-4 * own.abs()
        # NaN on both sides is a model with NaN weights: reported by cell, not here.
        expected = self._expected.to(own.device, torch.float32)
        both = own.isfinite() & expected.isfinite()
        self._excess = torch.where(both, (own - expected).abs() / slack, torch.zeros_like(own)).amax()

    def agrees(self) -> bool:
        """Whether the checked row had the model's own log-sum-exp within rounding."""
        return self._excess is None or float(self._excess) <= 1.0
