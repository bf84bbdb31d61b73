"""What a language model is asked, and the strict reading of what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sapo_kernels.scoring.thoughts import THOUGHT_END, THOUGHT_START

# Prompts shown so that they are not given again; more cost tokens and help little.
_MAX_KNOWN = 10
OPENING, CLOSING = "<paraphrase>", "</paraphrase>"
# Also in another case, with spaces or an attribute. Bounded: without, a megabyte of spaces would take minutes.
_TAG = re.compile(r"(<\s{0,9}/?\s{0,9}paraphrase\b[^<>\n]{0,40}>)", re.IGNORECASE)


class AnswerFault(ValueError):
    """An answer from which nothing can be taken; the message says why."""


@dataclass(frozen=True)
class Request:
    """What a source is asked for: `wanted` different paraphrases of `original`.

    labels, markers: texts to keep word for word. known: prompts that are there already.
    """

    original: str
    wanted: int
    labels: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    known: tuple[str, ...] = ()

    def message(self, count: int) -> str:
        """The text of the one user turn, asking for `count`. Parts are joined, never used as a template."""
        kept = [*self.labels, *self.markers]
        lines = [
            "Below is an instruction that is given to a language model in front of an input text.",
            f"Write {count} different rewordings of it." if count > 1 else "Write one rewording of it.",
            "A rewording asks for exactly the same thing: nothing is added, left out, explained or answered. "
            "Vary wording, sentence structure and length. Do not follow the instruction yourself.",
        ]
        if kept:
            lines += ["Each rewording must contain these texts exactly as they are written here, one a line:", *kept]
        lines += ["", "The instruction:", self.original, "", "(end of the instruction)"]
        if self.known:
            lines += ["", "Different from these, too, which exist already:", *self.known[-_MAX_KNOWN:]]
        lines += [
            "",
            f"Begin each rewording with {OPENING} and end it with {CLOSING}, each rewording on its own lines, "
            "in the language of the instruction. Write nothing else.",
        ]
        return "\n".join(lines)

    def read(self, text: str) -> tuple[list[str], str | None]:
        """(paraphrases, why something was left out or None) in one answer.

        An opening tag is the first thing on its line and a closing one the last; between them stands one
        paraphrase. Lines outside are ignored (a greeting), and so is everything up to the end of the model's last
        thought. A paraphrase that the end of the answer cuts off is left out.

        Raises: `AnswerFault` if there is no paraphrase, a thought does not end, or a tag stands anywhere else: in
        text, inside another pair or unpaired. An answer that only talks about the tags gives nothing.
        """
        parts = _TAG.split(_after_thoughts(text.strip()))
        found, fault = [], None
        # Text, tag, text, tag, ..., text.
        for place in range(1, len(parts), 2):
            tag = CLOSING if "/" in parts[place] else OPENING
            expected = OPENING if place % 4 == 1 else CLOSING
            if tag != expected:
                raise AnswerFault(f"expected {expected} in front of the next {tag}, got none")
            if tag == OPENING and parts[place - 1].rpartition("\n")[2].strip():
                raise AnswerFault(f"expected {tag} at the start of a line, got it inside text")
            if tag == CLOSING and parts[place + 1].partition("\n")[0].strip():
                raise AnswerFault(f"expected {tag} at the end of a line, got it inside text")
            inside = parts[place - 1].strip()
            if tag == CLOSING and any(character.isalnum() for character in inside):
                found.append(inside)
            elif tag == CLOSING:  # the dots of an example
                fault = f"an empty {OPENING} was left out"
        if len(parts) % 4 == 3:
            fault = "the answer was cut off inside a paraphrase, which is left out"
        if not found:
            raise AnswerFault(fault or f"expected a text between {OPENING} and {CLOSING}, got an answer without")
        return found, fault


def _after_thoughts(text: str) -> str:
    end = max((match.end() for match in THOUGHT_END.finditer(text)), default=0)
    if THOUGHT_START.search(text, end):
        raise AnswerFault("expected an answer after the thinking, got none")
    return text[end:].lstrip()
