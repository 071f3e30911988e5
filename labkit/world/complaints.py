"""How customers write, and how clerks write about it: the language of tickets and of the prose that handles them.

Every phrase belongs to one category, urgency or action, so a ticket's triage follows from its words; the words of the
labels (except everyday ones) do not occur. The pretraining stream pairs the same messages with prose on desks, haste
and remedies, never with labels or JSON.
"""

from dataclasses import dataclass

from . import names
from .draw import Draw

PROBLEMS = {
    "billing": (
        "I was charged twice for {o}",
        "the invoice for {o} shows the wrong sum",
        "you took money for {o} two times",
        "the bill for {o} is higher than agreed",
        "the discount on {o} is missing from the bill",
        "my card was debited too much for {o}",
        "the tax on the invoice for {o} is wrong",
        "I paid for {o} and got a reminder",
        "the receipt for {o} never came",
        "I see a fee for {o} that nobody mentioned",
    ),
    "delivery": (
        "the parcel with {o} has not arrived",
        "the carrier left {o} at a wrong address",
        "I am still waiting for {o} to come",
        "{o} was sent to my old street",
        "the driver never rang and took {o} back",
        "the tracking of {o} stopped a week ago",
        "only half of the boxes for {o} came",
        "the truck with {o} did not show up",
        "the van brought a box that is not {o}",
        "the shipment of {o} is lost on the way",
    ),
    "defect": (
        "{o} broke on the first day",
        "{o} makes a grinding noise",
        "smoke comes out of {o}",
        "the lid of {o} is cracked",
        "{o} stops after a minute",
        "the switch on {o} is dead",
        "{o} leaks from below",
        "the screen of {o} stays black",
        "a handle of {o} snapped off",
        "{o} runs far too hot",
    ),
    "account": (
        "I cannot log in to register {o}",
        "my password for the page of {o} is refused",
        "I am locked out of the portal for {o}",
        "the code to sign in for {o} never reaches me",
        "my profile no longer lists {o}",
        "the site forgot that I own {o}",
        "my user name for {o} is taken by somebody",
        "the login page for {o} sends me in circles",
        "I want to change the mail address under which I own {o}",
        "my session for {o} ends as soon as I sign in",
    ),
    "setup": (
        "I do not know how to start {o}",
        "which cable goes into {o} first",
        "the manual of {o} skips a step",
        "I cannot find the menu for the clock on {o}",
        "how do I put {o} on the wall",
        "what do the lights on {o} mean",
        "I do not see how to clean {o}",
        "how do I connect {o} to the network",
        "which setting of {o} is right for winter",
        "the first steps with {o} are not clear to me",
    ),
}

REQUESTS = {
    "refund": (
        "Please send my money back.",
        "I want the sum returned.",
        "Give me back what I paid.",
        "Kindly return the payment.",
        "I would like my money again.",
        "Please pay the amount back.",
    ),
    "replace": (
        "Please send a new one.",
        "I want another unit.",
        "Could I have a fresh one instead?",
        "Send me a different one.",
        "I ask for an exchange.",
        "Please swap it for a new one.",
    ),
    "repair": (
        "Please have it mended.",
        "Can a fitter come and fix it?",
        "I want it fixed.",
        "Please send somebody to mend it.",
        "Could your workshop put it right?",
        "Someone should come and fix it.",
    ),
    "explain": (
        "Please write to me how this works.",
        "Tell me what to do, step by step.",
        "Could you send me the steps?",
        "I need a short note on what to do.",
        "Please describe it to me in writing.",
        "Write me what I have to do.",
    ),
    "call": (
        "Please ring me.",
        "I would rather talk on the phone.",
        "Could somebody phone me?",
        "Ring me on my number.",
        "I want to speak with a person.",
        "Give me a ring, please.",
    ),
}

ALLOWED = {
    "billing": ("refund", "explain", "call"),
    "delivery": ("refund", "replace", "call"),
    "defect": ("refund", "replace", "repair"),
    "account": ("repair", "explain", "call"),
    "setup": ("repair", "explain", "call"),
}

HASTE = {
    "low": (
        "There is no hurry.",
        "Take your time.",
        "It can wait a month.",
        "Whenever you find a moment.",
        "Some day is fine.",
        "This is not pressing at all.",
    ),
    "normal": (
        "",
        "This week would be good.",
        "Some time in the next days, please.",
        "By Friday would be fine.",
    ),
    "high": (
        "We need this today!",
        "Our whole line stands still.",
        "Please act at once.",
        "It cannot wait another hour.",
        "Every minute costs us money!",
        "Drop everything else, please.",
    ),
}

GREETINGS = ("Hello!", "Good morning!", "Dear team!", "Hi there!", "To whom it may concern:", "Good evening!")
CLOSINGS = ("Thanks,", "Regards,", "Yours,", "Best wishes,", "With thanks,")
NAMELESS = ("it", "the thing", "my order", "the unit")
ASIDES = (
    "Also, {x}, but leave that for now.",
    "By the way, {x}; forget that for the moment.",
    "Before you ask: {x}, but that is not why I write.",
)

DESKS = {
    "billing": ("the counting room", "the people who handle sums"),
    "delivery": ("the freight hall", "the people who handle parcels"),
    "defect": ("the test bench", "the people who handle broken parts"),
    "account": ("the key office", "the people who handle logins"),
    "setup": ("the advice desk", "the people who handle first steps"),
}
PACES = {
    "low": ("It went to the bottom of the pile.", "Nobody had to rush.", "It was left for a quiet month."),
    "normal": ("It took its usual turn.", "It was dealt with within the week.", "It stood in the middle of the pile."),
    "high": (
        "It went to the top of the pile.",
        "Everybody dropped what they did.",
        "It was dealt with within the hour.",
    ),
}
REMEDIES = {
    "refund": ("The customer got the money back.", "The sum was paid back.", "A payment went back to the customer."),
    "replace": ("The customer got a new one.", "Another unit was sent out.", "It was swapped for a fresh one."),
    "repair": ("A fitter came to mend it.", "It was mended.", "Somebody went there to fix it."),
    "explain": (
        "The customer got a note with the steps.",
        "The steps were sent in writing.",
        "A clerk wrote down what to do.",
    ),
    "call": ("A clerk rang the customer.", "The customer got a ring.", "They talked it over on the phone."),
}


@dataclass(frozen=True)
class Complaint:
    """A message with the choices behind it; `product` is None when the message names none."""

    text: str
    product: str | None
    category: str
    urgency: str
    action: str


def misspell(draw: Draw, word: str) -> str:
    """The word with one slip of the fingers: two letters swapped, one dropped or one doubled."""
    slip = draw.pick(("swap", "drop", "double"))
    i = 1 + draw.below(len(word) - 3)
    if slip == "swap":
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    return word[:i] + word[i + 1 :] if slip == "drop" else word[:i] + word[i] + word[i:]


def noisy(draw: Draw, text: str, rate: float) -> str:
    """The text with slips in lower-case words of five letters or more, each with probability `rate`; names stay
    intact."""
    words = text.split(" ")
    able = [len(w) >= 5 and w.isascii() and w.isalpha() and w.islower() for w in words]
    return " ".join(misspell(draw, w) if ok and draw.chance(rate) else w for w, ok in zip(words, able, strict=True))


def complaint(draw: Draw, products: tuple[str, ...] | None, *, rate: float = 0.03) -> Complaint:
    """Draw a message about one of the products, or about one with a fresh name when `products` is None."""
    category = draw.pick(tuple(PROBLEMS))
    action = draw.pick(ALLOWED[category])
    urgency = draw.pick(tuple(HASTE))
    product = None
    if not draw.chance(0.1):
        product = draw.pick(products) if products else names.thing(draw)
    mention = f"the {product}" if product else draw.pick(NAMELESS)
    problem = draw.pick(PROBLEMS[category]).format(o=mention)
    parts = [problem[0].upper() + problem[1:] + "."]
    if draw.chance(0.25):
        other = draw.pick(tuple(key for key in PROBLEMS if key != category))
        aside = draw.pick(ASIDES).format(x=draw.pick(PROBLEMS[other]).format(o="it"))
        parts.insert(draw.below(2), aside)
    wish = [draw.pick(REQUESTS[action]), draw.pick(HASTE[urgency])]
    parts += draw.order(wish) if wish[1] else wish[:1]
    body = noisy(draw, " ".join(parts), rate)
    if draw.chance(0.5):
        body = f"{draw.pick(GREETINGS)} {body}"
    if draw.chance(0.4):
        body = f"{body} {draw.pick(CLOSINGS)} {names.person(draw)}"
    return Complaint(body, product, category, urgency, action)


def handling(draw: Draw, letter: Complaint) -> str:
    """What the clerks did about a message, in prose: the desk, the product, the pace, the remedy, in a drawn order."""
    about = f'"{letter.product}"' if letter.product else "no name"
    desk = draw.pick(DESKS[letter.category])
    first = draw.pick(
        (f"The message went to {desk}.", f"This was work for {desk}.", f"It was {desk} that took the letter.")
    )
    second = draw.pick((f"The subject line says {about}.", f"Under product the clerk wrote {about}."))
    return " ".join(draw.order((first, second, draw.pick(PACES[letter.urgency]), draw.pick(REMEDIES[letter.action]))))
