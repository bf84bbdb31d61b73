"""Which columns of a table make an example, and how: input, target, and what stands beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sapo_kernels.files import DataError, excerpt
from sapo_kernels.scoring import turns

from .tables import Table, shown

CHOICES = ("choices", "options")
_WORD = re.compile(r"\w")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Beside(NamedTuple):
    """What stands beside a row's input, and whether it is in that already."""

    head: str = ""
    below: str = ""
    head_inside: bool = True
    below_inside: bool = True


@dataclass(frozen=True)
class Columns:
    """The columns of one table: `instruction` (of Alpaca rows) is joined in front of the input, `choices` below it."""

    input: str
    target: str
    instruction: str | None = None
    choices: str | None = None
    label_name: Callable[[int], str] | None = None

    @classmethod
    def of(cls, table: Table, chosen: tuple[str | None, str | None], place: str) -> Columns:
        """Those `chosen`, the others recognised by name; several candidates are an error, never a guess."""
        names = table.columns
        try:
            found = turns.columns_of(names, chosen)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        rest = [name for name in names if name not in found]
        return cls(
            *found,
            "instruction" if "instruction" in rest else None,
            next((name for name in CHOICES if name in rest), None),
            table.label_names.get(found[1]),
        )

    @property
    def used(self) -> list[str]:
        """Every column that goes into an example."""
        return [name for name in (self.input, self.target, self.instruction, self.choices) if name]

    def read(self, row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str], Beside]:
        """One row as an example, with the turns before its input; its target texts; and what `join` puts to its input.

        The targets are several only where an ``output`` list holds several.
        """
        history = row.get("history")
        try:
            if self.input in turns.MESSAGES or isinstance(row.get(self.input), list):
                example = turns.example_of({name: row.get(name) for name in (self.input, self.target)})
                if "history" in example:
                    return example, [example["target"]], Beside()
            messages = isinstance(history, list) and history and isinstance(history[0], Mapping)
            before = {"history": turns.check_history(history)} if messages else {}
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        for column in self.used:
            if column not in row:
                got = shown(list(row)) or "an empty object"
                raise DataError(f"{place}: expected the field {excerpt(column)}, got {got}")
        text = check_text(row[self.input], f"{place}: {excerpt(self.input)}")
        beside, letters = Beside(), []
        if self.instruction:
            head = check_text(row[self.instruction], f"{place}: {excerpt(self.instruction)}")
            beside = beside._replace(head=head, head_inside=_stands_in(head, text))
        if self.choices:
            letters, texts = _choices(row[self.choices], f"{place}: {excerpt(self.choices)}")
            below = "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, texts, strict=True))
            beside = beside._replace(below=below, below_inside=all(_stands_in(choice, text) for choice in texts))
        target = row[self.target]
        targets = target if isinstance(target, list) and self.target == "output" else [target]
        if not targets:
            raise DataError(f"{place}: expected a label in {excerpt(self.target)}, got an empty list")
        where = f"{place}: {excerpt(self.target)}"
        targets = [self._label(one, letters, where) for one in targets]
        return {"input": text, "target": targets[0], **before}, targets, beside

    def join(self, examples: Sequence[dict[str, Any]], beside: Sequence[Beside]) -> list[str]:
        """Put what stands beside the inputs into them, of all rows or of none: they read alike. Notes of what was done.

        Some files hold the whole text in one column and its parts in others; in a few rows it may look so by chance.
        """
        heads, below = not all(one.head_inside for one in beside), not all(one.below_inside for one in beside)
        for example, one in zip(examples, beside, strict=True):
            if heads and one.head:
                text = example["input"]
                example["input"] = f"{one.head}\n\n{text}" if text.strip() else one.head
            if below:
                example["input"] += one.below
        done = (
            (heads, f"each row's {excerpt(self.instruction)} is put in front of its {excerpt(self.input)}"),
            (below, f"each row's {excerpt(self.choices)} are put below its {excerpt(self.input)}"),
        )
        return [note for put, note in done if put]

    def _label(self, value: Any, letters: list[str], place: str) -> str:
        if not isinstance(value, int) or isinstance(value, bool):
            return check_text(value, place)
        if self.label_name is not None:
            # Datasets mark rows without a label by -1.
            return "" if value == -1 else self.label_name(value)
        if letters and not 0 <= value < len(letters):
            raise DataError(f"{place}: expected the index of one of {len(letters)} choices, got {value}")
        return letters[value] if letters else str(value)

    def notes(self, unused: Sequence[str], numbers: bool) -> list[str]:
        """What is to be known of columns that go into no input."""
        notes = []
        if unused:
            notes.append(f"unused text columns: {shown(unused)}")
        if numbers and self.label_name is None and not self.choices:
            notes.append(f"{excerpt(self.target)} holds numbers, taken as text")
        return notes


def _stands_in(part: str, text: str) -> bool:
    """Whether `part` is in `text` as words of its own."""
    part, at = part.strip(), -1
    # No pattern of its own for each part: there are as many as rows.
    while part and (at := text.find(part, at + 1)) >= 0:
        if not _WORD.search(text[max(at - 1, 0) : at] + text[at + len(part) : at + len(part) + 1]):
            return True
    return not part


def _choices(value: Any, place: str) -> tuple[list[str], list[str]]:
    """(letters, texts) of a list of texts, of ``{"label": [...], "text": [...]}``, or of ``{"A": text, ...}``."""
    if isinstance(value, dict):
        pair = value.get("label"), value.get("text")
        letters, texts = pair if all(isinstance(one, list) for one in pair) else map(list, (value, value.values()))
    else:
        letters, texts = list(_LETTERS[: len(value)]) if isinstance(value, list) else [], value
    if not isinstance(texts, list) or not texts or len(texts) != len(letters):
        expected = f"1 to {len(_LETTERS)} choices, each with a letter"
        raise DataError(f"{place}: expected {expected}, got {excerpt(value)}")
    for text in (*letters, *texts):
        check_text(text, place)
    return letters, texts


def check_text(value: Any, place: str) -> str:
    """`value` if it is a text."""
    if not isinstance(value, str):
        raise DataError(f"{place}: expected text, got {type(value).__name__} {excerpt(value)}")
    return value
