"""One value of a JSON file and where it stands, so that every refusal names the file, the place, wanted and got."""

from __future__ import annotations

import math
import os
from typing import Any, NoReturn

from sapo_kernels.files import DataError, excerpt, read_json


class Node:
    """A JSON value of a file, read by what is wanted of it; anything else raises `DataError`.

    Attributes: value, as `json` gives it; place, the file and the keys that lead to the value.
    """

    def __init__(self, value: Any, place: str):
        self.value, self.place = value, place

    @classmethod
    def read(cls, path: str | os.PathLike, max_bytes: int) -> Node:
        """The document in a file of at most `max_bytes` bytes."""
        return cls(read_json(path, max_bytes=max_bytes), os.fspath(path))

    def fail(self, wanted: str) -> NoReturn:
        raise DataError(f"{self.place}: wanted {wanted}, got {excerpt(self.value)}")

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        return self.value

    def __getitem__(self, key: str) -> Node:
        """The value of a key that has to be there."""
        if key not in self.object():
            raise DataError(f"{self.place}: wanted the key {excerpt(key)}, got {excerpt(sorted(self.value))}")
        return self.get(key)

    def get(self, key: str) -> Node:
        """The value of a key, null where the key is missing."""
        return Node(self.object().get(key), f"{self.place}: {excerpt(key)}")

    def null(self) -> bool:
        return self.value is None

    def items(self, least: int = 0, most: int | None = None, length: int | None = None) -> list[Node]:
        """The entries of a list with `least` to `most` entries, or exactly `length`."""
        if not isinstance(self.value, list):
            self.fail("a list")
        if length is not None:
            least = most = length
        size = len(self.value)
        if size < least or (most is not None and size > most):
            wanted = f"{length} entries" if length is not None else f"{least} to {most} entries"
            raise DataError(f"{self.place}: wanted {wanted}, got {size}")
        return [Node(value, f"{self.place} {index}") for index, value in enumerate(self.value)]

    def text(self, most: int | None = None) -> str:
        """A string of at most `most` characters."""
        if not isinstance(self.value, str):
            self.fail("text")
        if most is not None and len(self.value) > most:
            raise DataError(f"{self.place}: wanted at most {most} characters, got {len(self.value)}")
        return self.value

    def one_of(self, *values: Any) -> Any:
        # `True == 1`: the kind has to agree too.
        if not any(type(self.value) is type(value) and self.value == value for value in values):
            self.fail(" or ".join(map(excerpt, values)))
        return self.value

    def integer(self, low: int | None = None, high: int | None = None) -> int:
        if type(self.value) is not int:
            self.fail("a whole number")
        return self._within(low, high)

    def number(self, low: float | None = None, high: float | None = None) -> float:
        """A finite number, as a float."""
        if type(self.value) not in (int, float):
            self.fail("a number")
        try:
            value = float(self._within(low, high))
        except OverflowError:
            self.fail("a number that a float holds")
        if not math.isfinite(value):
            self.fail("a finite number")
        return value

    def maybe(self, low: float | None = None, high: float | None = None) -> float | None:
        """A number or null."""
        return None if self.value is None else self.number(low, high)

    def _within(self, low: float | None, high: float | None) -> Any:
        if (low is not None and self.value < low) or (high is not None and self.value > high):
            upper = f" and at most {high}" if high is not None else ""
            self.fail(f"at least {low}{upper}" if low is not None else f"at most {high}")
        return self.value
