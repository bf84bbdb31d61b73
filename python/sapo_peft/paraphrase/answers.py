"""What a language model is asked, and the strict reading of what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sapo_kernels.scoring.thoughts import THOUGHT_END, THOUGHT_START

# More of either in one answer is not an answer to what was asked.
MAX_ANSWER_CHARACTERS = 262_144
MAX_PARAPHRASES = 64
# Prompts shown so that they are not given again; more cost tokens and help little.
_MAX_KNOWN = 10


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

    @property
    def tag(self) -> str:
        """The name of the tags around each paraphrase: one that the texts sent do not hold."""
        sent = "\n".join([self.original, *self.known[-_MAX_KNOWN:], *self.labels, *self.markers]).casefold()
        names = ("paraphrase", *(f"paraphrase-{number}" for number in range(2, len(sent) + 3)))
        return next(name for name in names if f"<{name}" not in sent and f"</{name}" not in sent)

    def message(self, count: int) -> str:
        """The text of the one user turn, asking for `count`. Parts are joined, never used as a template."""
        tag, kept = self.tag, [*self.labels, *self.markers]
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
            f"Begin each rewording with <{tag}> and end it with </{tag}>, each rewording on its own lines, "
            "in the language of the instruction. Write nothing else.",
        ]
        return "\n".join(lines)

    def read(self, text: str, *, cut: bool = False) -> tuple[list[str], str | None]:
        """(paraphrases, why something was left out or None) in one answer.

        An opening tag is the first thing on its line and a closing one the last; between them stands one
        paraphrase. Lines outside are ignored (a greeting), and so is everything up to the end of the model's last
        thought. `cut` says that the model was stopped: a paraphrase that is not closed is then left out.

        Raises: `AnswerFault` if there is no paraphrase, a thought does not end, or a tag stands anywhere else: in
        text, inside another pair, re-spelled or unpaired. An answer that only talks about the tags gives nothing.
        """
        if len(text) > MAX_ANSWER_CHARACTERS:
            raise AnswerFault(f"expected at most {MAX_ANSWER_CHARACTERS} characters, got {len(text)}")
        opening, closing = f"<{self.tag}>", f"</{self.tag}>"
        text = self._after_thoughts(text.strip(), opening, closing)
        found: list[str] = []
        start: int | None = None
        problem = None
        # Anything that looks like one of the tags: a re-spelled one is a fault and not a part of the text.
        # Spaces are bounded: without, a megabyte of them would take minutes.
        spelt = rf"<\s{{0,9}}/?\s{{0,9}}{re.escape(self.tag)}\b[^>\n]{{0,20}}>?"
        for match in re.finditer(spelt, text, re.IGNORECASE):
            token = match.group()
            if token not in (opening, closing):
                if cut and match.end() == len(text):
                    break  # the model was stopped inside a tag
                raise AnswerFault(f"expected the tags {opening} and {closing}, got {token[:40]!r}")
            if token == opening:
                if start is not None:
                    raise AnswerFault(f"expected {closing} in front of the next {opening}, got none")
                before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
                # Several pairs on one line are as clear as one a line.
                if before and not (found and before.endswith(closing)):
                    raise AnswerFault(f"expected {opening} at the start of a line, got it inside text")
                start = match.end()
                continue
            if start is None:
                raise AnswerFault(f"expected {opening} in front of {closing}, got none")
            after = text[match.end() : match.end() + 99].split("\n", 1)[0].strip()
            if after and not after.startswith(opening):
                raise AnswerFault(f"expected {closing} at the end of a line, got it inside text")
            inside, start = text[start : match.start()].strip(), None
            if any(character.isalnum() for character in inside):
                found.append(inside)
            else:  # the dots of an example
                problem = f"a pair of {opening} without a word was left out"
            if len(found) > MAX_PARAPHRASES:
                raise AnswerFault(f"expected at most {MAX_PARAPHRASES} paraphrases, got more")
        if start is not None:
            if not cut:
                raise AnswerFault(f"expected {closing} at the end, got none")
            problem = "the answer was cut off inside a paraphrase, which is left out"
        if not found:
            raise AnswerFault(problem or f"expected a text between {opening} and {closing}, got an answer without")
        return found, problem

    def _after_thoughts(self, text: str, opening: str, closing: str) -> str:
        seen = text
        if THOUGHT_END.search(self.original) or THOUGHT_START.search(self.original):
            # Rewordings of a text with such marks hold them too: those inside a whole pair are no thoughts.
            pair = rf"{opening}(?:(?!{opening}|{closing}).)*+{closing}"
            seen = re.sub(pair, lambda match: " " * len(match.group()), text, flags=re.DOTALL)
        end = 0
        for match in THOUGHT_END.finditer(seen):
            end = match.end()
        if THOUGHT_START.search(seen, end):
            raise AnswerFault("expected an answer after the thinking, got none")
        return text[end:].lstrip()
