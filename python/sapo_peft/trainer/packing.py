"""Packing: the batches of a trainer as tries in the place of padded rows, where the model computes the same."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sapo_kernels.scoring import model_support
from sapo_kernels.scoring.attention import NotTreeable
from sapo_kernels.scoring.fingerprint import configurations, fingerprint
from sapo_kernels.scoring.foreign_code import foreign_callable
from sapo_kernels.scoring.model_state import is_out_of_memory
from sapo_kernels.training.agreement import OwnLoss, differs, reach, refusal
from sapo_kernels.training.over_trie import OverTrie
from sapo_kernels.training.tree_logprobs import logprobs_of, use_tree_attention
from sapo_kernels.training.trie_batch import TrieBatch

from . import ranks as _ranks

logger = logging.getLogger("sapo_peft")


# A forward over a trie: the tokens that its mean is over if it is a part of a batch, else 0; None: on padded rows.
Forward = int | None


class Packing:
    """Whether the batches of one trainer go over a trie, and the forward that does so now.

    The trie is made of what the model is called with, so whatever changed a batch after the collator is in it.

    mode: as in `SapoConfig`. max_tokens: of one forward; a batch with more goes in parts.
    """

    def __init__(self, mode: str, max_tokens: int | None):
        self.mode, self.max_tokens = mode, max_tokens
        self._now: Forward = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Nothing is known of the model."""
        self.agreed: bool | None = False if self.mode == "padded" else None
        self._state: int | None = None
        self._forget()
        # Why a forward failed over its trie, in training (True) and in evaluation.
        self._failed: dict[bool, str] = {}
        self._said_whole = False
        # Of this run: computed over tries, and in padded rows.
        self.tokens, self.padded_tokens = 0, 0

    def _forget(self) -> None:
        # The longest sequence that was checked; the shortest that is known to differ.
        self.longest, self.differs = 0, math.inf

    def forwards(self, trainer: Any, model, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], Forward]]:
        """The forwards of a batch that is trained on, each with its rows; None: padded."""
        batch = self._taken(trainer, model, inputs)
        if batch is None:
            return [(inputs, None)]
        return self._cut(trainer, inputs, batch, *model_support.unwrap(model))

    def evaluated(self, model, inputs: dict[str, Any], loss_only: bool) -> Forward:
        """The forward of a batch that is evaluated: over its trie if no more than the loss is asked for."""
        if not self.agreed or self._failed or not loss_only or _state_of(model) != self._state:
            return None
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if TrieBatch.of_padded(inputs).longest <= self.longest:
                return 0
        return None

    @contextlib.contextmanager
    def running(self, model: Any, forward: Forward) -> Iterator[None]:
        """While `forward` runs, with its backward: the attention is that over tries, and `loss` takes it."""
        if forward is None:
            yield
            return
        self._now = forward
        try:
            with use_tree_attention(model_support.unwrap(model)[1]):
                yield
        finally:
            self._now = None

    def loss(self, trainer: Any, compute_loss: Callable[[Any], Callable], model: Any, inputs, args, kwargs) -> Any:
        """What ``compute_loss(trainer)`` makes of the batch, over its trie if one is running.

        If that fails, it is padded from now on, beginning with this batch: only code of the libraries comes here, and
        what it has done until then is done again.
        """
        forward, training = self._now, torch.is_grad_enabled()
        # Own code may have come since the batch was looked at, and between two evaluations.
        if forward is None or training in self._failed or _own_code(trainer, "compute_loss"):
            return compute_loss(trainer)(model, inputs, *args, **kwargs)
        kept, drawn, over = dict(inputs), _random(), _Over(model, forward, self.longest)
        try:
            found = compute_loss(trainer)(over, inputs, *args, **kwargs)
        except Exception as error:
            if forward or is_out_of_memory(error):
                raise
            self._failed[training] = reason = _said(error)
            self._say(reason, "batches are" if training else "evaluation is", error)
        else:
            if training:
                self.tokens += over.tokens
                self.padded_tokens += over.padded_tokens
            return found
        _set_random(drawn)
        return compute_loss(trainer)(model, kept, *args, **kwargs)

    def saved(self) -> str:
        """What the trie saved so far, to be put behind a sentence; nothing where it was not taken."""
        if not self.tokens:
            return ""
        return f"; trained on {self.tokens:,} trie tokens instead of {self.padded_tokens:,} padded ones"

    def _taken(self, trainer: Any, model, inputs: dict[str, Any]) -> TrieBatch | None:
        """The trie of a batch that goes over one. Each rank comes here with each of its batches, and all agree."""
        if self.agreed is False:
            return None
        state, batch, failed = None, None, self._failed.get(True)
        if _own_code(trainer, "compute_loss"):
            failed = "compute_loss is the trainer's own; where it calls the model, sk.OverTrie(model) takes a trie"
        try:
            # Before the rows: those wait for the device.
            state = _state_of(model)
            batch = TrieBatch.of_padded(inputs)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            # Virtual tokens, a model that is none of transformers', rows that are no trie.
            failed = failed or _said(error)
        everyone = _ranks.gathered((failed, state != self._state, batch.longest if batch else 0))
        if reasons := [reason for reason, *_ in everyone if reason]:
            self._settle(trainer, reasons[0])
            return None
        if any(changed for _, changed, _ in everyone):
            self._state = state
            self._forget()
        longest = max(tokens for *_, tokens in everyone)
        if self.longest < longest < self.differs:
            self._check(trainer, model, batch, longest)
        return batch if self.agreed and batch.longest <= self.longest else None

    def _check(self, trainer: Any, model, batch: TrieBatch, longest: int) -> None:
        """Whether sequences of up to `longest` tokens, or more so that there are few checks, may be taken."""
        further = reach(model_support.unwrap(model)[1], longest)
        for tokens in dict.fromkeys((further, longest)):
            try:
                reason = self._reason(trainer, model, batch.lengthened(tokens))
            except Exception as error:
                if tokens == longest or not is_out_of_memory(error):
                    raise
                reason = _said(error)
            reasons = [other for other in _ranks.gathered(reason) if other]
            if not reasons:
                self.agreed, self.longest = True, tokens
                return
        if not self.longest:
            self._settle(trainer, reasons[0])
            return
        self.differs = longest
        if self.mode == "trie" or trainer.is_world_process_zero():
            self._say(reasons[0], f"batches with a row of {longest} tokens or more are")

    def _reason(self, trainer: Any, model, batch: TrieBatch) -> str | None:
        """Why the trainer's batches cannot go over a trie, or None."""
        args = trainer.args
        for name in ("label_smoothing_factor", "neftune_noise_alpha"):
            if getattr(trainer, name, None) or getattr(args, name, None):
                return f"{name} needs whole batches"
        if args.n_gpu > 1:
            return "nn.DataParallel cuts batches into rows"
        if trainer.compute_loss_func is not None:
            return "compute_loss_func needs the logits of whole batches"
        outer, inner = model_support.unwrap(model)
        model.train()
        with torch.enable_grad():
            found = refusal(outer, inner, batch.longest, getattr(inner, "loss_function", None))
            own = OwnLoss(outer, inner, lambda part: logprobs_of(outer, inner, part))
            # Each rank runs the same forwards, whatever it finds.
            return found or differs(outer, inner, batch, own.plain, own.packed)

    def _settle(self, trainer: Any, reason: str) -> None:
        """Every rank pads from now on; one line in the log says why."""
        self.agreed = False
        if not self._failed and (self.mode == "trie" or trainer.is_world_process_zero()):
            self._say(reason, "batches are")

    def _say(self, reason: str, what: str, error: Exception | None = None) -> None:
        if self.mode == "trie":
            raise RuntimeError(f"packing='trie': {reason}") from error
        logger.warning("%s padded, not packed into tries: %s", what, reason)

    def _cut(self, trainer, inputs, batch: TrieBatch, outer, inner) -> list[tuple[dict[str, Any], Forward]]:
        """The batch in pieces of at most `max_tokens`, each with its rows; whole where it must be."""
        tokens, count = len(batch.target_of), len(inputs["input_ids"])
        whole = self.max_tokens is None or batch.num_tokens <= self.max_tokens
        # Ranks with sharded parameters wait for each forward.
        whole = whole or any(hasattr(p, "to_local") for p in inner.parameters())
        if not whole and (reason := _whole_only(trainer, outer)):
            whole = True
            if not self._said_whole:
                self._said_whole = True
                logger.warning("train_max_tokens: batches go in one forward each: %s", reason)
        if whole:
            return [(inputs, 0)]
        pieces = []
        for rows in batch.groups(self.max_tokens):
            index = torch.tensor(rows, device=inputs["input_ids"].device)
            some = {
                name: value[index] if isinstance(value, torch.Tensor) and value.shape[:1] == (count,) else value
                for name, value in inputs.items()
            }
            pieces.append((some, tokens))
        return pieces


class _Over(OverTrie):
    """The model over the trie of what it is called with, unless that is more than was checked.

    part: tokens of the batch that this is a part of, else 0. longest: tokens of a row that are checked.
    """

    def __init__(self, model, part: int, longest: int):
        super().__init__(model, verify=False)
        # Tokens computed, and in the padded rows.
        vars(self).update(_part=part, _longest=longest, tokens=0, padded_tokens=0)

    def __call__(self, input_ids, *args, **kwargs):
        vars(self)["padded_tokens"] += input_ids.numel()
        return super().__call__(input_ids, *args, **kwargs)

    def _mean(self, logprob, count):
        return super()._mean(logprob, (self._part or None) if count is None else count)

    def _logprobs(self, batch: TrieBatch, statistics: bool = False):
        if batch.longest > self._longest:
            raise NotTreeable(
                f"it is called with {batch.longest} tokens in a row, of which {self._longest} are checked"
            )
        vars(self)["tokens"] += batch.num_tokens
        return super()._logprobs(batch, statistics)


def _state_of(model) -> int:
    """What changes when the model is used in another way."""
    outer, inner = model_support.unwrap(model)
    return fingerprint(outer, model_support.input_device(inner), configurations(outer), "train")


def _own_code(trainer: Any, *methods: str) -> str | None:
    """The first of these methods of a trainer that is not the libraries' own everywhere."""
    for name in methods:
        for found in (vars(trainer), *map(vars, type(trainer).__mro__)):
            if name in found and foreign_callable(found[name]):
                return name
    return None


def _whole_only(trainer: Any, outer) -> str | None:
    """Why what a step does may not be done once for each part of its batch, or None."""
    if name := _own_code(trainer, "training_step", "_prepare_inputs"):
        return f"{name} is the trainer's own"
    if any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in outer.parameters()):
        return "its parameters have hooks that get whole gradients"
    if "lomo" in str(trainer.args.optim).lower():
        return "its optimizer takes a step in each backward pass"
    return None


def _said(error: Exception) -> str:
    known = isinstance(error, (NotTreeable, TypeError, ValueError))
    return str(error) if known else f"{type(error).__name__}: {str(error)[:200]}"


def _random() -> tuple[torch.Tensor, torch.Tensor | None]:
    """The states of torch's random numbers."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_random(drawn: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(drawn[0])
    if drawn[1] is not None:
        torch.cuda.set_rng_state(drawn[1])
