"""From (instruction, input, target) to the text that the model reads and the text that it is scored on."""

from __future__ import annotations

import copy
import functools
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .thoughts import THOUGHT_END, closing_of, open_thought
from .turns import Turn, check_history, check_role, columns_of, example_of, turns_of

logger = logging.getLogger("sapo_kernels")
_PLACEHOLDER = re.compile(r"\{(prompt|input)\}")
PLAIN_ANSWER = "\n\nAnswer:"
# Stands for an answer where only what a template puts around one is of interest; none has it in its own text.
MARKER = "zqxjk"
# What templates that show a date or the time are shown: one moment in a process, or a run past midnight would score
# with one date and train with another.
STARTED = datetime.now().replace(microsecond=0)

Template = str | Callable[[str, Mapping[str, str]], Any] | None


@dataclass(frozen=True)
class Rendered:
    """One cell as text. ``exact`` is False if the chat template does not keep the context in front of the answer."""

    context: str
    response: str
    exact: bool = True


class Renderer:
    """Renders cells for one tokenizer.

    The user turn is ``prompt + "\\n\\n" + text_word + ":\\n" + input + "\\n\\n" + suffix`` (without the last blank
    line if the suffix is empty), or ``template`` filled by replacement: ``{prompt}`` and ``{input}``, each at least
    once. A callable ``template(prompt, example)`` returns the user turn, or a pair (context, response) that is taken
    as it is.

    With a chat template the user turn becomes a conversation and the target the assistant's turn; whatever closes
    that turn belongs to the response (with a template that ignores ``add_generation_prompt``, the assistant's header
    too). Where nothing closes it that a generation would stop at, the tokenizer's end token does. Thinking is switched
    off; a thought that the template begins nevertheless is closed in front of the response. Without a template, the
    layout is the user turn followed by ``"\\n\\nAnswer:"``, and the response is ``" " + target`` closed by
    what the tokenizer puts behind a text by itself, else by the end-of-sequence token.

    An example may have a ``history``, the turns before the user's. With ``instruction_role="system"`` the instruction
    is the system turn, or ends the one that the history begins with, and the user turn is
    ``input + "\\n\\n" + suffix``. Either wants a chat template.

    now: what templates that read the clock read; None: when this process began (`STARTED`).
    """

    def __init__(
        self,
        tokenizer,
        template: Template = None,
        suffix: str = "",
        text_word: str = "Text",
        *,
        instruction_role: str = "user",
        now: datetime | None = None,
    ):
        check_role(instruction_role)
        self.tokenizer, self.template, self.suffix, self.text_word = tokenizer, template, suffix, text_word
        self.chat = bool(getattr(tokenizer, "chat_template", None))
        self.role, self.now = instruction_role, STARTED if now is None else now
        if self.role == "system" and (template is not None or not self.chat):
            what = "no template beside it" if template is not None else "a tokenizer with a chat template"
            raise ValueError(f"instruction_role: expected {what} for 'system', got {'one' if self.chat else 'none'}")
        self._closing: tuple[str, str] | None = None
        self._behind: dict[tuple[tuple[str, str], ...], str] = {}
        if isinstance(template, str):
            missing = {"prompt", "input"} - set(_PLACEHOLDER.findall(template))
            if missing:
                raise ValueError(f"template: expected {{prompt}} and {{input}}, got one without {sorted(missing)}")
        elif template is not None and not callable(template):
            raise TypeError(f"template: expected a string, a callable or None, got {type(template).__name__}")

    def render(self, prompt: str, example: Mapping[str, str]) -> Rendered:
        """Text of one cell; `example` has the keys "input" and "target"."""
        if callable(self.template):
            made = self.template(prompt, example)
            if isinstance(made, tuple) and len(made) == 2 and all(isinstance(part, str) for part in made):
                return Rendered(*made)
            if not isinstance(made, str):
                raise TypeError(f"template: expected a string or (context, response), got {type(made).__name__}")
            turn = made
        elif self.template is not None:
            values = {"prompt": prompt, "input": example["input"]}
            # One pass over the template only: braces inside an instruction or an input are text.
            turn = _PLACEHOLDER.sub(lambda m: values[m.group(1)], self.template)
        else:
            turn = f"{prompt}\n\n{self.text_word}:\n{example['input']}" if self.role == "user" else example["input"]
            turn += f"\n\n{self.suffix}" if self.suffix else ""
        history = example.get("history", ())
        if self.chat:
            return self._conversation(turns_of(history, self.role, prompt, turn), example["target"])
        if history:
            raise ValueError("tokenizer: expected a chat template for examples with a history, got none")
        return self._plain(turn, example["target"])

    def _plain(self, turn: str, target: str) -> Rendered:
        # Token by token: decoding would put spaces between them.
        end = "".join(self.tokenizer.convert_ids_to_tokens(self._added[1])) or self.tokenizer.eos_token or ""
        return Rendered(turn + PLAIN_ANSWER, " " + target + end)

    def _conversation(self, turns: list[Turn], target: str) -> Rendered:
        # Templates of vision-language models read a list of parts and print nothing, in silence, for a string.
        for content in (str, lambda text: [{"type": "text", "text": text}]):
            shaped = lambda turns, content=content: [{**turn, "content": content(turn["content"])} for turn in turns]
            context = self._text(shaped(turns), add_generation_prompt=True)
            lost = [t["role"] for t in turns if t["role"] != "assistant" and t["content"].strip() not in context]
            if not lost:
                break
        else:
            raise ValueError(
                f"tokenizer: expected a chat template that shows the {lost[0]} turn, got one that drops it"
            )
        answered = lambda text: self._text(shaped([*turns, {"role": "assistant", "content": text}]))
        if self._closing is None:
            self._closing = self._closing_of(answered(MARKER))
        thought = open_thought(self._behind_the_user(shaped, turns, context))
        if thought:
            context += self._thought_closing(thought, context, answered)
        full = answered(target)
        if full.startswith(context) and target.strip() in full[len(context) :]:
            return Rendered(context, full[len(context) :] + self._closing[1])
        # A thought is closed as no template writes it, and in front of any answer alike.
        return Rendered(context, target + "".join(self._closing), exact=thought is not None)

    def _behind_the_user(self, shaped: Callable, turns: list[Turn], context: str) -> str:
        """What the template puts behind the last turn's text, which may have the same words in it."""
        kind = tuple((turn["role"], turn["content"] if turn["role"] == "system" else "") for turn in turns)
        if kind not in self._behind:
            marked = shaped([*turns[:-1], {**turns[-1], "content": MARKER}])
            self._behind[kind] = self._text(marked, add_generation_prompt=True).rpartition(MARKER)[2]
        behind, last = self._behind[kind], turns[-1]["content"].strip()
        if context.endswith(behind):
            return behind
        # What the template adds depends on the texts.
        bare = self._text(shaped(turns), add_generation_prompt=False)
        return context[len(bare) if context.startswith(bare) else context.rindex(last) + len(last) :]

    def _text(self, turns: list[dict[str, Any]], **options: Any) -> str:
        # Families spell the switch differently; a template ignores a variable it does not know.
        options = {"tokenize": False, "enable_thinking": False, "thinking": False, **options}
        if reads_clock(self.tokenizer):
            options["chat_template"] = _as_of(self.tokenizer.get_chat_template(), self.now)
        try:
            return self.tokenizer.apply_chat_template(turns, **options)
        except Exception as error:
            # Of templates that know no system turn, or want turns to alternate.
            if type(error).__name__ != "TemplateError":
                raise
            roles = [turn["role"] for turn in turns]
            raise ValueError(f"tokenizer: the chat template refuses the turns {roles}: {error}") from error

    def _closing_of(self, full: str) -> tuple[str, str]:
        """(what the template appends to an answer, the end token if a generation would not stop at anything in it)."""
        closing = full.rpartition(MARKER)[2] if MARKER in full else ""
        if any(token in closing for token in special_tokens(self.tokenizer, added=True)):
            return closing, ""
        end = self.tokenizer.eos_token or ""
        said = f"the end token {end!r} is appended to every response" if end else "and the tokenizer has no end token"
        warn_once(f"the chat template does not close the assistant's turn: {said}")
        return closing, end

    def _thought_closing(self, thought: re.Match, context: str, answered: Callable[[str], str]) -> str:
        """What ends the thought that the template's generation prompt begins: as the template would, where it does."""
        warn_once(f"the chat template opens a thought with {thought[0]!r}: it is closed before every response")
        full = answered(MARKER)
        between = full[len(context) :].partition(MARKER)[0] if full.startswith(context) else ""
        if THOUGHT_END.search(between):
            return between
        mark = closing_of(thought[0])
        known = special_tokens(self.tokenizer, added=True)
        if mark is None or (thought[0] in known and mark not in known):
            raise ValueError(
                f"tokenizer: expected a chat template whose thought {thought[0]!r} can be closed, got one that opens "
                "it in the generation prompt with no known end tag; use a template without thoughts"
            )
        blank = context[len(context.rstrip()) :]
        return f"\n{mark}\n\n" if "\n" in blank else mark

    def leading_ids(self) -> list[int]:
        """The tokens that the tokenizer puts in front of every sequence by itself, BOS or others.

        A chat template writes its own.
        """
        return [] if self.chat else self._added[0]

    @functools.cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer puts in front of a text and behind it."""
        whole, bare = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        for start in range(len(whole) - len(bare) + 1):
            if bare and whole[start : start + len(bare)] == bare:
                return list(whole[:start]), list(whole[start + len(bare) :])
        raise ValueError(f"tokenizer: expected special tokens around the ids {bare} of 'a', got {whole}")


def special_tokens(tokenizer, added: bool = False) -> list[str]:
    """Every text that the tokenizer reads as a special token; with `added`, every one that it reads as one token.

    Turn markers are often added tokens that have no role of their own (Llama 3's ``<|start_header_id|>``), so
    ``all_special_tokens`` does not know them.

    Raises: ValueError for a tokenizer that reads none in a text, so that no rendered conversation could be encoded.
    """
    known = getattr(tokenizer, "added_tokens_decoder", {})
    if not isinstance(known, Mapping) or getattr(tokenizer, "split_special_tokens", False):
        raise ValueError(
            f"tokenizer: expected one that parses special tokens in a text, got {type(tokenizer).__name__}"
            + (", which encodes conversations by itself; load the model's tokenizer.json as a PreTrainedTokenizerFast"
               if not isinstance(known, Mapping) else " with split_special_tokens=True")
        )  # fmt: skip
    found = [token for token in known.values() if added or token.special]
    return sorted({text for text in map(str, [*tokenizer.all_special_tokens, *found]) if text.strip()})


def with_end_token(tokenizer, model):
    """`tokenizer`; if it has no end token, a copy with the first one of the model's generation configuration."""
    ends = generation_ends(model)
    if getattr(tokenizer, "eos_token", "") is not None or not ends:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def generation_ends(model) -> list[int]:
    """The end tokens that the model's generation configuration names, one or several."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return [end for end in (ends if isinstance(ends, (list, tuple)) else [ends]) if isinstance(end, int)]


def reads_clock(tokenizer) -> bool:
    """Whether the chat template shows a date or the time."""
    return "strftime_now" in str(getattr(tokenizer, "chat_template", None))


@functools.lru_cache(8)
def _as_of(template: str, now: datetime) -> str:
    """The template with a macro in place of the library's function, which asks the clock; no callable can be handed in.

    A line of its own, of which nothing is printed: blanks and line ends at the beginning of the template stay.
    """
    directives = [f"%{flag}{letter}" for flag in ("-", "") for letter in string.ascii_letters]
    shown = [("%%", MARKER), *((one, now.strftime(one)) for one in directives), (MARKER, "%")]
    filters = " | ".join(f"replace({what!r}, {text!r})" for what, text in shown)
    return f"{{% macro strftime_now(format) %}}{{{{ format | {filters} }}}}{{% endmacro %}}\n{template}"


@functools.cache
def warn_once(message: str) -> None:
    """A line in the log, once a process: every task and every scoring makes a new renderer."""
    logger.warning("%s", message)


def check_prompts(prompts: Sequence[str], specials: Sequence[str] = ()) -> list[str]:
    """The prompts as a list, or one error that names the first bad one."""
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a list of strings, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts: expected at least one, got an empty list")
    for k, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompt {k}: expected a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"prompt {k}: expected text, got an empty string")
        _check_characters(prompt, f"prompt {k}")
        if "\0" in prompt:  # no report could be written with it
            raise ValueError(f"prompt {k}: expected text, got a NUL character")
        for special in specials:
            if special in prompt:
                raise ValueError(
                    f"prompt {k}: expected plain text, got the tokenizer's special token {special!r} in it"
                )
    return list(prompts)


def check_examples(examples: Sequence[Mapping[str, str]], *, empty_targets: bool = False) -> list[dict[str, Any]]:
    """The examples as {"input", "target"}, or one error that names the first bad one.

    empty_targets: let targets be empty.
    """
    listed = hasattr(examples, "__len__") and hasattr(examples, "__getitem__")  # datasets.Dataset is no Sequence
    if isinstance(examples, (str, Mapping)) or not listed:
        raise TypeError(f"examples: expected a list of mappings, got {type(examples).__name__}")
    if not len(examples):
        raise ValueError("examples: expected at least one, got an empty list")
    checked = []
    for m, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(f"example {m}: expected a mapping with 'input' and 'target', got {type(example).__name__}")
        try:
            row = example_of(example)
            if "history" in row:
                row["history"] = check_history(row["history"])
        except ValueError as error:
            raise ValueError(f"example {m}: {error}") from None
        for number, turn in enumerate(row.get("history", ())):
            _check_characters(turn["content"], f"example {m}: history: message {number}")
        for key, name in zip(("input", "target"), columns_of(example), strict=True):
            if not isinstance(row[key], str):
                raise TypeError(f"example {m}: {name!r}: expected a string, got {type(row[key]).__name__}")
            _check_characters(row[key], f"example {m}: {name!r}")
        if not empty_targets and not row["target"].strip():
            raise ValueError(f"example {m}: expected a target, got an empty string")
        checked.append(row)
    return checked


def _check_characters(text: str, name: str) -> None:
    """Half of a surrogate pair has no UTF-8 form, and tokenizers refuse it without saying where it was."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected text, got a lone surrogate at character {error.start}") from None
