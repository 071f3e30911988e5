"""What training drills before it reads: names and words that must be told apart to find what goes with them."""

from collections.abc import Callable, Sequence

from . import names
from .draw import Draw

VALUES: tuple[Callable[[Draw], str], ...] = (
    names.thing,
    names.place,
    names.person,
    lambda draw: str(draw.between(100, 999)),
    lambda draw: str(draw.between(10, 99)),
)
"""Makers of what can go with a name."""


def pairs(draw: Draw) -> str:
    """Pairs of names in one layout, four times, each time in another order: the plainest look-up there is."""
    key, value = draw.pick((names.thing, names.place)), draw.pick((names.thing, names.place))
    told = [(key(draw), value(draw)) for _ in range(draw.between(2, 5))]
    return "\n".join("; ".join(f"{a}: {b}" for a, b in draw.order(told)) for _ in range(4))


def lookup(draw: Draw) -> str:
    """Pairs, and each of them asked back twice, in other orders: only the name tells the value."""
    key = draw.pick((names.thing, names.place, names.person))
    value = draw.pick(VALUES)
    told = [(key(draw), value(draw)) for _ in range(draw.between(2, 5))]
    joint = draw.pick((": ", " goes with ", " has ", " - ", ", "))
    end = draw.pick(("\n", "; ", ". "))
    turns = (told, draw.order(told), draw.order(told))
    return "\n".join(end.join(f"{a}{joint}{b}" for a, b in turn) for turn in turns)


def notices(draw: Draw, words: Sequence[str]) -> str:
    """Words in quotation marks and where they stand, asked back by the place and by the word: whoever answers must
    tell the words apart, as what is asked for and as what is asked about."""
    told = [(names.place(draw), word) for word in draw.order(words, draw.between(3, 6))]
    by_place = draw.pick(('{t} says "{w}".', 'In {t}: "{w}"', '{{"town": "{t}", "word": "{w}"}}'))
    by_word = draw.pick(('"{w}" is in {t}.', 'Who says "{w}"? {t}', '{{"word": "{w}", "town": "{t}"}}'))
    ways = draw.order((by_place, by_word))
    turns = [(way, draw.order(told)) for way in (ways[0], ways[1], ways[0])]
    return "\n".join(way.format(t=t, w=w) for way, turn in turns for t, w in turn)
