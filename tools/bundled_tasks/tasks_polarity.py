"""Polarity of a short product note: positive, negative or mixed.

A note is built from clauses of known polarity. `mixed` holds at least one of each, always about different
aspects, so that no note contradicts itself. The layout is drawn independently of the label.

The clauses are in polarity.txt: after the names of some products the aspects of them, a blank line between two, with
the praise (+) and the complaints (-) that carry on from a mention of the product. Both sides use negations and plain
facts, so that no single word gives the label away.
"""

from pathlib import Path

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed, upper_first

Aspect = tuple[list[str], list[str]]  # praise, complaints


def _families() -> list[tuple[list[str], list[Aspect]]]:
    """(products, their aspects) of polarity.txt; the last aspects go with any product."""
    found = []
    text = Path(__file__).with_name("polarity.txt").read_text(encoding="utf-8")
    for family in text.removeprefix("# ").split("\n\n# "):
        names, _, clauses = family.partition("\n")
        aspects = [aspect.splitlines() for aspect in clauses.split("\n\n")]
        pairs = [tuple([line[2:] for line in aspect if line[0] == sign] for sign in "+-") for aspect in aspects]
        found.append((names.split(", "), pairs))
    return found


*FAMILIES, (_, ANY_PRODUCT) = _families()
LABELS = ("positive", "negative", "mixed")

TEMPLATES = (
    "Got the {item} {when}. {Body}.",
    "{Body}. That is my note on the {item} after {span}.",
    "Quick note on this {item}: {body}.",
    "We have had the {item} for {span}. {Body}.",
    "The {item}, used for {span}: {body}.",
    "{Person} asked about the {item}, so here goes: {body}.",
    "Picked up this {item} {place}. {Body}.",
    "To anyone looking at this {item}: {body}.",
    "{Span} with the {item} now. {Body}.",
    "Second {item} I have owned. {Body}.",
    "The {item} came {when}. {Body}.",
    "I use the {item} {often}, and here is what I see: {body}.",
    "Ordered the {item} for {person}. {Body}.",
    "Regarding the {item}: {body}.",
    "{Body}. So much for the {item}.",
    "About the {colour} {item} I bought {place}: {body}.",
    "After {span} of use, this is my view of the {item}: {body}.",
    "{Item} (the {colour} one) - {body}.",
    "Replaced our old {item} {when}. {Body}.",
    "Note to self about the {item}: {body}.",
    "{Person} and I share the {item}. {Body}.",
    "Was asked to write a line about the {item}. {Body}.",
    "Bought {when}: one {colour} {item}. {Body}.",
    "The shop wants to know about the {item}. {Body}.",
    "Reply to your survey on the {item}: {body}.",
    "Dear team, this is about the {item} from {place_name}. {Body}.",
    "{Body}. Written {when} about the {colour} {item}.",
    "[{item}, {colour}] {Body}.",
)
WHEN = listed("last week, on Tuesday, in March, yesterday, two weeks ago, before the holidays, this spring")
SPAN = ("a month", "six weeks", "half a year", "ten days", "one winter", "three months", "a full year")
PLACE_NAME = ("the corner shop", "your website", "the outlet", "the spring sale", "the market hall")
OFTEN = ("every day", "most mornings", "twice a week", "at weekends", "now and then", "at work")
PERSON = listed("my sister, my father, a neighbour, my flatmate, a colleague, my grandmother, my cousin")
COLOUR = ("black", "white", "green", "grey", "blue", "red", "yellow")
JOIN_SAME = (" and ", ", and on top of that ", ". Also, ", ". What is more, ", ". ", "; ")
JOIN_CONTRAST = (", but ", ", yet ", ". Then again, ", ". Still, ", ". ", "; ")


def _polarities(draw: Draw, label: str) -> list[bool]:
    """Which clauses praise (True), in order. A mixed note has two or three clauses, others one to three."""
    if label != "mixed":
        count = 1 if draw.chance(0.15) else 3 if draw.chance(0.3) else 2
        return [label == "positive"] * count
    signs = [True, False]
    if draw.chance(0.3):
        signs.append(draw.chance(0.5))
    return draw.shuffled(signs)


def make_row(draw: Draw, index: int) -> MadeRow:
    label = LABELS[index % len(LABELS)]
    items, aspects = draw.pick(FAMILIES)
    item = draw.pick(items)
    signs = _polarities(draw, label)
    # At most one clause may be about price, delivery and the like; the others suit this kind of product only.
    chosen = draw.sample(aspects, len(signs))
    if draw.chance(0.5):
        chosen[draw.below(len(chosen))] = draw.pick(ANY_PRODUCT)
    clauses = [draw.pick(good if sign else bad) for sign, (good, bad) in zip(signs, chosen, strict=True)]

    body = clauses[0]
    for before, sign, clause in zip(signs, signs[1:], clauses[1:], strict=False):
        join = draw.pick(JOIN_SAME if before == sign else JOIN_CONTRAST)
        body += join + (upper_first(clause) if join == ". " else clause)
    drawn = {"when": WHEN, "span": SPAN, "place_name": PLACE_NAME, "often": OFTEN, "person": PERSON, "colour": COLOUR}
    fill = {"item": item, "body": body, **{name: draw.pick(values) for name, values in drawn.items()}}
    fill["place"] = "from " + fill["place_name"]
    fill |= {name.capitalize(): upper_first(value) for name, value in fill.items()}
    # The key leaves out the product and the layout: a set of clauses occurs in one note only.
    return MadeRow(frozenset(clauses), draw.pick(TEMPLATES).format(**fill), label)


POLARITY = TaskRecipe("task01_product_note_polarity", seed=101, make_row=make_row)
