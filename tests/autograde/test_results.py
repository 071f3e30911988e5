"""Measured numbers in prose."""

import json
from pathlib import Path

import pytest

from autograde.errors import CourseError
from autograde.results import LessonResults, Result, fill, read

MEASURED = LessonResults(
    {
        "exact_match": Result(0.9731, ".1%", low=0.96, high=0.985),
        "bytes": Result(184320, ",d"),
        "parity": Result(2.4e-7, ".0e", tolerance=1e-6),
    },
    {"seconds": 61.6, "peak_mib": 1203.2},
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from {{exact_match}} on", "from 97.3% on"),
        ("{{ exact_match:interval }}", "96.0% to 98.5%"),
        ("{{bytes}} bytes, off by {{parity}}", "184,320 bytes, off by 2e-07"),
        ("{{run:seconds}} s and {{run:peak_mib}} MiB", "62 s and 1,203 MiB"),
        (r"$\frac{{a}}{b}$ and {x}", r"$\frac{{a}}{b}$ and {x}"),
    ],
)
def test_fill(text: str, expected: str) -> None:
    unknown: list[str] = []
    filled = fill(text, MEASURED, unknown.append)
    if "frac" in text:  # LaTeX's double braces look like a placeholder: refused by name instead of filled wrongly
        assert unknown == ["{{a}}"]
    else:
        assert unknown == []
    assert filled == expected


@pytest.mark.parametrize("placeholder", ["{{recall}}", "{{bytes:interval}}", "{{run:joules}}", "{{run}}"])
def test_what_was_not_measured_is_reported_and_left(placeholder: str) -> None:
    unknown: list[str] = []
    assert fill(f"a {placeholder} b", MEASURED, unknown.append) == f"a {placeholder} b"
    assert unknown == [placeholder]


def test_agreement_is_the_interval_widened_by_the_tolerance() -> None:
    exact = Result(3, "d")
    assert exact.agrees(3)
    assert not exact.agrees(3.0001)
    assert exact.agrees(3.000002)  # float32 on another processor
    assert not exact.agrees(3.000004)
    measured = Result(0.9, ".2f", low=0.85, high=0.95, tolerance=0.01)
    assert measured.agrees(0.841)
    assert measured.agrees(0.959)
    assert not measured.agrees(0.83)
    assert not measured.agrees(0.97)
    assert not measured.agrees(float("nan"))


def test_read_round_trip_and_missing(tmp_path: Path) -> None:
    path = tmp_path / "2_1_x.json"
    assert read(path) == LessonResults()
    entry = {"value": 0.5, "format": ".2f", "low": 0.4, "high": 0.6, "label": "exact match"}
    path.write_text(json.dumps({"lesson": "2_1_x", "results": {"em": entry}, "run": {"seconds": 3}}))
    assert read(path) == LessonResults({"em": Result(0.5, ".2f", 0.4, 0.6)}, {"seconds": 3})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {"em": {"format": ".2f"}}}', '{"results": 3}'])
def test_a_broken_file_says_how_to_make_it_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "2_1_x.json"
    path.write_text(text)
    with pytest.raises(CourseError, match="course run --save"):
        read(path)
