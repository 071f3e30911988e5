"""The numbers a lesson measures: recorded under a name, shown as a card, and written where prose and README read them.

A lesson makes one `ResultCard`, records each measured number once, and ends with `card.show()`. Every `record` rewrites
`<lesson>.json`, so a run that stops half-way leaves what it had measured by then.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from html import escape
from numbers import Integral
from pathlib import Path
from typing import SupportsFloat

from IPython.display import display

FOLDER_VARIABLE = "COURSE_RESULTS"
_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")


@dataclass(frozen=True)
class Measurement:
    """One measured number: what it is, how to print it, and within what a rerun must fall."""

    value: float
    format: str
    label: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    tolerance: float = 0.0

    @property
    def text(self) -> str:
        """The value as people read it, with its unit."""
        return f"{self.value:{self.format}} {self.unit}".strip()

    @property
    def interval(self) -> str:
        """The interval as people read it; empty when there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{self.low:{self.format}} to {self.high:{self.format}}"

    @property
    def holds_its_value(self) -> bool:
        """Whether the value lies in the interval, the rounding of a mean aside; true when there is none."""
        if self.low is None or self.high is None:
            return True
        slack = 1e-12 * max(abs(self.low), abs(self.high))
        return self.low - slack <= self.value <= self.high + slack

    def to_dict(self) -> dict[str, object]:
        """The entry of the result file; what was not given is left out."""
        entry: dict[str, object] = {
            "value": self.value,
            "format": self.format,
            "low": self.low,
            "high": self.high,
            "tolerance": self.tolerance,
            "label": self.label,
            "unit": self.unit,
        }
        return {key: value for key, value in entry.items() if value is not None}


class ResultCard:
    """The measured results of one lesson, by name.

    `lesson` is the stem of the lesson's file, such as `"2_1_lora_from_scratch"`. Results go to the folder that the
    environment variable `COURSE_RESULTS` names, else to `.course/results/` at the root of the course.
    """

    def __init__(self, lesson: str) -> None:
        if not re.fullmatch(r"\w+", lesson):
            raise ValueError(
                f"a lesson is named by the stem of its file, such as '2_1_lora_from_scratch'; not {lesson!r}"
            )
        self.lesson = lesson
        self.path = _folder() / f"{lesson}.json"
        self._measurements: dict[str, Measurement] = {}

    def record(
        self,
        name: str,
        value: SupportsFloat,
        *,
        format: str,
        label: str,
        unit: str = "",
        low: SupportsFloat | None = None,
        high: SupportsFloat | None = None,
        tolerance: float = 0.0,
    ) -> None:
        """Record one measured number and rewrite the result file.

        `name` is what prose writes as `{{name}}`; `format` a format specification (`".1%"`, `",d"`); `low` and `high`
        an interval that holds the value; `tolerance` by how much a rerun may fall outside it (in the value's own unit).
        Running a cell again replaces its number; another label under a name already taken is refused.

        Raises `ValueError` when a number is not finite, the interval does not hold the value, the format does not fit,
        or the name is malformed or taken.
        """
        if not _NAME.match(name):
            raise ValueError(f"a result is named in lower case with underscores, such as 'exact_match'; not {name!r}")
        if not label.strip():
            raise ValueError(f"{name}: label must say in words what was measured")
        taken = self._measurements.get(name)
        if taken is not None and taken.label != label:
            raise ValueError(f"{name!r} already names {taken.label!r}; give {label!r} a name of its own")
        if (low is None) != (high is None):
            raise ValueError(f"{name}: an interval needs both low and high")
        measurement = Measurement(
            _number(name, value),
            format,
            label,
            unit,
            None if low is None else _number(name, low),
            None if high is None else _number(name, high),
            _number(name, tolerance),
        )
        if not measurement.holds_its_value:
            raise ValueError(
                f"{name}: the interval {low} to {high} does not hold the value {value}; pass low <= value <= high"
            )
        if measurement.tolerance < 0:
            raise ValueError(f"{name}: tolerance must not be negative, it is {tolerance}")
        try:
            _ = measurement.text, measurement.interval
        except ValueError as error:
            raise ValueError(f"{name}: the format {format!r} does not fit {measurement.value!r}: {error}") from error
        self._measurements[name] = measurement
        self._write()

    def show(self) -> None:
        """Display the card: HTML in a notebook, which follows the theme; plain text elsewhere."""
        display(self)

    def to_dict(self) -> dict[str, object]:
        """What the result file holds."""
        results = {name: measurement.to_dict() for name, measurement in self._measurements.items()}
        return {"lesson": self.lesson, "results": results}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        beside.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def __repr__(self) -> str:
        rows = [(m.label, m.text, m.interval and f"[{m.interval}]") for m in self._measurements.values()]
        if not rows:
            return f"{self.lesson}: nothing recorded yet"
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = [f"{label:<{widths[0]}}  {text:>{widths[1]}}  {interval}".rstrip() for label, text, interval in rows]
        return "\n".join([self.lesson, *lines])

    def _repr_html_(self) -> str:
        rows = "".join(
            f'<tr style="background:none"><td style="text-align:left;padding:4px 24px 4px 0">{escape(m.label)}</td>'
            f'<td style="text-align:right;padding:4px 24px 4px 0;font-weight:600;font-variant-numeric:tabular-nums">'
            f"{escape(m.text)}</td>"
            f'<td style="text-align:left;padding:4px 0;opacity:.75;font-variant-numeric:tabular-nums">'
            f"{escape(m.interval)}</td></tr>"
            for m in self._measurements.values()
        )
        if not rows:
            rows = '<tr style="background:none"><td>Nothing recorded yet: run the cells above.</td></tr>'
        return (
            '<div style="display:inline-block;padding:12px 20px;margin:4px 0;'
            "border:1px solid var(--jp-border-color1,#bdbdbd);border-left:4px solid #0067c2;border-radius:4px;"
            'color:var(--jp-ui-font-color1,inherit);background:var(--jp-layout-color1,transparent)">'
            '<div style="font-weight:600;margin-bottom:6px">Measured in this run</div>'
            f'<table style="border:none;border-collapse:collapse;font-size:inherit;color:inherit">{rows}</table></div>'
        )


def _number(name: str, value: SupportsFloat) -> float:
    """`value` as a plain Python number; whole numbers stay whole, so that the format `d` fits them."""
    number = int(value) if isinstance(value, Integral) else float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name}: a result must be a finite number, not {number}")
    return number


def _folder() -> Path:
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "solutions").is_dir() and (folder / "pyproject.toml").is_file():
            return folder / ".course" / "results"
    return here / ".course" / "results"
