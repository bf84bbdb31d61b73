"""Extraction: copy one named field (city, date, amount or name) out of a short message.

A message holds each of its fields once, next to numbers and codes that are none of them.
"""

from tools.bundled_tasks.common import Draw, MadeRow, TaskRecipe, listed

FIELDS = ("city", "date", "amount", "name")

# {time}, {number} and {code} are noise that is never asked for.
TEMPLATES = (
    "Hi {name}, your train to {city} leaves on {date} at {time}. The fare of {amount} has been charged.",
    "Reminder: {name} owes us {amount} for the {city} trip on {date}.",
    "We received your payment of {amount} on {date}. The parcel goes out from our {city} depot today.",
    "Booking {code}: room {number} in {city}, arrival {date}, deposit {amount}. Guest: {name}.",
    "{name} is flying to {city} on {date} and needs {amount} in cash before then.",
    "The workshop in {city} costs {amount} per person. Please tell {name} by {date} if you can come.",
    "Dear {name}, the meeting planned for {date} has moved to {city}. Travel costs of {amount} will be paid back.",
    "Invoice {code} over {amount} is due on {date}. Send questions to our office in {city}.",
    "On {date} we pick up the van in {city}. It is {amount} for the day, and {number} people fit in.",
    "Can you lend {name} {amount} until {date}? The bank in {city} has blocked the card.",
    "Concert in {city}, {date}, doors at {time}. Tickets are {amount}. Ask {name} for a seat.",
    "Order {code} was shipped from {city} on {date}. You paid {amount} in total.",
    "{name} wrote from {city}: the flat is {amount} a month and free from {date}.",
    "Your refund of {amount} was approved on {date}. Greetings from the {city} branch, {name}.",
    "Team dinner on {date} at {time} in {city}. Set menu {amount}, table for {number}.",
    "Lost in {city} on {date}: a brown wallet with {amount} in it. Please call {name}.",
    "The {city} marathon takes place on {date}. {name} has already paid the {amount} entry fee.",
    "Hello, this is {name}. I can repair the boiler on {date} for {amount}, but I have to drive over from {city}.",
    "Note for the file: {amount} moved to the {city} account on {date}, see slip {code}.",
    "{date}: {name} sold the old piano to a buyer from {city} for {amount}.",
    "Please confirm seat {number} on the {time} bus to {city}. The price is {amount}, valid on {date} only.",
    "Thanks to {name}, we raised {amount} at the fair in {city} on {date}!",
    "The landlord in {city} wants {amount} by {date}, otherwise he gives flat {number} to {name}.",
    "Exam on {date}, room {number}. The {city} school asks for a fee of {amount}.",
    "{name}, could you collect the keys in {city} at {time} on {date}? The cleaner gets {amount}.",
    "From {date} the ferry to {city} costs {amount}. Boarding closes at {time}.",
    "A gift card over {amount} is waiting for {name} in the {city} store. It runs out on {date}.",
    "Your car, plate {code}, was parked too long in {city} on {date}. The fine is {amount}.",
    "Short update from {city}: {name} signed the contract on {date}, worth {amount}.",
    "We meet in {city} on {date}, {time} sharp. Bring {amount} for the museum and wait for {name}.",
)
LAYOUTS = (
    "Field: {field}\nMessage: {message}",
    "Message: {message}\nField: {field}",
    "[{field}] {message}",
    '"{message}"\nWanted: {field}',
    "Look for: {field}\n\n{message}",
)
CITIES = listed(
    "Lisbon, Oslo, Kyoto, Toronto, Nairobi, Prague, Hamburg, Valencia, Cape Town, Dublin, Seoul, Montreal, "
    "Krakow, Bergen, Buenos Aires, Gdansk, Ghent, Leeds, Marseille, Porto, Zagreb, Tallinn, Utrecht, Bristol, "
    "Graz, Lima, Mumbai, San Diego, Denver, New Orleans"
)
NAMES = listed(
    "Amara Okafor, Ben Carter, Clara Weiss, Dmitri Volkov, Elena Rossi, Farid Haddad, Grace Lin, Hugo Martin, "
    "Ines Duarte, Jonas Berg, Keiko Mori, Liam Doyle, Mina Patel, Noor Rahman, Oskar Lind, Priya Nair, Rosa Vega, "
    "Samuel Osei, Tara Quinn, Yusuf Demir, Mrs Novak, Mr Hall, Dr Sato, Ms Keller"
)
MONTHS = listed("January February March April May June July August September October November December")


DATES = ("{d} {w}", "{w} {d}", "{d} {w} {y}", "{w} {d}, {y}", "{y}-{m:02d}-{d:02d}", "{d:02d}/{m:02d}/{y}")
AMOUNTS = ("${w}", "${w}.{c:02d}", "€{w}.{c:02d}", "£{w}", "{w} euros", "{w} dollars")


def _date(draw: Draw) -> str:
    """A date in one of six ways of writing it. Days stop at 28, so every date exists."""
    day, month, year = draw.between(1, 28), draw.between(1, 12), draw.between(2019, 2027)
    return draw.pick(DATES).format(d=day, w=MONTHS[month - 1], m=month, y=year)


def _amount(draw: Draw) -> str:
    """A sum of money in one of six ways of writing it."""
    whole, cents = draw.between(5, 980), draw.between(1, 19) * 5
    return draw.pick(AMOUNTS).format(w=whole, c=cents)


def make_row(draw: Draw, index: int) -> MadeRow:
    field = FIELDS[index % len(FIELDS)]
    template = draw.pick([text for text in TEMPLATES if "{" + field + "}" in text])
    values = {"city": draw.pick(CITIES), "date": _date(draw), "amount": _amount(draw), "name": draw.pick(NAMES)}
    letters = "ABCDEFGHKLMNPRSTUVWXYZ"
    message = template.format(
        **values,
        time=f"{draw.between(7, 21)}:{draw.between(0, 11) * 5:02d}",
        number=draw.between(2, 60),
        code=draw.pick(letters) + draw.pick(letters) + str(draw.between(1000, 9999)),
    )
    # The key is the message: one message is never asked about twice, not even for two different fields.
    return MadeRow(message, draw.pick(LAYOUTS).format(field=field, message=message), values[field])


EXTRACT = TaskRecipe("task03_message_field", seed=303, make_row=make_row)
