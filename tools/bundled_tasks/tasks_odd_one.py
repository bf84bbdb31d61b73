"""Odd one out: four words of a named group and one word of another group.

The word lists avoid words with two homes (such as "crane" or "orange"); where two groups touch, CLASH keeps
the one from lending words to the other.
"""

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed, upper_first

# Groups on one line are near each other: a word from a near group makes the harder rows.
NEAR = (
    ("fruit", "vegetables", "drinks", "pastries", "spices and herbs"),
    ("birds", "fish", "insects", "mammals", "reptiles"),
    ("flowers", "trees", "vegetables", "fruit"),
    ("tools", "kitchenware", "stationery", "furniture", "musical instruments"),
    ("clothes", "fabrics", "furniture", "parts of the body"),
    ("road vehicles", "boats", "buildings", "landforms"),
    ("jobs", "relatives", "sports", "dances"),
    ("metals", "gemstones", "fabrics"),
    ("shapes", "colours"),
    ("rooms", "buildings", "furniture"),
    ("school subjects", "jobs", "feelings"),
    ("weather", "feelings", "landforms"),
    ("countries", "capital cities", "languages"),
    ("months", "days of the week", "planets"),
)
# In no direction may one of these groups supply the odd word for one of the others in its line.
CLASHES = {
    "colours": "fruit, vegetables, flowers, trees, metals, gemstones, spices and herbs, drinks, fish, fabrics, feelings",
    "trees": "fruit, spices and herbs, flowers",
    "spices and herbs": "flowers, vegetables, fruit, drinks",
    "road vehicles": "boats, sports",
    "sports": "boats, dances, school subjects",
    "school subjects": "dances, languages",
    "tools": "kitchenware, stationery, metals, furniture",
    "musical instruments": "shapes, metals, fish",
    "furniture": "stationery",
    "rooms": "buildings",
    "clothes": "fabrics",
    "gemstones": "shapes",
    "landforms": "weather",
    "relatives": "jobs",
}
CLASH = {frozenset((one, other)) for one, others in CLASHES.items() for other in others.split(", ")}
GROUPS = {
    "fruit": "apple pear banana grape cherry mango pineapple strawberry raspberry apricot papaya melon",
    "vegetables": "carrot spinach broccoli cabbage cauliflower turnip leek parsnip radish lettuce asparagus",
    "birds": "sparrow pigeon eagle owl seagull woodpecker parrot pelican ostrich penguin flamingo blackbird",
    "fish": "trout tuna cod herring sardine mackerel haddock carp halibut anchovy catfish sturgeon",
    "insects": "ant beetle wasp butterfly mosquito grasshopper ladybird dragonfly moth termite bee",
    "mammals": "elephant giraffe squirrel rabbit kangaroo leopard hippopotamus zebra otter hedgehog wolf",
    "reptiles": "lizard crocodile tortoise cobra gecko iguana viper alligator chameleon turtle rattlesnake",
    "flowers": "tulip daisy daffodil sunflower orchid marigold carnation poppy peony dahlia snowdrop",
    "trees": "oak birch maple willow spruce beech poplar cedar elm larch sycamore hornbeam",
    "tools": "hammer screwdriver wrench pliers chisel drill spanner mallet crowbar hacksaw",
    "musical instruments": "violin cello trumpet flute clarinet piano guitar harp trombone oboe saxophone",
    "furniture": "sofa armchair wardrobe bookcase stool bench sideboard desk cupboard couch nightstand",
    "clothes": "shirt trousers sweater jacket skirt scarf blouse coat cardigan jeans pyjamas raincoat",
    "road vehicles": "bus lorry motorcycle bicycle van tractor ambulance taxi minibus truck motorbike",
    "boats": "canoe kayak ferry yacht raft dinghy trawler catamaran gondola rowboat sailboat",
    "weather": "rain snow hail fog sleet thunder drizzle frost blizzard hurricane tornado",
    "parts of the body": "elbow knee shoulder ankle wrist thumb forehead chin neck heel eyebrow toe",
    "jobs": "plumber nurse teacher lawyer electrician carpenter dentist farmer accountant firefighter",
    "sports": "football tennis hockey basketball rugby badminton volleyball swimming gymnastics judo golf",
    "kitchenware": "saucepan spatula ladle whisk colander grater teapot sieve spoon fork plate mug",
    "drinks": "coffee tea lemonade juice milk cider beer wine cocoa smoothie milkshake",
    "metals": "copper zinc aluminium nickel titanium steel bronze platinum tungsten chromium",
    "gemstones": "diamond ruby emerald sapphire topaz opal amethyst garnet",
    "shapes": "triangle square circle rectangle pentagon hexagon octagon oval trapezium rhombus ellipse",
    "colours": "red blue green yellow purple brown grey black white pink crimson beige",
    "school subjects": "history geography chemistry biology physics mathematics literature economics",
    "rooms": "kitchen bathroom bedroom attic cellar hallway pantry corridor basement",
    "buildings": "church school hospital museum castle cinema factory barn lighthouse hotel library",
    "feelings": "joy anger sadness fear envy pride guilt jealousy disgust grief delight shame",
    "fabrics": "cotton silk wool linen denim velvet nylon polyester satin tweed",
    "relatives": "mother uncle cousin nephew grandmother sister brother aunt niece grandfather daughter",
    "spices and herbs": "cinnamon cumin paprika basil thyme oregano nutmeg ginger turmeric parsley saffron",
    "pastries": "croissant muffin scone doughnut eclair brioche tart cupcake pie",
    "stationery": "pencil eraser stapler notebook envelope crayon highlighter sharpener paperclip",
    "dances": "waltz tango rumba polka ballet foxtrot flamenco samba quickstep",
    "landforms": "mountain valley hill canyon island plateau peninsula volcano cliff dune",
    "countries": "Norway Brazil Kenya Japan Canada Portugal Egypt Mexico Vietnam Greece Poland Morocco",
    "capital cities": "Paris Rome Madrid Oslo Vienna Dublin Lisbon Warsaw Athens Tokyo Cairo Ottawa Nairobi",
    "languages": "French German Swahili Italian Hindi Arabic Turkish Welsh Dutch Korean Japanese",
    "months": "January February April June July September October November December August",
    "days of the week": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "planets": "Venus Mars Jupiter Saturn Uranus Neptune Earth",
}
WORDS = {group: listed(words) for group, words in GROUPS.items()}
LAYOUTS = (
    "Group: {group}\nWords: {words}",
    "Words: {words}\nGroup: {group}",
    "{Group}: {words}",
    'The group is "{group}". The words are {words}.',
    "Five words: {words}. The group they should share: {group}.",
    "{words} ({group})",
    "Group = {group} | words = {words}",
    "Here are five words to go with {group}: {words}.",
    "Theme of the list: {group}\n{lines}",
    "{Group}\n{lines}",
)


def _lenders(group: str) -> tuple[list[str], list[str]]:
    """Groups that may supply the odd word: (near ones, all). Same kind of initial, or capitals would tell."""
    proper = WORDS[group][0][0].isupper()
    fit = [
        other
        for other, words in WORDS.items()
        if other != group and words[0][0].isupper() == proper and frozenset((group, other)) not in CLASH
    ]
    near = [other for other in fit if any(group in line and other in line for line in NEAR)]
    return near or fit, fit


LENDERS = {group: _lenders(group) for group in WORDS}


def make_row(draw: Draw, index: int) -> MadeRow:
    group = list(WORDS)[index % len(WORDS)]
    members = draw.sample(WORDS[group], 4)
    near, fit = LENDERS[group]
    own = {word.lower() for word in WORDS[group]}
    odd = draw.pick([word for word in WORDS[draw.pick(near if draw.chance(0.5) else fit)] if word.lower() not in own])
    words = draw.shuffled([*members, odd])
    sentence = draw.pick(LAYOUTS).format(
        group=group,
        Group=upper_first(group),
        words=", ".join(words),
        lines="\n".join("- " + word for word in words),
    )
    return MadeRow((group, frozenset(words)), sentence, odd)


ODD_ONE = TaskRecipe("task02_odd_one_out", seed=202, make_row=make_row)
