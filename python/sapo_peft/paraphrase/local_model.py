"""Paraphrases from a causal LM on this machine, which is left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sapo_kernels.files import excerpt
from sapo_kernels.scoring.model_state import scoring_mode
from sapo_kernels.scoring.render import PLAIN_ANSWER, special_tokens

from ..terminal import plain
from .answers import AnswerFault, Request
from .source import Answer, Deadline, SourceError


class LocalModelSource:
    """Draws answers from `model` (a Hugging Face causal LM) through ``generate``, with temperature 1 and top_p 0.95.

    name: shown as "model:NAME"; default: the last part of the model's own path. per_call: paraphrases per
    answer. max_new_tokens: longest answer. seed: the n-th answer of this source is drawn with ``seed + n``, which
    stands in its provenance, "model:NAME (seed 7)".

    The mode of every module, the random state of torch on all devices and the generation settings are as before
    after each answer, also after an exception. At the deadline generation stops with the token at hand.
    """

    finite = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        name: str | None = None,
        per_call: int = 5,
        max_new_tokens: int = 1024,
        seed: int = 0,
    ):
        if per_call < 1 or max_new_tokens < 1:
            raise ValueError(f"per_call, max_new_tokens: expected at least 1, got {per_call} and {max_new_tokens}")
        self.model, self.tokenizer = model, tokenizer
        path = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        self.name = f"model:{plain(name or Path(path).name or path)[:200]}"
        self.per_call, self.max_new_tokens = per_call, max_new_tokens
        self._seed, self._specials = seed, special_tokens(tokenizer)

    def paraphrase(self, request: Request, deadline: Deadline) -> Iterator[Answer]:
        """One answer after the other; see the class."""
        message = request.message(min(self.per_call, request.wanted))
        if special := next((special for special in self._specials if special in message), None):
            raise SourceError(f"{self.name}: expected plain text, got the special token {special!r} in the prompts")
        ids = self._encode(message)
        for _ in range(-(-request.wanted // self.per_call)):
            if deadline.over:
                return
            seed, self._seed = self._seed, self._seed + 1
            source = f"{self.name} (seed {seed})"
            try:
                texts, fault = request.read(self._generate(ids, seed, deadline))
            except AnswerFault as error:
                texts, fault = [], str(error)
            special = next((special for special in self._specials if special in "\n".join(texts)), None)
            if special:
                texts, fault = [], f"expected plain text, got the special token {excerpt(special)} in it"
            yield Answer(tuple(texts), source, fault)

    def _encode(self, message: str) -> torch.Tensor:
        """Token ids [1, T] on the model's device."""
        if getattr(self.tokenizer, "chat_template", None):
            turn = [{"role": "user", "content": message}]
            options = {"tokenize": False, "enable_thinking": False, "thinking": False}
            text = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, **options)
            # The template writes its own special tokens.
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = self.tokenizer(message + PLAIN_ANSWER + "\n")["input_ids"]
        return torch.tensor([ids], device=self.model.get_input_embeddings().weight.device)

    def _generate(self, ids: torch.Tensor, seed: int, deadline: Deadline) -> str:
        """The text of one answer."""
        own, pad = self.model.generation_config.eos_token_id, self.tokenizer.pad_token_id
        ends = self.tokenizer.eos_token_id if own is None else own
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=gpus), scoring_mode(self.model):
            torch.manual_seed(seed)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_p=0.95,
                top_k=0,
                max_new_tokens=self.max_new_tokens,
                max_time=deadline.left,
                eos_token_id=ends or None,
                pad_token_id=pad if pad is not None else (ends or [0])[0],
            )
        new = output[0, ids.shape[1] :].tolist()
        stop = next((place for place, token in enumerate(new) if token in ends), None)
        # Special tokens stay visible, so that a text with one in the middle is refused and not silently joined.
        return self.tokenizer.decode(new[:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False)
