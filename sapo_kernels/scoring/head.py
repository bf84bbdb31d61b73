"""From the hidden states of response rows to log-probabilities, inside the model's own forward.

A pre-hook on the output head sees what the model itself would feed it. It takes the response rows and lets the model go
on with none of them, so the model computes no logits; rows of several passes wait for each other, because a large
vocabulary's weights are worth reading only for many rows at once. What the family does between the matrix product and
the logits is in `model_support.head_transform`; every call compares whole logit rows with the model's own
(verification.py).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..linear_logprob.api import wants_mean
from ..linear_logprob.gradient import chunk_rows, chunks
from ..linear_logprob.torch import logprob_of_logits
from ..trie.trie import TriePass
from . import model_support as support
from .model_state import BUSY, Unrecoverable
from .response_cache import ResponseCache
from .verification import Check

# The head's backend that goes with each choice of attention backend.
OP_IMPL = {"auto": "auto", "triton": "triton", "sdpa": "torch", "reference": "reference"}


@dataclass
class Batch:
    """What one forward scores: inputs, the rows to read and what each row predicts.

    input_ids: [B, L]. rows: [R] indices into the B * L flattened rows. target_ptr, targets: as in `TriePass`.
    attention_mask: [B, L] for the padded path, None for a trie pass. last: no later forward of the job will bring rows
    to wait for. checks: cells to verify; for each its places among `rows`, and which of its response rows those are.
    """

    input_ids: torch.Tensor
    rows: torch.Tensor
    target_ptr: torch.Tensor
    targets: torch.Tensor
    attention_mask: torch.Tensor | None = None
    last: bool = True
    checks: list[tuple[Check, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of_pass(cls, trie: TriePass, checks=()) -> Batch:
        return cls(trie.input_ids[None], trie.rows, trie.target_ptr, trie.targets, last=trie.last, checks=list(checks))


def padded_batch(cache: ResponseCache, cells: list[int], checks: Sequence[Check] = ()) -> Batch:
    """A right-padded batch of whole cells; the response rows are counted over the flattened [B, L] rows.

    The last response token predicts nothing, and is there: what a model does may depend on how long a sequence is.
    """
    lengths = cache.lengths[cells] + 1
    width = int(lengths.max())
    # On the CPU whatever the process's default device is.
    input_ids = torch.zeros(len(cells), width, dtype=torch.int64, device="cpu")
    mask = torch.zeros(len(cells), width, dtype=torch.int64, device="cpu")
    rows, targets, found, done = [], [], [], 0
    for b, c in enumerate(cells):
        first, context, length = int(cache.offsets[c]), int(cache.context_lengths[c]), int(lengths[b])
        ids = torch.from_numpy(cache.ids[first : first + length])
        input_ids[b, :length] = ids
        mask[b, :length] = 1
        rows.append(b * width + torch.arange(context - 1, length - 1, device="cpu"))
        targets.append(ids[context:])
        own = torch.arange(length - context, device="cpu")
        found += [(check, own + done, own) for check in checks if check.cell == c]
        done += len(own)
    targets = torch.cat(targets)
    return Batch(input_ids, torch.cat(rows), torch.arange(len(targets) + 1, device="cpu"), targets, mask, checks=found)


class HeadReader:
    """Reads the log-probabilities of one job; install it around the job's forwards.

    ``through_model`` leaves all rows to the model and reads its logits: slower and exact whatever the head does.
    ``statistics`` of each target, as TRL's trainers log them: of its row the "entropy" in nats, "mean_logits" and
    "log_sum_sq_probs", and whether it "is_top1" there; False: not computed.
    """

    def __init__(self, inner: nn.Module, impl: str, through_model: bool = False, statistics: bool = False):
        self.statistics: dict[str, torch.Tensor] | bool = statistics
        self.head, self.impl, self.through_model = inner.get_output_embeddings(), impl, through_model
        self.scale, self.softcap = support.head_transform(inner)
        self.vocabulary, self.options = support.vocabulary_size(inner), support.forward_options(inner)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._batch: Batch | None = None
        self._logprob: torch.Tensor | None = None
        self._own_call = False
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def installed(self):
        """Hook the head for the block, for this thread; no rows wait yet."""
        self._thread, self._waiting = threading.get_ident(), []
        handle = self.head.register_forward_pre_hook(self._hook)
        try:
            yield self
        finally:
            handle.remove()

    @contextlib.contextmanager
    def reading(self, batch: Batch):
        """Around one forward over `batch` and the `logprob_of` what it returns."""
        self._batch, self._logprob = batch, None
        waiting = list(self._waiting)
        try:
            yield
        except BaseException:
            self._waiting = waiting
            raise
        finally:
            self._batch = self._logprob = None

    def logprob_of(self, logits: torch.Tensor) -> torch.Tensor:
        """The log-probabilities that are ready after a forward, in order of targets; after the last batch, all.

        logits: what the model returned, [1, n, V] with n = 0 or 1 unless `through_model`.
        """
        batch = self._batch
        if self._logprob is None:
            raise RuntimeError("model: its forward does not go through its output embeddings; it cannot be scored")
        if not self.through_model:
            return self._logprob
        rows = logits.reshape(-1, logits.shape[-1])
        for check, at, own in batch.checks:
            check.compare(own, rows[at.to(rows.device)])
        return logprob_of_logits(rows, batch.targets.to(rows.device), batch.target_ptr.to(rows.device))[0]

    def _hook(self, module, args):
        if threading.get_ident() != self._thread:
            raise Unrecoverable(BUSY)
        if self._own_call or self._batch is None:
            return None
        batch, hidden = self._batch, args[0]
        flat = hidden.reshape(-1, hidden.shape[-1])
        rows = flat[batch.rows.to(hidden.device)]
        self._logprob = torch.empty(0, device=hidden.device)
        if self.through_model:
            return (rows[None], *args[1:])
        if len(rows):
            self._waiting.append((rows, batch.targets.to(rows.device), batch.target_ptr.diff().to(rows.device)))
        count = sum(len(waiting[0]) for waiting in self._waiting)
        if count and (batch.last or count >= chunk_rows(self.vocabulary, rows.device)):
            # Inside the forward, where a sharded head has its weights together.
            self._logprob = self._project(*(torch.cat(parts) for parts in zip(*self._waiting, strict=True)))[0]
            self._waiting = []
        for check, at, own in batch.checks:
            check.compare(own, self.logits(rows[at.to(rows.device)]))
        if self.statistics is not False:
            self.statistics = self._statistics(rows.detach(), batch)
        # Heads that are more than a matrix may not expect an empty input.
        keep = 0 if support.plain_head(self.head, rows, own_hooks=1) else 1
        return (flat[None, :keep], *args[1:])

    def _project(self, rows, targets, counts) -> tuple[torch.Tensor, torch.Tensor]:
        """rows [R, D], targets [P], counts [R] (targets of each row) -> logprob [P], lse [R]."""
        pointer = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if not support.plain_head(self.head, rows, own_hooks=1):
            return self._through_module(rows, targets, pointer)
        rows, weight, bias = self._in_head_dtype(rows)
        # The operator itself: the public function would wait for the device to check ids that were checked on the host.
        return torch.ops.sapo_kernels.linear_logprob(
            rows.contiguous(), weight if weight.stride(-1) == 1 else weight.contiguous(), targets, pointer,
            bias, self.scale, self.softcap, self.impl, wants_mean(rows, weight, bias),
        )[:2]  # fmt: skip

    def _through_module(self, rows, targets, pointer):
        """A head that is more than a matrix (LoRA, quantised): the module itself, on response rows, chunk by chunk."""
        parts = [
            logprob_of_logits(self._own_logits(rows[some]), targets[mine], begin, self.scale, self.softcap)
            for some, mine, begin in chunks(pointer, self.vocabulary)
        ]
        return torch.cat([p for p, _ in parts]), torch.cat([lse for _, lse in parts])

    @torch.no_grad()
    def _statistics(self, rows: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        found = []
        for some in rows.split(chunk_rows(self.vocabulary, rows.device)):
            logits = self.logits(some)
            logprob = torch.log_softmax(logits, -1)
            entropy = -(logprob.exp() * logprob).nansum(-1)
            found.append((entropy, logits.mean(-1), torch.logsumexp(2 * logprob, -1), logprob.argmax(-1)))
        row = torch.repeat_interleave(batch.target_ptr.diff().to(rows.device))
        entropy, mean, squares, top = (torch.cat(part)[row] for part in zip(*found, strict=True))
        targets = batch.targets.to(rows.device)
        return {"entropy": entropy, "mean_logits": mean, "log_sum_sq_probs": squares, "is_top1": top == targets}

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [R, D] -> [R, V], as the loss of these rows is computed from them; for a few rows, inside a forward."""
        if support.plain_head(self.head, rows, own_hooks=1):
            found = torch.nn.functional.linear(*self._in_head_dtype(rows))
        else:
            found = self._own_logits(rows)
        found = found if found.dtype == torch.float64 else found.float()
        found = found * self.scale
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap

    def _own_logits(self, rows: torch.Tensor) -> torch.Tensor:
        """What the head itself, which may be more than a matrix, makes of rows [R, D]."""
        self._own_call = True
        try:
            return self.head(rows[None])[0]
        finally:
            self._own_call = False

    def _in_head_dtype(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Rows, weight and bias of a head that is a matrix, as it multiplies them."""
        bias, dtype = self.head.bias, self._head_dtype(rows)
        return rows.to(dtype), self.head.weight.to(dtype), None if bias is None else bias.to(dtype)

    def _head_dtype(self, rows: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(rows.device.type):
            return torch.get_autocast_dtype(rows.device.type)
        weight = getattr(self.head, "weight", None)
        return weight.dtype if isinstance(weight, torch.Tensor) else rows.dtype

    @contextlib.contextmanager
    def observed(self, count: int):
        """Watch a plain forward of one sequence: yields a list that gets what this reader makes of its response rows.

        Those are the last `count` rows but one: ([count, V] logits, the dtype that they are computed in).
        """
        seen: list[tuple[torch.Tensor, torch.dtype]] = []
        if any(map(support.quantises_at_once, self.head.modules())):  # one more call would be seen
            yield seen
            return

        def see(module, args):
            if args and not self._own_call:
                flat = args[0].reshape(-1, args[0].shape[-1])
                seen.append((self.logits(flat[-count - 1 : -1]), self._head_dtype(flat)))

        handle = self.head.register_forward_pre_hook(see)
        try:
            yield seen
        finally:
            handle.remove()
