"""Ordering: put four to six items into the order that a stated rule asks for.

Items are sorted by the value that was drawn for them, not by their text, and no two items of a row have the
same value, so the order is unique.
"""

from collections.abc import Callable, Sequence

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed

Item = tuple[object, str]  # (sort value, text)

WORD_LIST = listed(
    "anchor basket candle dragon engine feather glacier hammer island jungle kettle ladder magnet "
    "needle orchard pencil quilt ribbon saddle tunnel umbrella valley window yarn zipper apple bridge "
    "carpet desert eagle fox garden harbour ink jar kite lemon mirror nest oven planet queen river sea "
    "tea urn violin wax yacht zoo ant blanket chimney dust envelope fig grandfather horizon icicle "
    "jewel key lighthouse mountain newspaper owl pineapple rain strawberry thunderstorm wheelbarrow"
)
WEEK = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
YEAR = listed("January February March April May June July August September October November December")
GOODS = listed("lamp chair mug clock vase rug mirror basket towel pillow kettle blanket tray jug candle")
EVENTS = listed(
    "bridge opened, mill burned, school founded, tower built, harbour widened, park planted, railway closed, "
    "library moved, town hall painted, well dug, theatre renovated, market paved"
)
PEOPLE = listed("Nora Otto Pia Luis Greta Sami Ilse Hamid Vera Kofi Edda Bruno Leila Marek")
TOWNS = listed("Alder Brook Cliffe Dunmore Eastby Ferndale Glenton Hatley Inver Kirkby Lowmoor Marsh")


def _words(draw: Draw, k: int, value: Callable[[str], object]) -> list[Item]:
    """k words with pairwise different values."""
    chosen: dict[object, str] = {}
    for word in draw.shuffled(WORD_LIST):
        chosen.setdefault(value(word), word)
        if len(chosen) == k:
            break
    return list(chosen.items())


def _named(draw: Draw, names: Sequence[str], values: Sequence[int], text: str) -> list[Item]:
    """One item per value, with a name of its own."""
    return [
        (value, text.format(name, value)) for name, value in zip(draw.sample(names, len(values)), values, strict=True)
    ]


def _numbers(draw: Draw, k: int) -> list[Item]:
    top = draw.pick((50, 200, 1000))
    return [(value, str(value)) for value in draw.sample(range(1, top), k)]


def _places(names: Sequence[str]) -> Callable[[Draw, int], list[Item]]:
    """Items whose value is their place in a fixed list."""
    return lambda draw, k: [(place, names[place]) for place in draw.sample(range(len(names)), k)]


def _clock(draw: Draw, k: int) -> list[Item]:
    return [(5 * five, f"{five // 12:02d}:{5 * five % 60:02d}") for five in draw.sample(range(12, 288), k)]


def _week_times(draw: Draw, k: int) -> list[Item]:
    """Half hours between Monday 08:00 and Sunday 19:30."""
    items = []
    for slot in draw.sample(range(24 * len(WEEK)), k):
        day, half_hour = slot // 24, slot % 24
        items.append((slot, f"{WEEK[day]} {8 + half_hour // 2:02d}:{30 * (half_hour % 2):02d}"))
    return items


def _weights(draw: Draw, k: int) -> list[Item]:
    """Grams, some of them written in kilograms."""
    grams = draw.sample([50 * i for i in range(1, 20)] + [1000 * i for i in range(1, 10)], k)
    return [(value, f"{value // 1000} kg" if value % 1000 == 0 else f"{value} g") for value in grams]


def _spans(draw: Draw, k: int) -> list[Item]:
    """Minutes, some of them written in hours."""
    minutes = draw.sample([5 * i for i in range(1, 40) if i % 12] + [60 * i for i in range(2, 8)], k)
    return [(value, f"{value // 60} hours" if value % 60 == 0 else f"{value} minutes") for value in minutes]


# Kinds of item: what makes them.
KINDS = (
    _numbers,
    lambda d, k: _words(d, k, str),
    lambda d, k: _words(d, k, len),
    lambda d, k: _words(d, k, lambda w: w[-1]),
    _week_times,
    _places(YEAR),
    _clock,
    lambda d, k: _named(d, GOODS, d.sample(range(3, 95), k), "{0} ${1}"),
    lambda d, k: _named(d, EVENTS, d.sample(range(1805, 2020), k), "{0} {1}"),
    lambda d, k: _named(d, TOWNS, d.sample(range(-15, 36), k), "{0} {1}°C"),
    _weights,
    _spans,
    lambda d, k: _named(d, PEOPLE, d.sample(range(4, 96), k), "{0} (age {1})"),
)
# Of each kind the wordings of the rule for rising order, and below those for falling order.
RULES = """
from the smallest number to the largest / in increasing numerical order
  from the largest number to the smallest / in decreasing numerical order
in alphabetical order / alphabetically, from A to Z
  in reverse alphabetical order / alphabetically, from Z to A
from the shortest word to the longest / by number of letters, fewest first
  from the longest word to the shortest / by number of letters, most first
by the last letter of each word, from A to Z / alphabetically by final letter
  by the last letter of each word, from Z to A / alphabetically by final letter, but backwards
from the earliest to the latest in a week that starts on Monday / by day and time, Monday first
  from the latest to the earliest in a week that starts on Monday / by day and time, Sunday first
as they come in the calendar year / by month, earliest in the year first
  backwards through the calendar year / by month, latest in the year first
from the earliest time of day to the latest / by clock time, morning side first
  from the latest time of day to the earliest / by clock time, night side first
from the cheapest to the most expensive / by price, low to high
  from the most expensive to the cheapest / by price, high to low
from the oldest event to the most recent / by year, earliest first
  from the most recent event to the oldest / by year, latest first
from the coldest place to the warmest / by temperature, lowest first
  from the warmest place to the coldest / by temperature, highest first
from the lightest to the heaviest / by weight, least first
  from the heaviest to the lightest / by weight, greatest first
from the shortest time span to the longest / by duration, briefest first
  from the longest time span to the shortest / by duration, longest lasting first
from the youngest person to the oldest / by age, youngest first
  from the oldest person to the youngest / by age, oldest first
"""
_LINES = [line.strip().split(" / ") for line in RULES.strip().splitlines()]
RISING, FALLING = _LINES[::2], _LINES[1::2]
LAYOUTS = (
    "Rule: {rule}\nItems: {items}",
    "Items: {items}\nRule: {rule}",
    "Sort {rule}: {items}",
    "{items}\nSort these {rule}.",
    "Please arrange the following {rule}: {items}",
    "Order wanted: {rule}. List: {items}",
)


def make_row(draw: Draw, index: int) -> MadeRow:
    kind = index % len(KINDS)
    items = draw.shuffled(KINDS[kind](draw, draw.between(4, 6)))
    falling = draw.chance(0.5)
    ordered = sorted(items, key=lambda item: item[0], reverse=falling)
    if ordered == items:
        items = items[1:] + items[:1]
    texts = [text for _, text in items]
    sentence = draw.pick(LAYOUTS).format(rule=draw.pick((FALLING if falling else RISING)[kind]), items=", ".join(texts))
    # Direction and given order are left out of the key: one set of items occurs once per kind.
    return MadeRow((kind, frozenset(texts)), sentence, ", ".join(text for _, text in ordered))


ORDER = TaskRecipe("task06_order_items", seed=606, make_row=make_row)
