"""Products and clauses for the polarity notes.

An aspect is a pair (praise, complaint) of clause lists; clauses carry on from a mention of the product
("it ..."). Both sides use negations and plain facts, so that no single word gives the label away.
"""

Aspect = tuple[tuple[str, ...], tuple[str, ...]]

FAMILIES: tuple[tuple[tuple[str, ...], tuple[Aspect, ...]], ...] = (
    (
        ("kettle", "toaster", "blender", "coffee maker", "rice cooker", "waffle iron"),
        (
            (
                ("it is done before I have set the table", "breakfast is ready in no time with it"),
                (
                    "it takes three times as long as it should",
                    "I stand around waiting for it every single morning",
                ),
            ),
            (
                ("a quick rinse is all the cleaning it needs", "spills wipe off with one cloth"),
                ("food sticks in corners that no brush can reach", "cleaning it eats up half my evening"),
            ),
            (
                ("it runs so quietly that nobody wakes up", "I never have to raise my voice over it"),
                ("it roars like a lawn mower", "the whole house hears it when I switch it on"),
            ),
            (
                ("the cord is long enough for any socket we have", "the switch clicks firmly and feels safe"),
                ("the cord barely reaches the wall", "the switch jammed in the first week"),
            ),
        ),
    ),
    (
        ("backpack", "hiking pack", "shoulder bag", "sports bag", "laptop bag"),
        (
            (
                ("the zips glide and have never caught", "not one zip has snagged so far"),
                ("the zip split on the second trip", "one of the zips keeps getting stuck"),
            ),
            (
                ("everything I need fits with room to spare", "the pockets are exactly where I want them"),
                (
                    "there is hardly space for a lunch box in it",
                    "the pockets are too tight for anything useful",
                ),
            ),
            (
                (
                    "my shoulders feel fine after hours of carrying it",
                    "even fully packed it is easy to carry",
                ),
                ("the strap digs into my shoulder", "carrying it for ten minutes gives me a sore back"),
            ),
            (
                ("my books stayed dry in pouring rain", "the fabric shrugs off water"),
                ("a short shower soaked everything inside", "the lining was wet through after light rain"),
            ),
        ),
    ),
    (
        ("speaker", "soundbar", "portable radio", "party speaker", "kitchen radio"),
        (
            (
                ("voices come through crisp and clear", "I hear details in songs that I had never noticed"),
                ("the sound is muffled, as if under a blanket", "everything rattles once the bass sets in"),
            ),
            (
                ("pairing it took five seconds", "it connects by itself the moment I switch it on"),
                ("it drops the connection every few minutes", "my phone cannot find it half of the time"),
            ),
            (
                ("the controls make sense without a manual", "the volume knob is a joy to turn"),
                ("the buttons do something different each time", "I still cannot work out the menu"),
            ),
            (
                ("it fills the whole room without effort", "even at full volume nothing distorts"),
                ("I can barely hear it across the table", "it crackles as soon as I turn it up"),
            ),
        ),
    ),
    (
        ("desk lamp", "bedside lamp", "floor lamp", "reading light", "table lamp"),
        (
            (
                (
                    "the light is soft and does not tire my eyes",
                    "I can finally read at night without squinting",
                ),
                ("the glare gives me a headache", "it is too dim to read by"),
            ),
            (
                ("it dims smoothly to just the right level", "one touch sets the brightness I want"),
                (
                    "it flickers whenever the fridge starts",
                    "the dimmer has only two settings, useless and off",
                ),
            ),
            (
                ("the base is heavy and nothing tips it over", "it stays exactly where I point it"),
                ("it falls over if you look at it", "the neck sags back down after a minute"),
            ),
            (
                ("it suits the room perfectly", "visitors keep telling me how pretty it is"),
                ("the finish looks like cheap plastic", "the shade was scratched and has an ugly seam"),
            ),
        ),
    ),
    (
        ("office chair", "bookshelf", "folding table", "bar stool", "chest of drawers", "shoe rack"),
        (
            (
                (
                    "putting it together took me ten minutes",
                    "all the screws were there and the holes lined up",
                ),
                ("half of the screws were missing", "the holes do not line up, so it took all day to build"),
            ),
            (
                ("it does not wobble at all", "it stands rock solid on our crooked floor"),
                ("it sways when I touch it", "one leg is shorter than the rest, so it rocks"),
            ),
            (
                ("the wood has a lovely warm grain", "the edges are smooth and neatly finished"),
                ("the paint came off on my hands", "the surface chipped within days"),
            ),
            (
                ("it fits the corner as if made for it", "I can move it on my own with ease"),
                ("it is far bigger than the page claims", "it scrapes marks into the floor"),
            ),
        ),
    ),
    (
        ("cordless drill", "jigsaw", "tape measure", "torque wrench", "hand saw"),
        (
            (
                ("no job so far was too much for it", "it makes quick work of any task in the house"),
                ("it gave up on the very first task", "it struggles with even the lightest job"),
            ),
            (
                ("the grip sits well in my small hands", "my wrist never aches after using it"),
                ("the grip is slippery and gives me blisters", "it is so heavy that my arm goes numb"),
            ),
            (
                ("it has been spot on every time", "the result is precise to the millimetre"),
                (
                    "it is off by several millimetres each time",
                    "I had to redo the work because it is so inaccurate",
                ),
            ),
            (
                (
                    "it survived a fall from the ladder without a scratch",
                    "it still works like on the first day",
                ),
                ("it broke when it slid off the bench", "it rusted after a single week in the shed"),
            ),
        ),
    ),
    (
        ("rain jacket", "wool sweater", "winter coat", "fleece hoodie", "ski jacket"),
        (
            (
                ("it fits me as if it were tailored", "the sleeves are just the right length"),
                ("it is two sizes smaller than the label says", "the sleeves end well above my wrists"),
            ),
            (
                ("it kept its shape and colour after ten washes", "it comes out of the wash like new"),
                ("it shrank in the first wash", "the colour ran and ruined my other clothes"),
            ),
            (
                ("I stayed warm all day in the snow", "it keeps the wind out completely"),
                ("I froze in it on a mild day", "the wind goes straight through it"),
            ),
            (
                ("it is so soft that I forget I am wearing it", "it feels gentle even on bare skin"),
                ("it itches so much that I cannot wear it", "the collar scratches my neck"),
            ),
        ),
    ),
    (
        ("garden hose", "watering can", "lawn sprinkler", "pressure sprayer", "drip hose"),
        (
            (
                ("it has never leaked or dripped", "nothing has come loose on it all season"),
                ("it leaks from the joint all the time", "parts keep falling off while I work"),
            ),
            (
                ("watering is done in half the time", "it reaches every corner of the garden"),
                ("it clogs up every few minutes", "half of the beds stay dry with it"),
            ),
            (
                ("it stows away neatly in the shed", "it is light enough for my mother to use"),
                ("it takes up the entire shed", "it is so clumsy that I dread using it"),
            ),
            (
                ("sun and frost have not harmed it", "it has stayed outside all year and looks fine"),
                ("the plastic went brittle after one summer", "it cracked in the first frost"),
            ),
        ),
    ),
    (
        ("power bank", "car charger", "charging stand", "wireless charger", "solar charger"),
        (
            (
                ("it suits my phone perfectly", "it works with every phone in our family"),
                (
                    "it does not work with the model it was sold for",
                    "my phone never gets past half full with it",
                ),
            ),
            (
                ("it has never got hot, not even in July", "it stays cool for hours"),
                ("it gets too hot to touch", "it smells of burnt plastic after ten minutes"),
            ),
            (
                ("it has saved my phone more than once", "I would not travel without it any more"),
                ("it ruined my battery", "it let me down exactly when I needed it"),
            ),
            (
                ("it takes up hardly any room", "it weighs next to nothing"),
                ("it is bulky and heavy as a brick", "it is far too big for its purpose"),
            ),
        ),
    ),
    (
        ("keyboard", "mouse", "trackball", "drawing tablet", "game controller"),
        (
            (
                ("plugging it in was all it took", "it was up and running at once"),
                ("the software crashed during set-up", "it took four calls to get it running"),
            ),
            (
                ("I can work a whole day with it and feel fine", "my hands thank me for it"),
                ("an hour with it leaves me with aching hands", "my wrist hurts after a short while"),
            ),
            (
                ("it reacts instantly", "there is no delay whatsoever"),
                ("it lags behind by a full second", "it freezes several times a day"),
            ),
            (
                ("it is sturdy and neatly made", "it looks smart on my desk"),
                (
                    "it looks shabby already",
                    "the markings rubbed off within a month",
                ),
            ),
        ),
    ),
    (
        ("tent", "beach shelter", "awning", "party tent", "pop-up pavilion"),
        (
            (
                ("it held up in a storm that flattened the others", "strong wind does not bother it"),
                ("it did not survive the first breeze", "it fell to pieces in light wind"),
            ),
            (
                ("I had it ready in five minutes in the dark", "my kids can set it up alone"),
                ("setting it up is a puzzle for four adults", "the instructions do not match the parts"),
            ),
            (
                ("it packs down smaller than a loaf of bread", "it goes back into its bag at the first try"),
                ("it never goes back into its bag", "folding it away takes longer than the trip"),
            ),
            (
                ("thanks to it we stayed out two days longer", "it made our trip a real pleasure"),
                ("we gave up and went to a hotel because of it", "it spoilt our whole weekend"),
            ),
        ),
    ),
    (
        ("exercise bike", "treadmill", "rowing machine", "step trainer", "cross trainer"),
        (
            (
                ("it keeps me training more often than ever", "I look forward to using it each day"),
                ("I stopped using it within a week", "it makes training a chore"),
            ),
            (
                ("it does not slip on any floor", "it stays put through the hardest session"),
                ("it wobbles under me", "it creeps across the floor with every move"),
            ),
            (
                ("the numbers match those from my gym", "it counts without missing a beat"),
                ("its readings are pure fantasy", "it counts rounds that I never did"),
            ),
            (
                ("it has no smell at all, even when new", "the material feels clean and solid"),
                ("it reeks of rubber", "bits of the coating stick to my hands"),
            ),
        ),
    ),
)

ANY_PRODUCT: tuple[Aspect, ...] = (
    (
        (
            "it is worth every penny",
            "I would have paid twice as much for it",
            "for the price nothing comes close",
        ),
        ("it is not worth half the price", "I want my money back", "the money was wasted"),
    ),
    (
        (
            "it arrived two days early",
            "delivery was prompt and friendly",
            "the parcel was on my doorstep next morning",
        ),
        (
            "it arrived three weeks late",
            "the parcel went to the wrong town twice",
            "delivery was a complete mess",
        ),
    ),
    (
        (
            "the support team solved my question within minutes",
            "the seller was kind and helpful on the phone",
        ),
        ("nobody at the hotline ever picked up", "the seller refused to answer my letters"),
    ),
    (
        ("it was packed with care, without any waste", "the box was sturdy and easy to open"),
        ("the box was torn and taped up again", "it came loose in a bag, covered in dents"),
    ),
    (
        ("I would buy it again without a second thought", "I have already ordered another one for a friend"),
        ("I will never buy from this brand again", "I warned all my friends off it"),
    ),
)
