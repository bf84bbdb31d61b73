"""Arithmetic word problems with small whole numbers; the answer is computed from the numbers drawn."""

import re
from collections.abc import Callable

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed, upper_first

Numbers = tuple[int, ...]

WORDS = listed("two three four five six seven eight nine ten eleven twelve")
PEOPLE = tuple(
    zip(listed("Mia Omar Lena Ravi Zoe Felix Yara Paul Nadia Ivan Ruth Carlos"), 6 * ("she", "he"), strict=True)
)
THINGS = listed("marbles stickers buttons shells stamps beads coins postcards pebbles badges cards acorns")
# Openings with a number that has nothing to do with the question.
ASIDES = (
    "The clock shows {k}:00. ",
    "It is day {k} of the holidays. ",
    "Exercise {k}. ",
    "At house number {k} the following happens. ",
)


def _product(draw: Draw) -> Numbers:
    return draw.between(2, 12), draw.between(2, 12)


# Kind of sum: (draw of the numbers, answer).
KINDS: dict[str, tuple[Callable[[Draw], Numbers], Callable[..., int]]] = {
    "sum": (lambda d: (d.between(3, 60), d.between(2, 40)), lambda a, b: a + b),
    "difference": (lambda d: (a := d.between(12, 90), d.between(2, a - 3)), lambda a, b: a - b),
    "product": (_product, lambda a, b: a * b),
    "quotient": (lambda d: ((b := d.between(2, 12)) * d.between(2, 12), b), lambda a, b: a // b),
    "down and up": (
        lambda d: (a := d.between(15, 60), d.between(2, a - 5), d.between(2, 30)),
        lambda a, b, c: a - b + c,
    ),
    "change": (lambda d: (d.between(2, 9), d.between(2, 5), d.pick((50, 100))), lambda a, b, c: c - a * b),
    "two products": (lambda d: tuple(d.between(2, 9) for _ in range(4)), lambda a, b, c, d: a * c + b * d),
    "three": (lambda d: (d.between(4, 30), d.between(3, 30), d.between(2, 30)), lambda a, b, c: a + b + c),
    "fence": (_product, lambda a, b: 2 * (a + b)),
    "triple": (lambda d: (d.between(3, 60),), lambda a: 3 * a),
    "half": (lambda d: (2 * d.between(3, 60),), lambda a: a // 2),
    "less a product": (
        lambda d: ((b := d.between(3, 15)) * (c := d.between(2, 8)) + d.between(5, 60), b, c),
        lambda a, b, c: a - b * c,
    ),
    "product less": (
        lambda d: (a := d.between(3, 12), b := d.between(4, 12), d.between(2, a * b - 2)),
        lambda a, b, c: a * b - c,
    ),
    "legs": (_product, lambda a, b: 4 * a + 2 * b),
    "remainder": (lambda d: ((b := d.between(4, 12)) * d.between(2, 8) + d.between(1, b - 1), b), lambda a, b: a % b),
    "average": (lambda d: ((m := d.between(10, 60)) - (half := d.between(1, 8)), m + half), lambda a, b: (a + b) // 2),
    "two down": (
        lambda d: ((b := d.between(3, 25)) + (c := d.between(3, 20)) + d.between(5, 40), b, c),
        lambda a, b, c: a - b - c,
    ),
    "product and more": (lambda d: (*_product(d), d.between(2, 30)), lambda a, b, c: a * b + c),
    "climb": (lambda d: ((b := d.between(2, 5)) + d.between(2, 7), b, d.between(2, 10)), lambda a, b, c: (a - b) * c),
    "double less": (lambda d: (a := d.between(6, 40), d.between(2, 2 * a - 3)), lambda a, b: 2 * a - b),
    "plates": (
        lambda d: ((b := d.between(2, 9)) + (c := d.between(2, 8)) * d.between(2, 9), b, c),
        lambda a, b, c: (a - b) // c,
    ),
}
# Kind: story. {n} and {m} are people, {he} goes with {n}, {o} are things.
STORIES = """
sum: {n} has {a} {o} and gets {b} more from {m}. How many {o} does {n} have now?
difference: There are {a} {o} in a box. {n} takes out {b} of them. How many {o} stay in the box?
product: A baker fills {a} trays with {b} rolls each. How many rolls is that in total?
quotient: {n} shares {a} {o} equally among {b} friends. How many {o} does each friend get?
difference: In a game, {n} scored {a} points and {m} scored {b} points. By how many points did {n} win?
down and up: A bus sets off with {a} passengers. At the next stop {b} get off and {c} get on. How many passengers are
  on the bus now?
change: A ticket costs {a} dollars. {n} buys {b} tickets and pays with {c} dollars. How much change does {he} get, in
  dollars?
two products: Pens cost {a} dollars and notebooks cost {b} dollars apiece. How many dollars do {c} pens and {d}
  notebooks cost together?
three: {n} is {a} years old, and {m} is {b} years older. How old will {m} be {c} years from now?
sum: {n} rides the train for {a} minutes and then walks for {b} minutes. How long is the whole trip in minutes?
fence: A garden is {a} metres long and {b} metres wide. How many metres of fence go all the way around it?
product: {n} tiles a floor that is {a} metres by {b} metres. How many square metres is the floor?
triple: {n} collected {a} {o}. {m} collected twice as many. How many {o} do they have together?
half: {n} had {a} {o} and gave half of them to {m}. How many {o} does {n} still have?
product: A machine makes {a} parts an hour. How many parts does it make in {b} hours?
quotient: {n} needs {a} dollars for a gift and saves {b} dollars every week. How many weeks does {he} have to save?
less a product: A book has {a} pages. {n} reads {b} pages a day for {c} days. How many pages are left to read?
sum: After giving away {a} {o}, {n} is left with {b}. How many {o} did {he} have before?
difference: {n} woke up with {a} {o} in the jar, but only {b} are there at night. How many {o} went missing?
product less: A hall has {a} rows with {b} seats in each row. If {c} seats are taken, how many seats are free?
legs: On a farm {n} counts {a} cows and {b} hens. How many legs do these animals have in all?
remainder: {n} packs {a} eggs into boxes of {b}. Only full boxes are closed. How many eggs are left over?
difference: At noon the oven is at {a} degrees. It cools down by {b} degrees. What temperature does it have then?
average: {n} ran {a} laps on Monday and {b} laps on Tuesday. What is the average number of laps per day?
two down: A coat costs {a} dollars. The shop takes off {b} dollars, and {n} has a voucher worth {c} dollars. What does
  {he} pay, in dollars?
three: In {n}'s class {a} children walk to school, {b} take the bus and {c} cycle. How many children is that
  altogether?
product and more: {n} owns {a} packs of {b} {o} and {c} loose {o}. How many {o} are there in all?
quotient: A coach splits {a} players into teams of {b}. How many teams are there?
climb: A snail climbs {a} metres each day and slips back {b} metres each night. How many metres up is it after {c}
  full days and nights?
double less: {n} has {a} {o}, doubles that number and then loses {b}. How many {o} remain?
product and more: A cyclist rides {a} kilometres an hour for {b} hours and then another {c} kilometres. How far is
  that in kilometres?
two down: A rope is {a} metres long. {n} cuts off {b} metres for a swing and {c} metres for the boat. How many metres
  are left?
plates: {n} bakes {a} biscuits, eats {b} and puts the rest evenly on {c} plates. How many biscuits are on each plate?
difference: {n} and {m} together have {a} {o}. {m} has {b} of them. How many {o} does {n} have?
"""
TEMPLATES = [" ".join(story.split()).split(": ", 1) for story in re.split(r"\n(?=\S)", STORIES.strip())]


def _written(number: int, in_words: bool) -> str:
    return WORDS[number - 2] if in_words and 2 <= number <= 12 else str(number)


def make_row(draw: Draw, index: int) -> MadeRow:
    which = index % len(TEMPLATES)
    kind, text = TEMPLATES[which]
    numbers_of, answer = KINDS[kind]
    numbers = numbers_of(draw)
    (n, he), (m, _) = draw.sample(PEOPLE, 2)
    in_words = draw.chance(0.25)
    sentence = text.format(
        n=n,
        m=m,
        he=he,
        o=draw.pick(THINGS),
        **{key: _written(value, in_words) for key, value in zip("abcd", numbers, strict=False)},
    )
    if draw.chance(0.2):
        sentence = draw.pick(ASIDES).format(k=draw.between(2, 12)) + sentence
    # The key leaves out names and things: the same sum told with other names counts as the same row.
    return MadeRow((which, numbers), upper_first(sentence), str(answer(*numbers)))


ARITHMETIC = TaskRecipe("task05_arithmetic_stories", seed=505, make_row=make_row)
