"""Hand-written paraphrases for the extraction, passive, arithmetic and ordering tasks, 20 each."""

EXTRACT_PARAPHRASES = (
    "Copy the requested field from the message.",
    "What does the message give for the field that is asked for?",
    "A short message and the name of a field (city, date, amount or name) are given. Quote the part of the "
    "message that fills this field, character by character.",
    "Read the message, find the city, the date, the amount or the name, whichever is asked for, and repeat "
    "it without changing how it is written.",
    "You are a clerk who fills in forms. One box of the form is named, and next to it there is a message. "
    "Write into the box exactly what the message says: no other spelling, no other date format, no rounding.",
    "Extract one piece of information from a message. The kinds of information are:\n- city: the town that "
    "is mentioned\n- date: the day that is mentioned\n- amount: the sum of money\n- name: the person",
    "Pull the wanted detail out of the text and leave everything else behind. Keep the original wording of the detail.",
    "Each example tells you what to look for, which is a city, a date, an amount of money or a person's "
    "name, and where to look for it, which is a brief message. Return what you find, spelt as in the "
    "message.",
    "Field extraction. Input: one field name and one message. Output: the matching stretch of the message, verbatim.",
    "Somebody sent a note and wants a single fact from it looked up. The fact is either a city, a date, an "
    "amount or a name. Report the fact just as the note puts it.",
    "Which words in the message answer the question behind the field? For city the question is where, for "
    "date it is when, for amount it is how much money, for name it is who. Give those words unchanged.",
    "Locate the value that belongs to the field in question. Do not translate, shorten or reformat it.",
    "Take the message apart. It contains places, days, sums of money and people, but only one of these is "
    "wanted, and the field says which. Hand back that value as it stands.",
    "Please search this message for the field named alongside it and reproduce the value literally.",
    "Our database has the columns city, date, amount and name. For the column mentioned in the input, find "
    "the entry in the message and transfer it as is.",
    "1. See which field is wanted.\n2. Find it in the message.\n3. Copy it exactly.",
    "Imagine highlighting a few words in the message with a marker: the ones that state the field you were "
    "given. Which words do you highlight?",
    "Times, room numbers and order codes in the message are of no interest. What matters is the one field "
    "that is named, be it a city, a date, an amount or a name. Give its value in its original form.",
    "From the message, retrieve the city, date, amount or name as requested, keeping symbols, commas and "
    "word order the way the sender typed them.",
    "Given a field and a message, state the field's value using the message's own words.",
)

PASSIVE_PARAPHRASES = (
    "Put the sentence into the passive voice.",
    "Change this active sentence to passive and keep its tense.",
    'How would this sentence read in the passive? Mention the doer with "by" and leave the tense as it is.',
    "Below is a sentence in the active voice. Give the passive version: the thing acted on comes first, and "
    'the person who acts follows after "by". If the sentence says when something happens, that part keeps '
    "its place at the start or the end.",
    "You are a language teacher and write the key to a grammar exercise. The exercise asks learners to turn "
    "active sentences into passive ones without changing the tense, dropping the doer or moving the time "
    "expression.",
    'Transform active into passive:\n- object -> subject\n- verb -> a form of "be" plus participle, same '
    'tense\n- subject -> "by" phrase\n- time expression -> stays at the start or at the end',
    "Rephrase so that the object of the verb becomes the subject. Do not leave out who did it, and do not "
    "alter the time of the action.",
    "Swap the roles in this sentence. Whatever receives the action should now lead the sentence, the verb "
    "should be passive in the same tense, and whoever performs the action should be introduced by the word "
    '"by".',
    "Please convert the sentence below from the active to the passive voice.",
    'Say the same thing in the passive. Negations, modal verbs such as "must" or "can" and expressions '
    "of time are all to be preserved.",
    "Turn the sentence around: start with what is affected by the action and end, apart from a time "
    'expression, with "by" and the one responsible.',
    "Voice change, active to passive. Same tense, same meaning, doer kept.",
    "An editor prefers passive constructions in this report. Rework the sentence accordingly. Its facts, "
    "its tense and the position of any phrase of time must remain the same.",
    "Write the passive counterpart of the sentence, including the agent.",
    'Each input is a plain sentence of the form "someone does something to something". Produce the '
    'sentence of the form "something is done by someone" that matches it in tense and in every detail.',
    "Recast the sentence so that its grammatical subject is the former object. The former subject moves "
    'behind the verb as a "by" phrase; pronouns change their form where grammar requires it.',
    "Make the sentence passive. If there is a time expression at the beginning, begin with it; if it is at "
    "the end, end with it.",
    "What is the passive form of this statement? Keep past as past, present as present, future as future and so on.",
    "First find the verb, its subject and its object. Then rebuild the sentence with a passive verb in the "
    'same tense, the object in front and the subject after "by".',
    "I would like to hear this from the point of view of the thing that is acted on. Reword the sentence in "
    "the passive for me and still tell me who acts.",
)

ARITHMETIC_PARAPHRASES = (
    "Work out the answer to this word problem.",
    "Read the story and answer the question at the end with a whole number.",
    "How much is it? Calculate the number that the question asks for.",
    "You will see a short everyday situation with some numbers in it, followed by a question. Do the "
    "calculation that the situation calls for and give the resulting whole number.",
    "Act as a patient maths tutor who checks homework. A pupil hands you the problem below and would like "
    "to know what should come out. Work through it calmly, one step after the other, and find the correct "
    "result, which is always a whole number.",
    "Arithmetic exercise. Use the numbers in the text to compute what is asked. Some texts contain a number "
    "that plays no part in the calculation.",
    "Solve:\n- pick out the numbers that matter\n- decide which operations are needed\n- compute the whole "
    "number asked for",
    "Please calculate the quantity in question. Numbers may be written as digits or as words.",
    "Here is a little maths puzzle about people, things and quantities. Find out which number answers it.",
    "What whole number is the solution to the following problem?",
    "Translate the story into a sum in your head, solve the sum, and report the outcome.",
    "A pupil in primary school got this question in a test. Which number should the pupil write down?",
    "The text describes a small calculation with addition, subtraction, multiplication or division, or a "
    "few of these one after another. Find out which operations it takes and in what order, use each number "
    "that matters, and carry the calculation out.",
    "Determine the numerical answer. It is an integer, and nothing but the text is needed to find it.",
    "Consider the problem carefully, taking each step in the order in which the story tells it, and state "
    "the final number.",
    "Word problem -> number.",
    "Find the missing number. Everything you have to know is in the few sentences below, and the result "
    "comes out even, with no fraction.",
    "Someone needs help with a sum hidden in a short story. Tell them the result.",
    "Do the maths: what is the value that the last sentence wants to know?",
    "Given a brief description with numbers and a closing question, compute the answer to that question as an integer.",
)

ORDER_PARAPHRASES = (
    "Sort the items by the given rule.",
    "Put these items in the right order.",
    "You get several items and are told how they should be ordered. Write them all down again in that "
    "order, with nothing changed in the items themselves.",
    "How do the items line up once the rule is applied? List them from first to last and copy each one as it stands.",
    "Work like a careful librarian. Take the items as they come, look at the rule for the shelf, and set "
    "every item in its proper place. Nothing may be lost, nothing may be added, and nothing may be "
    "reworded, however odd it looks.",
    "Sorting task.\n- Input: items and a rule\n- Output: the same items, ordered by the rule\n- Do not edit the items",
    "Rearrange the list so that it follows the stated rule. Every item has to appear exactly once, in its "
    "original spelling.",
    "Below you will find a jumbled list together with an instruction on how to order it. Bring the list into order.",
    "Please return the items sorted in the way that is asked for, keeping each of them word for word.",
    "Which item comes first, which comes next, and which comes last? Use the rule in the input to decide, "
    "and name all the items in sequence.",
    "Read the rule first. It may concern numbers, words, dates, prices, weights or something similar, and "
    "it may run upwards or downwards. Then give the items in the sequence that the rule lays down.",
    "The list is out of order. Fix it according to the rule.",
    "Apply the ordering rule to the items and write out the result without leaving anything out.",
    "Imagine laying the items out on a table in a row, following the rule from left to right. What does the "
    "row look like? Leave the text of the items as it is.",
    "Given a set of items and a criterion, output the items ranked by that criterion. Units, years, ages "
    "and other details that are part of an item stay with it.",
    "1. Find the rule.\n2. Compare the items by it.\n3. Write down all items in the resulting order, unaltered.",
    "Some things need to be put in sequence, and you are told by what: size, alphabet, length, time, price "
    "or the like. Produce the sequence.",
    "Order the elements of the list as required. Mind the direction, since some rules begin with the "
    "smallest or earliest element and others with the largest or latest.",
    "Could you arrange these for me? The input says in which order I want them, and I need every one of "
    "them back just as I wrote it.",
    "Turn the unsorted list into a sorted one. What counts as sorted is defined by the rule that comes with the list.",
)
