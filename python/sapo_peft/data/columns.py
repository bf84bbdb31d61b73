"""Which columns of a table make an example, and how: input, target, and what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapo_kernels.files import DataError, excerpt
from sapo_kernels.scoring import turns

from .tables import Table, keys_of, shown

# Taken as they are where both are there; else exactly one of each list.
PAIRS = (*turns.PAIRS, ("input", "output"))
INPUTS = ("input", "sentence", "text", "question", "prompt")
TARGETS = ("target", "label", "output", "answer", "answerKey", "completion", "response")
# Columns of conversations; those of ShareGPT have turns of "from" and "value".
MESSAGES, SHAREGPT = "messages", "conversations"
_ROLES = {"human": "user", "gpt": "assistant"}
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
        found = _pair(names, chosen, place)
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

    def talk(self, row: Any, place: str) -> dict[str, Any] | None:
        """A row of messages as an example with the turns before its input; None for a row of texts."""
        if not isinstance(row, Mapping) or not isinstance(row.get(self.input), list):
            return None
        talk = {name: row.get(name) for name in self.used}
        if self.input == SHAREGPT:
            talk = {MESSAGES: [_turn(turn) for turn in row[SHAREGPT]]}
        try:
            return turns.example_of(talk)
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None

    def read(self, row: Any, place: str) -> tuple[str, list[str]]:
        """Input text and the target texts (several only where an ``output`` list holds several) of one row."""
        for column in self.used:
            if column not in keys_of(row, place):
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
        return text, [self._label(one, letters, where) for one in targets]

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


def _pair(names: list[str], chosen: tuple[str | None, str | None], place: str) -> tuple[str, str]:
    for pair in PAIRS:
        if chosen == (None, None) and set(pair) <= set(names):
            return pair
    for talk in (MESSAGES, SHAREGPT):
        if talk in names and chosen in ((None, None), (talk, None)):
            return talk, talk
    result = []
    for what, column, known in zip(("input", "target"), chosen, (INPUTS, TARGETS), strict=True):
        found = [name for name in ([column] if column else known) if name in names and (column or name not in chosen)]
        if not found and what == "input" and not column and "instruction" in names:
            found = ["instruction"]
        if len(found) != 1:
            expected = excerpt(column) if column else f"(exactly one of {', '.join(known)})"
            raise DataError(f"{place}: expected the {what} column {expected}, got the columns {shown(names)}")
        result += found
    if result[0] == result[1]:
        raise DataError(f"{place}: expected two different columns, got {excerpt(result[0])} for both")
    return result[0], result[1]


def _turn(turn: Any) -> Any:
    """A turn of ShareGPT as that of a message; any other as it is."""
    if not isinstance(turn, Mapping) or "from" not in turn:
        return turn
    return {"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn.get("value")}


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
