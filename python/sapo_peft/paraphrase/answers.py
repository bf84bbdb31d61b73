"""What a language model is asked, and the strict reading of what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

# More of either in one answer is not an answer to what was asked.
MAX_ANSWER_CHARACTERS = 262_144
MAX_PARAPHRASES = 64
# Prompts shown so that they are not given again; more cost tokens and help little.
_MAX_KNOWN = 10
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


class AnswerFault(ValueError):
    """An answer from which nothing, or only the complete part, can be taken; the message says why."""


@dataclass(frozen=True)
class Request:
    """What is wanted of a source: `wanted` different paraphrases of `original`.

    labels, markers: texts to keep word for word. known: prompts that are there already. number: how often the
    driver has asked before, so that a source which draws at random draws something else.
    """

    original: str
    wanted: int
    labels: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    number: int = 0

    @property
    def tag(self) -> str:
        """The name of the tags around each paraphrase: one that the texts sent do not hold."""
        sent = "\n".join([self.original, *self.known[-_MAX_KNOWN:], *self.labels, *self.markers]).casefold()
        names = ("paraphrase", *(f"paraphrase-{number}" for number in range(2, len(sent) + 3)))
        return next(name for name in names if f"<{name}" not in sent and f"</{name}" not in sent)

    def message(self, wanted: int | None = None) -> str:
        """The text of the one user turn. Parts are joined, never used as a template: braces are text."""
        count, tag = wanted or self.wanted, self.tag
        lines = [
            "Below is an instruction that is given to a language model in front of an input text.",
            f"Write {count} different rewordings of it." if count > 1 else "Write one rewording of it.",
            "A rewording asks for exactly the same thing: nothing is added, left out, explained or answered. "
            "Vary wording, sentence structure and length. Do not follow the instruction yourself.",
        ]
        kept = [*self.labels, *self.markers]
        if kept:
            lines.append("Each rewording must contain these texts exactly as they are written here, one a line:")
            lines += kept
        lines += ["", "The instruction:", self.original, "", "(end of the instruction)"]
        if self.known:
            lines += ["", "Different from these, too, which exist already:"]
            lines += self.known[-_MAX_KNOWN:]
        lines += [
            "",
            f"Begin each rewording with <{tag}> and end it with </{tag}>, each rewording on its own lines, "
            "in the language of the instruction. Write nothing else.",
        ]
        return "\n".join(lines)


def parse_answer(text: str, tag: str, *, cut: bool = False) -> tuple[list[str], str | None]:
    """(paraphrases, why something was left out or None) of one answer.

    An opening tag is the first thing on its line and a closing one the last; between them stands one
    paraphrase. Lines outside are ignored (a greeting), and so is a thinking part in front that is closed. `cut`
    says that the model was stopped: then a paraphrase that is not closed at the end is left out.

    Raises: `AnswerFault` if there is no paraphrase, or a tag stands anywhere else: in text, inside another
    pair, re-spelled or unpaired. An answer that only talks about the tags gives nothing.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise AnswerFault(f"wanted at most {MAX_ANSWER_CHARACTERS} characters, got {len(text)}")
    text = text.lstrip()
    if text.startswith(_THINK_OPEN):
        _, closed, text = text.partition(_THINK_CLOSE)
        if not closed:
            raise AnswerFault("wanted an answer after the thinking, got none")
    opening, closing = f"<{tag}>", f"</{tag}>"
    found: list[str] = []
    start: int | None = None
    problem = None
    # Anything that looks like one of the tags: a re-spelled one is a fault and not a part of the text.
    # Spaces are bounded: without, a megabyte of them would take minutes.
    for match in re.finditer(rf"<\s{{0,9}}/?\s{{0,9}}{re.escape(tag)}\b[^>\n]{{0,20}}>?", text, re.IGNORECASE):
        token = match.group()
        if token not in (opening, closing):
            if cut and token == text[match.start() :]:
                break  # the model was stopped inside a tag
            raise AnswerFault(f"wanted the tags {opening} and {closing}, got {token[:40]!r}")
        if token == opening:
            if start is not None:
                raise AnswerFault(f"wanted {closing} in front of the next {opening}, got none")
            before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
            # Several pairs on one line are as clear as one a line.
            if before.strip() and not (found and before.rstrip().endswith(closing)):
                raise AnswerFault(f"wanted {opening} at the start of a line, got it inside text")
            start = match.end()
            continue
        if start is None:
            raise AnswerFault(f"wanted {opening} in front of {closing}, got none")
        after = text[match.end() :].split("\n", 1)[0].strip()
        if after and not after.startswith(opening):
            raise AnswerFault(f"wanted {closing} at the end of a line, got it inside text")
        inside, start = text[start : match.start()].strip(), None
        if any(character.isalnum() for character in inside):
            found.append(inside)
        else:  # the dots of an example
            problem = f"a pair of {opening} without a word was left out"
        if len(found) > MAX_PARAPHRASES:
            raise AnswerFault(f"wanted at most {MAX_PARAPHRASES} paraphrases, got more")
    if start is not None:
        if not cut:
            raise AnswerFault(f"wanted {closing} at the end, got none")
        problem = "the answer was cut off inside a paraphrase, which is left out"
    if not found:
        raise AnswerFault(problem or f"wanted a text between {opening} and {closing}, got an answer without")
    return found, problem
