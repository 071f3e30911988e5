"""Puts a learner's prediction beside what was then measured."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
from IPython.display import display


class Outcome(NamedTuple):
    """One predicted number and what came of it."""

    what: str
    predicted: float
    measured: float


def compare(outcomes: Sequence[Outcome | tuple[str, float, float]], *, format: str) -> None:
    """Display predictions beside outcomes, with the differences; `format` as in `".1%"`.

    The difference of two shares is given in points: 95 % against 87.5 % is off by -7.5 points.
    """
    rows = [Outcome(*outcome) for outcome in outcomes]
    frame = pd.DataFrame(
        {
            "": [row.what for row in rows],
            "you predicted": [f"{row.predicted:{format}}" for row in rows],
            "measured": [f"{row.measured:{format}}" for row in rows],
            "off by": [_difference(row.measured - row.predicted, format) for row in rows],
        }
    )
    display(frame.style.hide(axis="index"))


def _difference(value: float, format: str) -> str:
    if format.endswith("%"):
        return f"{100 * value:+{format[:-1]}f} points"
    return f"{value:+{format}}"
