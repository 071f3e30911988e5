"""What things exist and what can be said of them: kinds of entities, their attributes, the values these take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import names
from .draw import Draw

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A type of value. `pool` names the kind of entity that a world draws the value from, if any."""

    draw: Callable[[Draw], str]
    pool: str | None = None
    preposition: str = ""
    numeric: bool = False


def person() -> Value:
    """A full name."""
    return Value(names.person, pool="person")


def place() -> Value:
    """A town."""
    return Value(names.place, pool="place", preposition="In")


def number(low: int, high: int, unit: str = "", *, step: int = 1) -> Value:
    """A whole number with its unit, uniform over low, low + step, ..., high."""

    def sample(draw: Draw) -> str:
        return f"{low + step * draw.below((high - low) // step + 1)} {unit}".strip()

    return Value(sample, numeric=True)


def month() -> Value:
    """A month of a year, 2011 to 2048."""
    return Value(lambda draw: f"{draw.pick(MONTHS)} {draw.between(2011, 2048)}", preposition="In")


def year() -> Value:
    """A year, 1951 to 2048."""
    return Value(lambda draw: str(draw.between(1951, 2048)), preposition="In")


def word(options: str) -> Value:
    """One of the words of a blank-separated list."""
    words = options.split()
    return Value(lambda draw: draw.pick(words))


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of a kind of entity.

    `statements` hold {v} (the value) and one of {s}, {o}, {p}: the entity as a subject that starts the sentence,
    inside it, or as an owner. `questions` hold {o} or {p}. `via` (for names) says the value without naming it;
    `more` (for numbers) is the comparative.
    """

    key: str
    label: str
    value: Value
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    via: str | None = None
    more: str | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of entity. `mention` holds {n}, its name; `name` draws a fresh name."""

    key: str
    domain: str
    mention: str
    plural: str
    name: Callable[[Draw], str]
    attributes: tuple[Attribute, ...]
    count: int

    def attribute(self, key: str) -> Attribute:
        """The attribute called key; KeyError says which there are."""
        for attribute in self.attributes:
            if attribute.key == key:
                return attribute
        raise KeyError(f"a {self.key} has no attribute {key!r}; it has {[a.key for a in self.attributes]}")


@dataclass(frozen=True)
class Reference:
    """How a sentence calls an entity: as the subject that opens it, inside it, and as an owner."""

    s: str
    o: str
    p: str


def by_name(kind: Kind, name: str) -> Reference:
    """The entity by its name."""
    mention = kind.mention.format(n=name)
    return Reference(mention[0].upper() + mention[1:], mention, f"{mention}'s")


def by_pronoun(kind: Kind, name: str) -> Reference:
    """The entity by its pronoun."""
    if kind.key in ("person", "sailor"):
        return Reference("She", "her", "her") if names.is_her(name) else Reference("He", "him", "his")
    return Reference("It", "it", "its")


GENERIC_STATEMENTS = (
    "The {label} of {o} is {v}.",
    "For {o}, the {label} is given as {v}.",
)
GENERIC_QUESTIONS = (
    "Name the {label} of {o}.",
    "What does the text give as the {label} of {o}?",
)
CHANGES = (
    "Until {d} the {label} of {o} was {w}; it is now {v}.",
    "In {d} the {label} of {o} changed from {w} to {v}.",
    "The {label} of {o} is {v} since {d}; before that it was {w}.",
)
QUESTIONS_NOW = (
    "What is the {label} of {o} now?",
    "What is the {label} of {o} today, after the change?",
)
QUESTIONS_THEN = (
    "What was the {label} of {o} before {d}?",
    "Before {d}, what was the {label} of {o}?",
)
COMPARISONS = (
    "Which is {more}, {a} or {b}?",
    "Of {a} and {b}, which is {more}?",
)
NOT_STATED = "Not stated"


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def fill(template: str, attribute: Attribute, reference: Reference, value: str = "", **slots: str) -> str:
    """A template's sentence."""
    text = template.format(label=attribute.label, v=value, s=reference.s, o=reference.o, p=reference.p, **slots)
    return capital(text)


def statement_options(attribute: Attribute, *, named: bool) -> Sequence[str]:
    """The ways to state an attribute. With a pronoun, only its own sentences; by name, the general ones too."""
    return attribute.statements + GENERIC_STATEMENTS if named else attribute.statements
