"""labkit.results: what is refused, what is written, what is shown."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from autograde import results as reader
from labkit.results import ResultCard


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COURSE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def test_what_is_recorded_is_what_the_builder_reads(folder: Path) -> None:
    card = ResultCard("2_1_lora")
    card.record("exact_match", 0.9625, format=".1%", low=0.94, high=0.98, tolerance=0.01, label="exact match")
    card.record("adapter_bytes", np.int64(123456), format=",d", label="adapter", unit="bytes")
    read = reader.read(folder / "2_1_lora.json")
    assert (
        reader.fill("{{exact_match}} ({{exact_match:interval}}), {{adapter_bytes}}", read, pytest.fail)
        == "96.2% (94.0% to 98.0%), 123,456"
    )
    assert read.numbers["exact_match"].agrees(0.935)
    assert not read.numbers["exact_match"].agrees(0.925)


def test_a_whole_number_stays_whole_and_every_number_type_is_taken(folder: Path) -> None:
    card = ResultCard("x")
    for position, value in enumerate([True, np.float32(1), torch.tensor(1.0), Fraction(1)]):
        card.record(f"n{position}", value, format=".0f", label=f"number {position}")
    entries = json.loads((folder / "x.json").read_text())["results"]
    assert [type(entry["value"]) for entry in entries.values()] == [int, float, float, float]


def test_an_interval_that_rounding_moved_off_its_value_holds_it(folder: Path) -> None:
    card = ResultCard("x")
    card.record("share", 1.0, low=0.8, high=0.9999999999999998, format=".0%", label="share")
    with pytest.raises(ValueError, match="does not hold"):
        card.record("tiny", 1e-13, low=2e-13, high=3e-13, format=".0e", label="a small share")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Exact Match"}, "lower case with underscores"),
        ({"name": "exact-match"}, "lower case with underscores"),
        ({"value": float("nan")}, "finite"),
        ({"high": float("inf")}, "finite"),
        ({"low": None}, "needs both low and high"),
        ({"low": 0.6}, "does not hold the value 0.5"),
        ({"high": 0.4}, "does not hold the value 0.5"),
        ({"tolerance": -0.1}, "must not be negative"),
        ({"format": "d"}, "does not fit"),
        ({"label": " "}, "label"),
    ],
)
def test_a_bad_record_is_refused_and_leaves_no_trace(folder: Path, change: dict[str, object], message: str) -> None:
    good = {"name": "share", "value": 0.5, "format": ".2f", "low": 0.4, "high": 0.6, "label": "share"}
    arguments = {**good, **change}
    card = ResultCard("x")
    with pytest.raises(ValueError, match=message):
        card.record(arguments.pop("name"), arguments.pop("value"), **arguments)  # type: ignore[arg-type]
    assert not (folder / "x.json").exists()


def test_running_a_cell_again_replaces_its_number_but_a_second_meaning_is_refused(folder: Path) -> None:
    card = ResultCard("x")
    card.record("loss", 2.0, format=".2f", label="loss before")
    card.record("loss", 1.0, format=".2f", label="loss before")
    with pytest.raises(ValueError, match="already names 'loss before'"):
        card.record("loss", 0.5, format=".2f", label="loss after")
    assert reader.read(folder / "x.json").numbers["loss"].value == 1.0


def test_a_new_run_forgets_what_the_last_one_measured(folder: Path) -> None:
    ResultCard("x").record("old", 1, format="d", label="old")
    ResultCard("x").record("new", 2, format="d", label="new")
    assert set(reader.read(folder / "x.json").numbers) == {"new"}


def test_a_failed_write_keeps_the_file_of_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ResultCard("x")
    card.record("a", 1, format="d", label="a")
    before = (folder / "x.json").read_bytes()
    monkeypatch.setattr(Path, "write_text", _full_disk)
    with pytest.raises(OSError, match="disk"):
        card.record("b", 2, format="d", label="b")
    assert (folder / "x.json").read_bytes() == before


def _full_disk(*_: object, **__: object) -> int:
    raise OSError("no space on the disk")


def test_without_the_variable_results_go_to_the_course_of_the_notebook(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "solutions").mkdir()
    (tmp_path / "pyproject.toml").touch()
    deep = tmp_path / "notebooks" / "1_foundations"
    deep.mkdir(parents=True)
    monkeypatch.delenv("COURSE_RESULTS", raising=False)
    monkeypatch.chdir(deep)
    assert ResultCard("x").path == tmp_path / ".course" / "results" / "x.json"


def test_a_lesson_name_cannot_leave_the_folder(folder: Path) -> None:
    with pytest.raises(ValueError, match="stem of its file"):
        ResultCard("../x")


def test_the_card_shows_every_number_and_escapes_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = ResultCard("1_1_bench")
    assert "nothing recorded" in repr(card)
    card.record("gap", 0.125, format=".3f", low=0.1, high=0.15, label="a < b & c", unit="nats")
    card.show()
    assert capsys.readouterr().out.splitlines()[:2] == ["1_1_bench", "a < b & c  0.125 nats  [0.100 to 0.150]"]
    html = card._repr_html_()
    assert "a &lt; b &amp; c" in html
    assert "0.125 nats" in html
    assert "0.100 to 0.150" in html
