"""What the tiny base learns before it meets the tasks of the sequences: small skills, each made by a seeded generator.

Most of them put another question to an input of the kind that a bundled task has: who does something in a sentence that
could be put into the passive, what the heading of a list with an odd word is, whether a product note has a complaint
in it. So the input does not give away what is wanted, and a model that is trained on these has to read the instruction.

A skill has an answer-format line and several imperative wordings. `FRAMES` turns every wording into eight.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from tools.bundled_tasks import tasks_extract as extract
from tools.bundled_tasks import tasks_odd_one as odd_one
from tools.bundled_tasks import tasks_passive as passive
from tools.bundled_tasks import tasks_polarity as polarity
from tools.bundled_tasks.common import Draw, MadeRow, upper_first

ALL_WORDS = tuple(word for words in odd_one.WORDS.values() for word in words)

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


Make = Callable[[Draw], tuple[str, str]]


def _words(low: int, high: int, answer: Callable[[list[str]], str]) -> Make:
    """A list of `low` to `high` words, and what `answer` takes of it."""

    def make(draw: Draw) -> tuple[str, str]:
        words = draw.sample(ALL_WORDS, draw.between(low, high))
        return _listed(draw, words), answer(words)

    return make


def _row(task: ModuleType, answer: Callable[[MadeRow], str]) -> Make:
    """A row of a bundled task's generator with another answer."""

    def make(draw: Draw) -> tuple[str, str]:
        row = task.make_row(draw, draw.below(12))
        return row.sentence, answer(row)

    return make


def _group(draw: Draw) -> tuple[str, str]:
    group = draw.pick(list(odd_one.WORDS))
    return _listed(draw, draw.sample(odd_one.WORDS[group], draw.between(1, 4))), group


def _field(draw: Draw) -> tuple[str, str]:
    index = draw.below(len(extract.FIELDS))
    return extract.make_row(draw, index).sentence, extract.FIELDS[index]


def _in_order(row: MadeRow) -> list[str]:
    """The five words of a row of the odd-one-out task, as they follow each other in its text."""
    # Longer words first: "eel" may stand inside "wheel".
    text, places = row.sentence, {}
    for word in sorted(row.key[1], key=len, reverse=True):
        places[word] = text.index(word)
        text = text.replace(word, "#" * len(word), 1)
    return sorted(places, key=places.__getitem__)


MAKE: dict[str, Make] = {
    "first": _words(3, 6, lambda words: words[0]),
    "last": _words(3, 6, lambda words: words[-1]),
    "repeat": _words(2, 6, ", ".join),
    "without_last": _words(3, 6, lambda words: ", ".join(words[:-1])),
    "group": _group,
    "heading": _row(odd_one, lambda row: row.key[0]),
    "first_listed": _row(odd_one, lambda row: _in_order(row)[0]),
    "last_listed": _row(odd_one, lambda row: _in_order(row)[-1]),
    "field": _field,
    "message_start": _row(extract, lambda row: " ".join(row.key.split()[:2])),
    "doer": _row(passive, lambda row: row.key[0]),
    "thing": _row(passive, lambda row: row.key[2]),
    "same": _row(passive, lambda row: row.sentence),
    "recommended": _row(polarity, lambda row: "yes" if row.label == "positive" else "no"),
    "praised": _row(polarity, lambda row: "none" if row.label == "negative" else "praise"),
    "complained": _row(polarity, lambda row: "none" if row.label == "positive" else "complaint"),
}
# The answer-format line of each skill, then its wordings.
TEXTS = """
first: Directly output only the first word.
  give the first word
  name the word that comes first
  write down what stands at the start of the list
  find the opening word of the list
  return item number one
last: Directly output only the last word.
  give the last word
  name the word that comes last
  write down what stands at the end of the list
  find the closing word of the list
  return the final item
repeat: Directly output only the words, separated by a comma and a space.
  repeat the words as they are
  copy all words in the same order
  write the list again without any change
  say the words once more
  give back exactly what is there
without_last: Directly output only the words that are left, separated by a comma and a space.
  leave out the last word
  drop the final item and keep the others
  remove the word at the end
  give all words except the last one
  cut off the end of the list
group: Directly output only the name of the group.
  name the group of these words
  tell what kind of thing this is
  say which category fits
  find the heading for the words
  state the class that they belong to
heading: Directly output only the name of the group.
  give the name of the group
  say what the heading is
  copy the title of the list
  tell which category is mentioned
  find the theme of the five words
first_listed: Directly output only the first word of the five.
  give the first of the five words
  name the word that opens the list
  say which of the words is listed first
  pick the word right at the start of the five
  return the top entry
last_listed: Directly output only the last word of the five.
  give the last of the five words
  name the word that closes the list
  say which of the words is listed last
  pick the word right at the end of the five
  return the bottom entry
field: Directly output only city, date, amount or name.
  say which field is asked for
  name the field, not its value
  tell what kind of detail is wanted
  repeat the field that somebody is looking for
  classify the request by its field
message_start: Directly output only the first two words of the message.
  give the first two words of the message
  quote how the message begins
  copy the opening of the message
  tell with which two words the message starts
  write down the beginning of the message
doer: Directly output only the doer.
  tell who does something in the sentence
  find the subject of the sentence
  name the one who acts
  say who did it
  give the doer
thing: Directly output only the thing that is acted on.
  name the object of the sentence
  say what the action is done to
  find what is acted on
  give the thing that something happens to
  tell what the verb acts on
same: Directly output only the sentence.
  copy the sentence
  repeat the sentence word for word
  leave the sentence in the active voice
  write the sentence again without any change
  give back the same sentence
recommended: Directly output only yes or no.
  say yes if the writer is entirely happy and no otherwise
  tell if this buyer would recommend the product without reserve
  decide whether the note is free of complaints
  answer yes for a note with praise only
  check that nothing is wrong with the product
praised: Directly output only praise or none.
  say praise if anything is praised, otherwise none
  look for a good point in the note and say praise or none
  decide between praise and none
  tell whether something is liked: praise or none
  check for approval, with the answer praise or none
complained: Directly output only complaint or none.
  say complaint if anything is criticised, otherwise none
  look for a bad point in the note and say complaint or none
  decide between complaint and none
  tell whether something is disliked: complaint or none
  check for criticism, with the answer complaint or none
"""


def _skills() -> dict[str, Skill]:
    found = {}
    for part in re.split(r"\n(?=\S)", TEXTS.strip()):
        first, *wordings = part.splitlines()
        name, _, suffix = first.partition(": ")
        found[name] = Skill(suffix, tuple(text.strip() for text in wordings), MAKE[name])
    return found


SKILLS = _skills()
