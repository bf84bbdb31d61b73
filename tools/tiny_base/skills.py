"""What the tiny base learns before it meets the tasks of the sequences: small skills, each made by a seeded generator.

Most of them put another question to an input of the kind that a bundled task has: who does something in a sentence that
could be put into the passive, what the heading of a list with an odd word is, whether a product note has a complaint
in it. So the input does not give away what is wanted, and a model that is trained on these has to read the instruction.

A skill has an answer-format line and several imperative wordings. `FRAMES` turns every wording into eight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tools.bundled_tasks import (
    tasks_extract as _tasks_extract,
)
from tools.bundled_tasks import (
    tasks_odd_one as _tasks_odd_one,
)
from tools.bundled_tasks import (
    tasks_passive as _tasks_passive,
)
from tools.bundled_tasks import (
    tasks_polarity as _tasks_polarity,
)
from tools.bundled_tasks.common import Draw, upper_first

WORDS = _tasks_odd_one.WORDS
ALL_WORDS = tuple(word for words in WORDS.values() for word in words)

# Parts before and after an imperative that starts in lower case and has no full stop.
FRAMES = (
    ("", "."),
    ("Please ", "."),
    ("Task: ", "."),
    ("Read the text below and ", "."),
    ("Your job is to ", ", nothing else."),
    ("I would like you to ", "."),
    ("Could you ", "?"),
    ("What you have to do:\n- ", ""),
)


class Skill(NamedTuple):
    """`make(draw)` returns (input, answer)."""

    suffix: str
    wordings: tuple[str, ...]
    make: Callable[[Draw], tuple[str, str]]

    def instructions(self) -> list[str]:
        """Every wording in every frame; one that opens a text starts with a capital letter."""
        return [
            before + (text if before else upper_first(text)) + after
            for text in self.wordings
            for before, after in FRAMES
        ]


def _listed(draw: Draw, words: list[str]) -> str:
    """The words as one line or as a list, in one of four layouts."""
    return draw.pick(
        (
            ", ".join(words),
            "Words: " + ", ".join(words),
            "\n".join("- " + word for word in words),
            "A list: " + " / ".join(words),
        )
    )


def _first(draw: Draw) -> tuple[str, str]:
    words = draw.sample(ALL_WORDS, draw.between(3, 6))
    return _listed(draw, words), words[0]


def _last(draw: Draw) -> tuple[str, str]:
    words = draw.sample(ALL_WORDS, draw.between(3, 6))
    return _listed(draw, words), words[-1]


def _repeat(draw: Draw) -> tuple[str, str]:
    words = draw.sample(ALL_WORDS, draw.between(2, 6))
    return _listed(draw, words), ", ".join(words)


def _without_last(draw: Draw) -> tuple[str, str]:
    words = draw.sample(ALL_WORDS, draw.between(3, 6))
    return _listed(draw, words), ", ".join(words[:-1])


def _group(draw: Draw) -> tuple[str, str]:
    group = draw.pick(list(WORDS))
    return _listed(draw, draw.sample(WORDS[group], draw.between(1, 4))), group


def _row(task, draw: Draw):
    """A row of a bundled task's generator."""
    return task.make_row(draw, draw.below(12))


def _heading(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_odd_one, draw)
    return row.sentence, row.key[0]


def _in_order(row) -> list[str]:
    """The five words of a row of the odd-one-out task, as they follow each other in its text."""
    # Longer words first: "eel" may stand inside "wheel".
    text, places = row.sentence, {}
    for word in sorted(row.key[1], key=len, reverse=True):
        places[word] = text.index(word)
        text = text.replace(word, "#" * len(word), 1)
    return sorted(places, key=places.__getitem__)


def _first_listed(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_odd_one, draw)
    return row.sentence, _in_order(row)[0]


def _last_listed(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_odd_one, draw)
    return row.sentence, _in_order(row)[-1]


def _field(draw: Draw) -> tuple[str, str]:
    index = draw.below(len(_tasks_extract.FIELDS))
    return _tasks_extract.make_row(draw, index).sentence, _tasks_extract.FIELDS[index]


def _message_start(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_extract, draw)
    return row.sentence, " ".join(row.key.split()[:2])


def _doer(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_passive, draw)
    return row.sentence, row.key[0]


def _thing(draw: Draw) -> tuple[str, str]:
    row = _row(_tasks_passive, draw)
    return row.sentence, row.key[2]


def _same(draw: Draw) -> tuple[str, str]:
    sentence = _row(_tasks_passive, draw).sentence
    return sentence, sentence


def _note(answer: Callable[[str], str]) -> Callable[[Draw], tuple[str, str]]:
    def make(draw: Draw) -> tuple[str, str]:
        row = _row(_tasks_polarity, draw)
        return row.sentence, answer(row.label)

    return make


SKILLS: dict[str, Skill] = {
    "first": Skill(
        "Directly output only the first word.",
        (
            "give the first word",
            "name the word that comes first",
            "write down what stands at the start of the list",
            "find the opening word of the list",
            "return item number one",
        ),
        _first,
    ),
    "last": Skill(
        "Directly output only the last word.",
        (
            "give the last word",
            "name the word that comes last",
            "write down what stands at the end of the list",
            "find the closing word of the list",
            "return the final item",
        ),
        _last,
    ),
    "repeat": Skill(
        "Directly output only the words, separated by a comma and a space.",
        (
            "repeat the words as they are",
            "copy all words in the same order",
            "write the list again without any change",
            "say the words once more",
            "give back exactly what is there",
        ),
        _repeat,
    ),
    "without_last": Skill(
        "Directly output only the words that are left, separated by a comma and a space.",
        (
            "leave out the last word",
            "drop the final item and keep the others",
            "remove the word at the end",
            "give all words except the last one",
            "cut off the end of the list",
        ),
        _without_last,
    ),
    "group": Skill(
        "Directly output only the name of the group.",
        (
            "name the group of these words",
            "tell what kind of thing this is",
            "say which category fits",
            "find the heading for the words",
            "state the class that they belong to",
        ),
        _group,
    ),
    "heading": Skill(
        "Directly output only the name of the group.",
        (
            "give the name of the group",
            "say what the heading is",
            "copy the title of the list",
            "tell which category is mentioned",
            "find the theme of the five words",
        ),
        _heading,
    ),
    "first_listed": Skill(
        "Directly output only the first word of the five.",
        (
            "give the first of the five words",
            "name the word that opens the list",
            "say which of the words is listed first",
            "pick the word right at the start of the five",
            "return the top entry",
        ),
        _first_listed,
    ),
    "last_listed": Skill(
        "Directly output only the last word of the five.",
        (
            "give the last of the five words",
            "name the word that closes the list",
            "say which of the words is listed last",
            "pick the word right at the end of the five",
            "return the bottom entry",
        ),
        _last_listed,
    ),
    "field": Skill(
        "Directly output only city, date, amount or name.",
        (
            "say which field is asked for",
            "name the field, not its value",
            "tell what kind of detail is wanted",
            "repeat the field that somebody is looking for",
            "classify the request by its field",
        ),
        _field,
    ),
    "message_start": Skill(
        "Directly output only the first two words of the message.",
        (
            "give the first two words of the message",
            "quote how the message begins",
            "copy the opening of the message",
            "tell with which two words the message starts",
            "write down the beginning of the message",
        ),
        _message_start,
    ),
    "doer": Skill(
        "Directly output only the doer.",
        (
            "tell who does something in the sentence",
            "find the subject of the sentence",
            "name the one who acts",
            "say who did it",
            "give the doer",
        ),
        _doer,
    ),
    "thing": Skill(
        "Directly output only the thing that is acted on.",
        (
            "name the object of the sentence",
            "say what the action is done to",
            "find what is acted on",
            "give the thing that something happens to",
            "tell what the verb acts on",
        ),
        _thing,
    ),
    "same": Skill(
        "Directly output only the sentence.",
        (
            "copy the sentence",
            "repeat the sentence word for word",
            "leave the sentence in the active voice",
            "write the sentence again without any change",
            "give back the same sentence",
        ),
        _same,
    ),
    "recommended": Skill(
        "Directly output only yes or no.",
        (
            "say yes if the writer is entirely happy and no otherwise",
            "tell if this buyer would recommend the product without reserve",
            "decide whether the note is free of complaints",
            "answer yes for a note with praise only",
            "check that nothing is wrong with the product",
        ),
        _note(lambda label: "yes" if label == "positive" else "no"),
    ),
    "praised": Skill(
        "Directly output only praise or none.",
        (
            "say praise if anything is praised, otherwise none",
            "look for a good point in the note and say praise or none",
            "decide between praise and none",
            "tell whether something is liked: praise or none",
            "check for approval, with the answer praise or none",
        ),
        _note(lambda label: "none" if label == "negative" else "praise"),
    ),
    "complained": Skill(
        "Directly output only complaint or none.",
        (
            "say complaint if anything is criticised, otherwise none",
            "look for a bad point in the note and say complaint or none",
            "decide between complaint and none",
            "tell whether something is disliked: complaint or none",
            "check for criticism, with the answer complaint or none",
        ),
        _note(lambda label: "none" if label == "positive" else "complaint"),
    ),
}
