"""Hand-written paraphrases of the instructions for the polarity and odd-one-out tasks, 20 each."""

POLARITY_PARAPHRASES = (
    "Is this product note positive, negative or mixed?",
    "Classify the tone of the note: positive, negative, mixed.",
    "Decide how the writer of this short note feels about the product. Choose positive when there is praise "
    "and nothing else, negative when there are complaints and nothing else, and mixed when praise and "
    "complaints both occur.",
    "Label the note below.\n- positive: only praise\n- negative: only complaints\n- mixed: some of each",
    "You work in the customer care team of a shop and sort incoming notes by tone. Give each note one of "
    "three tags: positive (the customer mentions good points only), negative (bad points only) or mixed "
    "(good and bad points together).",
    "What tone does the note have? If everything in it speaks for the product, the tone is positive. If "
    "everything speaks against it, the tone is negative. If it says something for and something against the "
    "product, the tone is mixed.",
    "Here is a remark somebody made about something they own. Tell whether the remark is positive, "
    "negative, or mixed, where mixed stands for a remark that contains both a good and a bad point.",
    "Step 1: look for praise in the note. Step 2: look for complaints. Step 3: with praise alone say "
    "positive, with complaints alone say negative, with both say mixed.",
    "Sort this customer note into one of the classes positive / negative / mixed according to what it says "
    "about the product.",
    "Please read what a buyer has written and judge the overall impression. Only compliments make it "
    "positive, only criticism makes it negative, and a blend of compliments and criticism makes it mixed.",
    "Think of the note as a pair of scales. With weights on the good side alone it is positive; with "
    "weights on the bad side alone it is negative; as soon as both sides carry something it is mixed. Which "
    "of these applies?",
    "Product feedback follows. Task: tone detection. Classes: positive, negative, mixed. A note counts as "
    "mixed if it both praises and criticises.",
    "Would you call the following note positive, negative or mixed? Take all of its statements into account, "
    "including those about price, delivery and service.",
    "Someone jotted down their experience with a product. Work out whether they are happy (positive), "
    "unhappy (negative) or happy about some things and unhappy about others (mixed).",
    'Determine the sentiment of a short text about a product. Use "positive" for text with favourable '
    'statements only, "negative" for text with unfavourable statements only, "mixed" for text with both '
    "kinds.",
    "Check the note for good points and bad points:\n* only good points -> positive\n* only bad points -> "
    "negative\n* both -> mixed",
    "We collect opinions on household goods and need to know which way each one leans. An opinion is "
    "positive or negative if all of it points in the same direction. It is mixed if it points in both.",
    "Given a brief product comment, name its polarity. The possible polarities are positive (all "
    "approving), negative (all disapproving) and mixed (partly approving, partly disapproving).",
    "Ignore where and when the product was bought and look just at the opinion that is voiced. Is that "
    "opinion entirely positive, entirely negative, or mixed?",
    "Imagine the maker of the product reads this note. Will they find nothing but praise (positive), "
    "nothing but grumbling (negative), or a bit of both (mixed)?",
)

ODD_ONE_PARAPHRASES = (
    "Which of the five words is not part of the group?",
    "Find the odd one out.",
    "A group is named and five words are listed. Exactly one word is not a member of the group. Name that word.",
    "Look at the name of the group and the list of words. Four words fit the name, and a single one does "
    "not. Pick the one that does not fit.",
    "You are helping to tidy up a vocabulary book. Every page has a heading and five entries, but one entry "
    "was put on the wrong page. Say which entry has to be moved.",
    "Spot the intruder: five words, one heading, and one word that has no business under that heading.",
    "Input: the name of a category and five words.\nTask: four words are examples of the category; return "
    "the one that is not.",
    "Please identify the word that does not match the given category. The remaining four words all match it.",
    "Compare each of the five words with the group it is supposed to be in. Which word fails the test?",
    "Go through the words one by one and ask whether it is a kind of the thing that the group names. For "
    "one of them the answer is no. That is the word we want.",
    "Four belong together, one does not. Which one?",
    "One of these words has slipped in by mistake. Taking the stated group into account, point it out.",
    "In this puzzle you see the title of a list and five entries. The list would be correct if one entry "
    "were crossed out. Choose the entry to cross out.",
    "Read the group name first and then the five words. Your job is to single out the word that is "
    "unrelated to the group:\n- exactly four words are related\n- exactly one word is unrelated",
    "As a teacher you set your class a warm-up exercise. The board shows a theme and five words. Four of "
    "the words were picked because they are good examples of the theme, and one was smuggled in from "
    "somewhere else. Which word should the class name?",
    "Determine the outlier among five words with respect to the category mentioned.",
    "Suppose you had to remove a single word so that all the words left over belong to the named group. "
    "Which word would you remove?",
    "A label and five words are given. The label describes all but one of the words correctly; find the exception.",
    "Sort the words in your head into members and non-members of the group. There will be four members. "
    "What is the only non-member?",
    "Which word is out of place here, given what the group is called?",
)
