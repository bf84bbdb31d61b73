"""Rewriting: an active sentence into the passive, with tense, negation and time expression kept."""

import re

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed, upper_first

# Who does it | what | to whom. A noun phrase is plural when it starts with "*".
DOMAINS = """
the cook, *the waiters, my aunt, the kitchen boy, *the bakers | wash clean count buy dry | *the plates, the big pan,
  *the glasses, *three bowls, the bread knife, *the silver spoons, the baking tray
the gardener, *the neighbours, our uncle, the old farmer, *the students | plant water sell choose cover | *the roses,
  *the tomatoes, the young tree, *the herbs, *the white tulips, the hedge, a row of beans
the secretary, the new manager, *the lawyers, the clerk, *two colleagues | write sign print send copy file | the
  letter, *the contracts, the monthly report, *the invoices, a short memo, *the minutes of the meeting
the teacher, *the pupils, the head of the school, *the trainees, my sister | draw explain check discuss present | the
  map, *the results, the experiment, *the diagrams, the new timetable, *both exercises, a simple graph
the mechanic, *the engineers, the apprentice, my grandfather, *the twins | repair test build paint move | the engine,
  *the bicycles, the wooden cart, *the pumps, the red tractor, *two old motors, the garage door
the scientist, *the researchers, the lab assistant, the professor, *the visitors | measure describe find examine label
  weigh | *the crystals, *the samples, the strange fossil, *the shells, a rare mineral, *the seeds, the meteorite
the director, *the actors, the young singer, *the reporters, the camera crew | film praise edit choose show | the
  final scene, *the interviews, the opening song, *the first episodes, a short film, *the street scenes
the shepherd, *the children, the vet, the farmer's wife, *the helpers | feed catch hide wash watch lead | the goat,
  *the lambs, the brown horse, *the ducks, the calf, *two donkeys, *the young dogs
the librarian, *the volunteers, the collector, *the readers, a retired judge | sort borrow return scan lose steal |
  the atlas, *the novels, the old dictionary, *the letters, a thick diary, *the magazines, the first volume
the museum guide, *the curators, the painter, the guard, *the tourists | photograph clean hang admire restore take |
  the portrait, *the masks, the golden mirror, *the drawings, a small landscape, *four posters, the tapestry
the tailor, *the designers, the shop owner, *the customers, my cousin | sew iron fold wear mend buy | the dress, *the
  shirts, the grey coat, *the curtains, a silk scarf, *the uniforms, the wedding gown
the postman, *the drivers, the captain, *the sailors, the night porter | deliver load bring open drop forget | the
  parcel, *the crates, the heavy trunk, *the suitcases, a wooden box, *the mail bags, the blue container
the programmer, *the testers, the team leader, *the analysts, the intern | update delete design break rewrite review |
  the website, *the scripts, the main menu, *the log files, a search tool, *both databases, the login page
"""
# Base, past, participle; -ing where a consonant is doubled.
IRREGULAR = listed(
    "buy bought bought, sell sold sold, choose chose chosen, write wrote written, send sent sent, draw drew drawn, "
    "build built built, find found found, label labelled labelled labelling, show showed shown, feed fed fed, "
    "catch caught caught, hide hid hidden, lead led led, scan scanned scanned scanning, lose lost lost, "
    "steal stole stolen, hang hung hung, take took taken, sew sewed sewn, wear wore worn, bring brought brought, "
    "drop dropped dropped dropping, forget forgot forgotten forgetting, break broke broken, rewrite rewrote rewritten"
)
# Subjects that fit everywhere: (as subject, after "by", plural).
PEOPLE = (
    ("she", "her", False),
    ("he", "him", False),
    ("they", "them", True),
    ("we", "us", True),
    ("Maria", "Maria", False),
    ("Tom", "Tom", False),
    ("Aisha", "Aisha", False),
    ("Peter and Ana", "Peter and Ana", True),
)
TENSES = listed("past, present, future, must, can, should, perfect, past perfect, was -ing, is -ing, did not, will not")
TIMES = {
    "past": ("yesterday", "last week", "on Monday", "in the morning", "before lunch"),
    "present": ("every day", "once a month", "on Fridays", "every spring"),
    "future": ("tomorrow", "next week", "on Sunday", "this afternoon"),
    "must": ("before noon", "by Friday", "this week"),
    "perfect": ("since Monday", "this week", "today"),
    "past perfect": ("by then", "before noon", "long before"),
    "was -ing": ("at that time", "at noon", "when it started to rain"),
    "is -ing": ("right now", "at the moment", "today"),
}
TIMES |= {"can": TIMES["future"], "should": TIMES["must"], "did not": TIMES["past"], "will not": TIMES["future"]}


def _split(phrases: str) -> list[tuple[str, bool]]:
    """A comma-separated list -> (phrase, is plural) pairs."""
    return [(phrase.lstrip("*"), phrase.startswith("*")) for phrase in phrases.split(", ")]


def _forms(verb: str) -> tuple[str, ...]:
    """Base, third person, past, participle, -ing."""
    stem = verb.removesuffix("e")
    third, past = verb + ("es" if verb.endswith(("s", "sh", "ch", "x")) else "s"), stem + "ed"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        third, past = verb[:-1] + "ies", verb[:-1] + "ied"
    given = next((words.split()[1:] for words in IRREGULAR if words.split()[0] == verb), [past, past])
    return verb, third, given[0], given[1], given[2] if len(given) > 2 else stem + "ing"


PARSED = []
for _domain in re.split(r"\n(?=\S)", DOMAINS.strip()):
    _subjects, _verbs, _objects = " ".join(_domain.split()).split(" | ")
    PARSED.append((
        [(phrase, phrase, plural) for phrase, plural in _split(_subjects)],
        [_forms(verb) for verb in _verbs.split()],
        _split(_objects),
    ))  # fmt: skip


def _verb_phrases(tense: str, verb: tuple[str, ...], plural: bool, object_plural: bool) -> tuple[str, str]:
    """The active verb phrase, agreeing with the subject, and the passive one, agreeing with the object."""
    base, third, past, participle, ing = verb
    are, were, have = ("are", "were", "have") if plural else ("is", "was", "has")
    o_are, o_were, o_have = ("are", "were", "have") if object_plural else ("is", "was", "has")
    return {
        "past": (past, f"{o_were} {participle}"),
        "present": (base if plural else third, f"{o_are} {participle}"),
        "future": (f"will {base}", f"will be {participle}"),
        "must": (f"must {base}", f"must be {participle}"),
        "can": (f"can {base}", f"can be {participle}"),
        "should": (f"should {base}", f"should be {participle}"),
        "perfect": (f"{have} {participle}", f"{o_have} been {participle}"),
        "past perfect": (f"had {participle}", f"had been {participle}"),
        "was -ing": (f"{were} {ing}", f"{o_were} being {participle}"),
        "is -ing": (f"{are} {ing}", f"{o_are} being {participle}"),
        "did not": (f"did not {base}", f"{o_were} not {participle}"),
        "will not": (f"will not {base}", f"will not be {participle}"),
    }[tense]


def _place(sentence: str, time: str, where: str) -> str:
    """The sentence with its time expression at the start, at the end, or left out."""
    if where == "start":
        sentence = f"{time}, {sentence}"
    elif where == "end":
        sentence = f"{sentence} {time}"
    return upper_first(sentence) + "."


def make_row(draw: Draw, index: int) -> MadeRow:
    tense = TENSES[index % len(TENSES)]
    subjects, verbs, objects = draw.pick(PARSED)
    subject, doer, plural = draw.pick(PEOPLE if draw.chance(0.3) else subjects)
    verb = draw.pick(verbs)
    patient, object_plural = draw.pick(objects)
    active, passive = _verb_phrases(tense, verb, plural, object_plural)
    time, where = draw.pick(TIMES[tense]), draw.pick(("start", "end", "end", "none"))
    return MadeRow(
        (subject, verb, patient),
        _place(f"{subject} {active} {patient}", time, where),
        _place(f"{patient} {passive} by {doer}", time, where),
    )


PASSIVE = TaskRecipe("task04_active_to_passive", seed=404, make_row=make_row)
