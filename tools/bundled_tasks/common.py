"""What the task generators share: the source of randomness, the task record and the row loop."""

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

SIZES = {"train": 1000, "dev": 100, "test": 200}


class Draw:
    """Seeded choices built on `random.Random(seed).random()` alone.

    Python promises the same sequence in every version for `random()` only, not for `choice`, `sample` or
    `shuffle`. The data files have to come out byte for byte the same under all of them.
    """

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._random() * n)

    def between(self, low: int, high: int) -> int:
        """An integer in [low, high], both ends included."""
        return low + self.below(high - low + 1)

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return self._random() < p

    def pick(self, items: Sequence[T]) -> T:
        """One item."""
        return items[self.below(len(items))]

    def sample(self, items: Sequence[T], k: int) -> list[T]:
        """k different items in random order (the first k steps of a Fisher-Yates shuffle)."""
        pool = list(items)
        for i in range(k):
            j = i + self.below(len(pool) - i)
            pool[i], pool[j] = pool[j], pool[i]
        return pool[:k]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """All items in random order."""
        return self.sample(items, len(items))


class MadeRow(NamedTuple):
    """One generated row. `key` is its content without the wording; rows with equal keys are duplicates."""

    key: object
    sentence: str
    label: str


@dataclasses.dataclass(frozen=True)
class TaskRecipe:
    """A bundled task: how to make a row. Its prompts are in instructions.json and paraphrases.json, written by hand."""

    name: str
    seed: int
    make_row: Callable[[Draw, int], MadeRow]


def normal(text: str) -> str:
    """Lower case with single spaces: the form in which texts are compared for duplicates."""
    return " ".join(text.lower().split())


def listed(words: str) -> list[str]:
    """The words of a text, or its parts if it has commas: for lists that would fill a page with one quoted a line."""
    return words.split(", ") if "," in words else words.split()


def upper_first(text: str) -> str:
    """The text with its first letter in upper case and the rest untouched."""
    return text[:1].upper() + text[1:]


def make_splits(task: TaskRecipe) -> dict[str, list[dict[str, str]]]:
    """All rows of a task, by split.

    `make_row(draw, index)` may use the index to balance labels or kinds of row: a split is a run of
    consecutive indices, shuffled afterwards. No key and no normalised sentence occurs twice in all.
    """
    draw = Draw(task.seed)
    total = sum(SIZES.values())
    rows: list[dict[str, str]] = []
    seen: set[object] = set()
    for _ in range(50 * total):
        if len(rows) == total:
            break
        key, sentence, label = task.make_row(draw, len(rows))
        text = normal(sentence)
        if key in seen or text in seen:
            continue
        seen.update((key, text))
        rows.append({"sentence": sentence, "label": label})
    else:
        raise RuntimeError(f"{task.name}: only {len(rows)} different rows of {total}; add words or templates")
    splits, start = {}, 0
    for split, size in SIZES.items():
        splits[split] = draw.shuffled(rows[start : start + size])
        start += size
    return splits
