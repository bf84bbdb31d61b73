"""The texts the tiny base is trained on, drawn with a seed: skills, two bundled tasks, and a taste of the other four.

Three kinds of text:

- the skills of `skills.py`, under all their wordings;
- `BACKGROUND`, the bundled tasks that are in no sequence, all training rows under the instruction and all paraphrases;
- `SEQUENCE`, the four tasks of the sequences, only in the last part of the training: `TASTE_ROWS` rows each, which no
  sequence trains on, under `KNOWN_WORDINGS` of the 21 wordings, drawn for each task, the r-th of them with weight 1/r.

So the base half knows each of those tasks, and some of its wordings better than others, as a large model does whose
training texts held one way of asking more often than another. The original instruction is known in one of the four
tasks, drawn as well: six of 21 wordings in each of four tasks hold it 1.14 times on average.

Four texts in five go without the answer-format line, which names the task whatever the instruction says: a base that
always had it would not read instructions, and would like all wordings alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import NamedTuple

from sapo_peft.assets import BUNDLED_DIR
from sapo_peft.tiny_base import TASTE_ROWS
from tools.bundled_tasks.common import Draw
from tools.tiny_base.skills import SKILLS, Skill

SEQUENCE = (
    "task01_product_note_polarity",
    "task02_odd_one_out",
    "task03_message_field",
    "task04_active_to_passive",
)
BACKGROUND = ("task05_arithmetic_stories", "task06_order_items")
KNOWN_WORDINGS = 6
SUFFIX_SHARE = 0.2
BACKGROUND_SHARE = 0.08


class Text(NamedTuple):
    """One training text before rendering."""

    instruction: str
    suffix: str
    input: str
    target: str


class BundledTask(NamedTuple):
    """A bundled task: the original instruction and its paraphrases, the answer line, the training rows."""

    wordings: list[str]
    suffix: str
    rows: list[dict[str, str]]


def bundled(name: str) -> BundledTask:
    """Wordings (the original first), suffix and training rows of a bundled task."""

    def read(path: str):
        return json.loads((BUNDLED_DIR / path).read_text(encoding="utf-8"))

    entry = read("SUPERNI/instructions.json")[name]
    wordings = [entry["instruction"], *read("paraphrases.json")[name]]
    return BundledTask(wordings, entry["suffix"], read(f"SUPERNI/{name}/train.json"))


def known_wordings(seed: int) -> dict[str, list[int]]:
    """For each sequence task the indices of the wordings that the base has met, the most frequent first."""
    draw = Draw(seed)
    knows_original = draw.pick(SEQUENCE)
    known = {}
    for name in SEQUENCE:
        paraphrases = range(1, len(bundled(name).wordings))
        chosen = draw.sample(paraphrases, KNOWN_WORDINGS)
        if name == knows_original:
            chosen[draw.below(KNOWN_WORDINGS)] = 0
        known[name] = chosen
    return known


def _weighted(draw: Draw, items: list[int]) -> int:
    """The r-th item (from 1) with a probability proportional to 1/r."""
    weights = [1 / rank for rank in range(1, len(items) + 1)]
    left = draw.below(10**6) / 10**6 * sum(weights)
    for item, weight in zip(items, weights, strict=True):
        left -= weight
        if left < 0:
            return item
    return items[-1]


class Corpus:
    """Draws texts: `texts(n, taste)` yields `n`, of which a share `taste` is from the sequence tasks."""

    def __init__(self, seed: int):
        self.seed, self.draw = seed, Draw(seed)
        self.skills: list[tuple[Skill, list[str]]] = [(skill, skill.instructions()) for skill in SKILLS.values()]
        self.background = [bundled(name) for name in BACKGROUND]
        self.sequence = []
        for name, known in known_wordings(seed).items():
            task = bundled(name)
            self.sequence.append((task._replace(rows=task.rows[-TASTE_ROWS:]), known))

    def texts(self, count: int, taste: float) -> Iterator[Text]:
        for _ in range(count):
            if self.draw.chance(taste):
                task, known = self.draw.pick(self.sequence)
                row, wording = self.draw.pick(task.rows), task.wordings[_weighted(self.draw, known)]
                text = Text(wording, task.suffix, row["sentence"], row["label"])
            elif self.draw.chance(BACKGROUND_SHARE):
                task = self.draw.pick(self.background)
                row = self.draw.pick(task.rows)
                text = Text(self.draw.pick(task.wordings), task.suffix, row["sentence"], row["label"])
            else:
                skill, instructions = self.draw.pick(self.skills)
                source, target = skill.make(self.draw)
                text = Text(self.draw.pick(instructions), skill.suffix, source, target)
            yield text if self.draw.chance(SUFFIX_SHARE) else text._replace(suffix="")

    def vocabulary_texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: every wording and suffix once, and inputs of every kind."""
        for _ in range(300):
            yield from ("user", "assistant", "Text:", "Read the text below")
        for skill, instructions in self.skills:
            yield from skill.wordings
            yield from instructions[: len(skill.wordings)]
            yield skill.suffix
        for name in (*SEQUENCE, *BACKGROUND):
            task = bundled(name)
            yield from task.wordings
            yield task.suffix
            for row in task.rows[-TASTE_ROWS:]:
                yield from (row["sentence"], row["label"])
        draw = Draw(self.seed + 1)
        for skill, _ in self.skills:
            for _ in range(60):
                yield from skill.make(draw)


def texts_digest(seed: int) -> str:
    """SHA-256 (hex) of the first training texts, with and without the tasks of the sequences.

    The shipped base is compared by this and by its preset: its code may be tidied, its texts may not change.
    """
    corpus = Corpus(seed)
    texts = [list(text) for share in (0.0, 1.0) for text in corpus.texts(300, share)]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()
