"""Reads `results/<lesson>.json` and puts its numbers into prose, so that no number there is typed by hand.

`{{exact_match}}` becomes the value, `{{exact_match:interval}}` its interval; `{{run:seconds}}` and `{{run:peak_mib}}`
are what the last saved run measured.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from autograde.errors import CourseError

_PLACEHOLDER = re.compile(r"\{\{\s*(?P<name>[a-z][a-z0-9_]*)(:(?P<part>[a-z_]+))?\s*\}\}")

_ROUNDING = 1e-6
"""Relative difference that another processor makes: sums of float32 (7 digits) are taken in another order there."""


@dataclass(frozen=True)
class Result:
    """One measured number: its value, how to print it, and within what a rerun must fall."""

    value: float
    format: str
    low: float | None = None
    high: float | None = None
    tolerance: float = 0.0

    def text(self, part: str | None = None) -> str:
        """The value as prose, or its interval. Raises `KeyError` for a part that is not there."""
        if part is None:
            return format(self.value, self.format)
        if part == "interval" and self.low is not None and self.high is not None:
            return f"{format(self.low, self.format)} to {format(self.high, self.format)}"
        raise KeyError(part)

    def agrees(self, other: float) -> bool:
        """Whether a rerun's value lies within the interval, widened by the tolerance or, if more, by rounding."""
        low = self.value if self.low is None else min(self.low, self.value)
        high = self.value if self.high is None else max(self.high, self.value)
        slack = max(self.tolerance, _ROUNDING * abs(self.value))
        return low - slack <= other <= high + slack


@dataclass(frozen=True)
class LessonResults:
    """What one saved run of a lesson measured."""

    numbers: dict[str, Result] = field(default_factory=dict)
    run: dict[str, float] = field(default_factory=dict)

    def text(self, name: str, part: str | None = None) -> str:
        """The prose of one placeholder. Raises `KeyError` when nothing of that name was measured."""
        if name == "run":
            return f"{self.run[part or '']:,.0f}"
        return self.numbers[name].text(part)


def read(path: Path) -> LessonResults:
    """Read a result file; a missing one is empty.

    Raises `CourseError` when the file is not what `labkit.results` writes.
    """
    if not path.exists():
        return LessonResults()
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        numbers = {
            name: Result(
                entry["value"],
                entry["format"],
                entry.get("low"),
                entry.get("high"),
                entry.get("tolerance", 0.0),
            )
            for name, entry in data["results"].items()
        }
        return LessonResults(numbers, data.get("run", {}))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CourseError(f"{path} is not a result file ({error!r}); make it again with `course run --save`") from error


def fill(text: str, results: LessonResults, unknown: Callable[[str], None]) -> str:
    """Replace every placeholder of `text`; call `unknown` with each one that nothing was measured for."""

    def replace(match: re.Match[str]) -> str:
        try:
            return results.text(match["name"], match["part"])
        except KeyError:
            unknown(match[0])
            return match[0]

    return _PLACEHOLDER.sub(replace, text)
