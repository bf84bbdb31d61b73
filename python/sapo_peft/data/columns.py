"""Which columns of a table make an example, and how: input, target, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo_kernels.files import DataError, excerpt
from sapo_kernels.scoring import turns

from .tables import Table, shown

CHOICES = ("choices", "options")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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

    def read(self, row: Mapping[str, Any], place: str) -> tuple[dict[str, Any], list[str]]:
        """One row as an example, with the turns before its input, and its target texts.

        These are several only where an ``output`` list holds several.
        """
        history = row.get("history")
        try:
            if self.input in turns.MESSAGES or isinstance(row.get(self.input), list):
                example = turns.example_of({name: row.get(name) for name in (self.input, self.target)})
                if "history" in example:
                    return example, [example["target"]]
            messages = isinstance(history, list) and history and isinstance(history[0], Mapping)
            before = {"history": turns.check_history(history)} if messages else {}
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
        for column in self.used:
            if column not in row:
                got = shown(list(row)) or "an empty object"
                raise DataError(f"{place}: expected the field {excerpt(column)}, got {got}")
        text = check_text(row[self.input], f"{place}: {excerpt(self.input)}")
        if self.instruction:
            head = check_text(row[self.instruction], f"{place}: {excerpt(self.instruction)}")
            # Some files hold the whole text in one column and its parts in others.
            if head not in text:
                text = f"{head}\n\n{text}" if text.strip() else head
        letters: list[str] = []
        if self.choices:
            letters, texts = _choices(row[self.choices], f"{place}: {excerpt(self.choices)}")
            if not all(choice in text for choice in texts):
                text += "".join(f"\n{letter}. {choice}" for letter, choice in zip(letters, texts, strict=True))
        target = row[self.target]
        targets = target if isinstance(target, list) and self.target == "output" else [target]
        if not targets:
            raise DataError(f"{place}: expected a label in {excerpt(self.target)}, got an empty list")
        where = f"{place}: {excerpt(self.target)}"
        targets = [self._label(one, letters, where) for one in targets]
        return {"input": text, "target": targets[0], **before}, targets

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
        """What was done with columns other than input and target."""
        notes = []
        if self.instruction:
            notes.append(f"each row's {excerpt(self.instruction)} is put in front of its {excerpt(self.input)}")
        if self.choices:
            notes.append(f"each row's {excerpt(self.choices)} are put below its {excerpt(self.input)}")
        if unused:
            notes.append(f"unused text columns: {shown(unused)}")
        if numbers and self.label_name is None and not self.choices:
            notes.append(f"{excerpt(self.target)} holds numbers, taken as text")
        return notes


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
