"""ResponseCache: everything about a scoring job that does not depend on the model's weights.

Token ids, targets, rows, positions and the passes, made once and kept on the device, so that scoring the same
prompts on the same examples again, as the model changes, tokenises and plans nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from ..trie.trie import TokenTrie, TriePass, plan_trie
from .render import Rendered, Renderer, Template, check_examples, check_prompts, special_tokens

logger = logging.getLogger("sapo_kernels")
_BATCH = 2048
# Tokens of all cells of a prompt that are compared at a time.
_COMPARED = 64


@dataclass(frozen=True)
class ScorePlan:
    """A trie over all cells and the passes that cover it."""

    trie: TokenTrie
    passes: list[TriePass]


class ResponseCache:
    """Token ids of K prompts x M examples and the plan to score them; build it with `build` or `from_token_ids`.

    Attributes:
        prompts: K strings (``"prompt 0"``... if made from ids).
        num_prompts, num_examples: K and M. Cell (k, m) has the flat number ``k * M + m``.
        selected: flat numbers of the cells that a selection has, else None.
        stats: what rendering did: "truncated_inputs" and "truncated_targets" (cells cut to max_source and max_target),
            "boundary_breaks" (cells whose context is no token prefix of context + response), "special_tokens_in_text"
            (examples whose text contains a special token of the tokenizer).
    """

    def __init__(self, ids, offsets, context_lengths, prompts: list[str], num_examples: int, stats: dict):
        self.ids: np.ndarray = ids
        self.offsets: np.ndarray = offsets
        self.context_lengths: np.ndarray = context_lengths
        self.prompts, self.num_examples, self.stats = prompts, num_examples, stats
        self.selected: np.ndarray | None = None
        self.max_id = int(ids.max()) if len(ids) else -1
        self._plans: dict = {}

    @property
    def num_prompts(self) -> int:
        """K."""
        return len(self.prompts)

    @property
    def response_lengths(self) -> np.ndarray:
        """[K * M] int64 response tokens of each cell."""
        return np.diff(self.offsets) - self.context_lengths

    @property
    def lengths(self) -> np.ndarray:
        """[K * M] int64 tokens a forward of each cell alone computes: all but the last response token."""
        return np.diff(self.offsets) - 1

    @property
    def contexts(self) -> list[list[list[int]]]:
        """``contexts[k][m]``: token ids of each cell's context."""
        return self._nested(self.offsets[:-1], self.offsets[:-1] + self.context_lengths)

    @property
    def responses(self) -> list[list[list[int]]]:
        """``responses[k][m]``: token ids of each cell's response."""
        return self._nested(self.offsets[:-1] + self.context_lengths, self.offsets[1:])

    @cached_property
    def first_equal(self) -> np.ndarray:
        """[K * M] int64, the first cell with the same context and response as each cell: duplicates score alike."""
        # A target, and where it stands in the trie, says what the whole sequence is.
        last = self.trie.cell_target[self.trie.cell_ptr[1:] - 1]
        _, first, group = np.unique(
            last * (self.context_lengths.max() + 1) + self.context_lengths, return_index=True, return_inverse=True
        )
        return first[group]

    @cached_property
    def by_length(self) -> np.ndarray:
        """Different cells, the longest first."""
        cells = np.unique(self.first_equal)
        return cells[np.argsort(-self.lengths[cells], kind="stable")]

    def check_ids(self, vocabulary: int) -> None:
        """Raise ValueError naming the first cell with an id of `vocabulary` or more."""
        if self.max_id >= vocabulary:
            at = int(np.argmax(self.ids >= vocabulary))
            cell = int(np.searchsorted(self.offsets, at, side="right")) - 1
            raise ValueError(
                f"cell {self.cell_name(cell)}: token ids must be below the model's vocabulary of {vocabulary}, got "
                f"{int(self.ids[at])}; is this the model's tokenizer?"
            )

    @cached_property
    def trie(self) -> TokenTrie:
        """The trie of all cells."""
        return plan_trie(self.ids, self.offsets, self.context_lengths)

    @property
    def extremes(self) -> tuple[int, int]:
        """The first and the last cell in the trie's depth-first order: the smallest and the largest, as words sort."""
        return int(self.trie.leaf.argmin()), int(self.trie.leaf.argmax())

    def cell_name(self, cell: int) -> str:
        """What messages call a cell, by its flat number; a selection's cells by those of the whole."""
        number = cell if self.selected is None else int(self.selected[cell])
        return f"(prompt {number // self.num_examples}, example {number % self.num_examples})"

    @cached_property
    def prefix_lengths(self) -> np.ndarray:
        """[K] int64, how many tokens all cells of each prompt begin with alike, before anything is predicted.

        Of a whole cache only, no selection.
        """
        first = self.offsets[:-1].reshape(self.num_prompts, -1)
        lengths = self.context_lengths.reshape(self.num_prompts, -1).min(1) - 1
        for k, longest in enumerate(lengths.tolist()):
            for begin in range(0, longest, _COMPARED):
                columns = np.arange(begin, min(begin + _COMPARED, longest))
                ids = self.ids[first[k][:, None] + columns]
                differ = (ids != ids[0]).any(0)
                if differ.any():
                    lengths[k] = begin + differ.argmax()
                    break
        return lengths

    def select(self, cells: np.ndarray) -> ResponseCache:
        """A cache of some cells only, in the order of their flat numbers `cells`, which it keeps in ``selected``.

        It is no grid of prompts and examples any more: ``contexts`` and ``responses`` are not there.
        """
        first, stop = self.offsets[:-1][cells], self.offsets[1:][cells]
        offsets = np.concatenate([[0], np.cumsum(stop - first)])
        # Slices are copied faster than their ids are looked up one by one.
        ids = np.concatenate(
            [self.ids[:0], *(self.ids[a:b] for a, b in zip(first.tolist(), stop.tolist(), strict=True))]
        )
        part = ResponseCache(ids, offsets, self.context_lengths[cells], self.prompts, self.num_examples, self.stats)
        part.selected = np.asarray(cells) if self.selected is None else self.selected[cells]
        return part

    def _nested(self, first, stop) -> list[list[list[int]]]:
        if self.selected is not None:
            raise ValueError("cache: expected a cache of all cells, got one of selected cells")
        flat = [self.ids[a:b].tolist() for a, b in zip(first, stop, strict=True)]
        return [flat[k * self.num_examples : (k + 1) * self.num_examples] for k in range(self.num_prompts)]

    def __repr__(self) -> str:
        return f"ResponseCache({self.num_prompts} prompts x {self.num_examples} examples, {len(self.ids)} tokens)"

    def plan(self, max_tokens: int) -> ScorePlan:
        """The trie of all cells cut into passes of at most `max_tokens`; planned once per budget."""
        if max_tokens not in self._plans:
            self._plans[max_tokens] = ScorePlan(self.trie, self.trie.passes(max_tokens))
        return self._plans[max_tokens]

    @classmethod
    def from_token_ids(cls, contexts: Sequence, responses: Sequence, prompts: Sequence[str] | None = None):
        """A cache of ready token ids.

        Args:
            contexts: ``contexts[k][m]``, K lists of M lists of ids, each with at least one id.
            responses: ``responses[m]``, M lists of ids shared by all prompts, or ``responses[k][m]``.
            prompts: K names for reports.

        Raises:
            ValueError, TypeError: naming the cell that is missing, empty, ragged or not made of ids.
        """
        contexts, responses = _rows(contexts, "contexts"), _rows(responses, "responses")
        num_examples = len(contexts[0])
        if np.ndim(responses[0][0]) == 0:  # shared by all prompts
            if len(responses) != num_examples:
                raise ValueError(f"responses: expected {num_examples}, got {len(responses)}")
            responses = [responses] * len(contexts)
        for name, rows in (("contexts", contexts), ("responses", responses)):
            if len(rows) != len(contexts):
                raise ValueError(f"{name}: expected {len(contexts)} lists, got {len(rows)}")
            for k, row in enumerate(rows):
                if len(row) != num_examples:
                    raise ValueError(f"{name}[{k}]: expected {num_examples} examples, got {len(row)}")
        cells = [
            (_ids(context, f"contexts[{k}][{m}]"), _ids(response, f"response of cell ({k}, {m})"))
            for k, pairs in enumerate(map(zip, contexts, responses))
            for m, (context, response) in enumerate(pairs)
        ]
        names = [f"prompt {k}" for k in range(len(contexts))] if prompts is None else list(prompts)
        if isinstance(prompts, str) or not all(isinstance(name, str) for name in names):
            raise TypeError("prompts: expected a list of strings")
        if len(names) != len(contexts):
            raise ValueError(f"prompts: expected {len(contexts)} names, got {len(names)}")
        return cls(*_flatten(cells), names, num_examples, {})

    @classmethod
    def build(
        cls,
        tokenizer,
        prompts: Sequence[str],
        examples: Sequence[Mapping[str, str]],
        template: Template = None,
        *,
        suffix: str = "",
        text_word: str = "Text",
        max_source: int = 1536,
        max_target: int = 128,
        instruction_role: str = "user",
        now: datetime | None = None,
    ) -> ResponseCache:
        """Render and tokenise every (prompt, example) once.

        Args:
            tokenizer: a transformers tokenizer; its chat template is used if it has one.
            prompts: K instructions, not empty, free of the tokenizer's special tokens.
            examples: M mappings with "input" and "target" (or "sentence" and "label", or other columns that
                `turns.columns_of` knows), targets not empty, or with ``messages``, the last of them the assistant's.
            template, suffix, text_word: the layout, see `sapo_kernels.scoring.render.Renderer`.
            max_source: longest context in tokens; a longer one loses the end of its *input*, never of the instruction,
                the suffix or the closing of the turn.
            max_target: longest response in tokens; the rest is cut, as in the paper.
            instruction_role: "user" or "system": the turn that the instruction is in.
            now: what chat templates that show a date are shown; None: when this process began.

        Raises:
            ValueError, TypeError: naming the prompt or example, what was expected and what was got.
        """
        if not callable(tokenizer) or not hasattr(tokenizer, "all_special_tokens"):
            raise TypeError(f"tokenizer: expected a transformers tokenizer, got {type(tokenizer).__name__}")
        specials = special_tokens(tokenizer)
        prompts, examples = check_prompts(prompts, specials), check_examples(examples)
        for name, size in (("max_source", max_source), ("max_target", max_target)):
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}")
        for name, text in (("suffix", suffix), ("text_word", text_word)):
            if not isinstance(text, str):
                raise TypeError(f"{name}: expected a string, got {type(text).__name__}")
            found = [s for s in specials if s in text]
            if found:
                raise ValueError(f"{name}: expected plain text, got the tokenizer's special token {found[0]!r} in it")
        renderer = Renderer(tokenizer, template, suffix, text_word, instruction_role=instruction_role, now=now)
        builder = CellBuilder(renderer, prompts, examples, max_source, max_target)
        cells = builder.cells()
        tainted = [m for m, e in enumerate(examples) if any(s in text for text in _texts(e) for s in specials)]
        stats = {**builder.stats, "special_tokens_in_text": len(tainted)}
        if tainted:
            logger.warning(
                "%d examples (first: %d) contain a special token of the tokenizer as text; it is read as that token",
                len(tainted), tainted[0],
            )  # fmt: skip
        return cls(*_flatten(cells), prompts, len(examples), stats)


class CellBuilder:
    """Tokenises every (prompt, example) in batches and counts what it had to change; `warn`: logs it too."""

    def __init__(self, renderer: Renderer, prompts, examples, max_source: int, max_target: int, warn: bool = True):
        self.renderer, self.prompts, self.examples, self.warn = renderer, prompts, examples, warn
        self.max_source, self.max_target = max_source, max_target
        self.leading = renderer.leading_ids()
        self.stats = {"truncated_inputs": 0, "truncated_targets": 0, "boundary_breaks": 0}

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        made: list[list[int]] = []
        for i in range(0, len(texts), _BATCH):
            # verbose=False: "longer than the model's maximum" is not news here, max_source and max_target rule.
            batch = self.renderer.tokenizer(
                texts[i : i + _BATCH], add_special_tokens=False, return_attention_mask=False, verbose=False
            )
            made.extend(batch["input_ids"])
        return made

    def cells(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(context ids, response ids) of every cell, prompt by prompt."""
        size = len(self.examples)
        rendered = [self.renderer.render(p, e) for p in self.prompts for e in self.examples]
        contexts = [self.leading + ids for ids in self.tokenize([r.context for r in rendered])]
        for c, ids in enumerate(contexts):
            if len(ids) > self.max_source:
                rendered[c], contexts[c] = self._shorten(c // size, c % size, len(ids))
                self.stats["truncated_inputs"] += 1
        whole = [self.leading + ids for ids in self.tokenize([r.context + r.response for r in rendered])]

        broken = [c for c, r in enumerate(rendered) if not r.exact or whole[c][: len(contexts[c])] != contexts[c]]
        for c, ids in zip(broken, self.tokenize([rendered[c].response for c in broken]), strict=True):
            whole[c] = contexts[c] + ids
        self.stats["boundary_breaks"] = len(broken)
        if broken and self.warn:
            k, m = divmod(broken[0], size)
            logger.warning(
                "%d of %d cells (first: prompt %d, example %d): the tokens of the context are not the first ones of "
                "context + response, so both were tokenised separately", len(broken), len(whole), k, m,
            )  # fmt: skip

        cells = []
        for c, (context, ids) in enumerate(zip(contexts, whole, strict=True)):
            response = ids[len(context) :]
            k, m = divmod(c, size)
            if not context or not response:
                what = "context" if not context else "response"
                raise ValueError(f"prompt {k}, example {m}: expected at least one {what} token, got none")
            self.stats["truncated_targets"] += len(response) > self.max_target
            cells.append((np.asarray(context, np.int64), np.asarray(response[: self.max_target], np.int64)))
        for what in ("inputs", "targets"):
            if self.stats[f"truncated_{what}"] and self.warn:
                logger.warning("%d of %d cells: %s cut", self.stats[f"truncated_{what}"], len(cells), what)
        return cells

    def _shorten(self, k: int, m: int, length: int) -> tuple[Rendered, list[int]]:
        """Cut the input from its end, in whole tokens, until the context fits."""
        example, tokenizer = self.examples[m], self.renderer.tokenizer
        text = example["input"]
        ends = _token_ends(tokenizer, text)
        keep = len(ends)
        while length > self.max_source:
            if not keep:
                raise ValueError(
                    f"prompt {k}, example {m}: expected a context of at most {self.max_source} tokens, got more even "
                    "without the input; shorten the prompt or raise max_source"
                )
            # Never below nothing: in its place the input may be more tokens than alone.
            keep = max(0, keep - (length - self.max_source))
            cut = {**example, "input": text[: ends[keep - 1]] if keep else ""}
            rendered = self.renderer.render(self.prompts[k], cut)
            ids = self.leading + self.tokenize([rendered.context])[0]
            length = len(ids)
        return rendered, ids


def _texts(example: Mapping[str, Any]) -> list[str]:
    return [example["input"], example["target"], *(turn["content"] for turn in example.get("history", ()))]


def _token_ends(tokenizer, text: str) -> list[int]:
    """Where each token of `text` ends, in characters; per character for tokenizers without offsets."""
    if getattr(tokenizer, "is_fast", False):
        made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [stop for _, stop in made["offset_mapping"]]
    return list(range(1, len(text) + 1))


def _rows(values, name: str) -> list[list]:
    """Lists or arrays of lists or arrays, the first of them not empty."""
    try:
        rows = list(map(list, values))
    except TypeError:
        raise TypeError(f"{name}: expected a list of lists, got {str(values)[:80]}") from None
    if not rows or not rows[0]:
        raise ValueError(f"{name}: expected at least one, got none")
    return rows


def _ids(values, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths inside
        raise TypeError(f"{name}: expected a flat list of token ids, got nested lists") from None
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"{name}: expected a flat list of token ids, got {array.dtype} of shape {list(array.shape)}")
    if not array.size:
        raise ValueError(f"{name}: expected at least one token id, got none")
    if int(array.min()) < 0:
        raise ValueError(f"{name}: token ids must not be negative, got {int(array.min())}")
    if int(array.max()) >= 2**63:
        raise ValueError(f"{name}: token ids must be below 2**63, got {int(array.max())}")
    return array.astype(np.int64)


def _flatten(cells: list[tuple[np.ndarray, np.ndarray]]):
    context_lengths = np.asarray([len(c) for c, _ in cells], dtype=np.int64)
    lengths = context_lengths + np.asarray([len(r) for _, r in cells], dtype=np.int64)
    ids = np.concatenate([part for cell in cells for part in cell])
    return ids, np.concatenate([[0], np.cumsum(lengths)]), context_lengths
