"""Progress survives a kill, a corrupt file and two checks at once; hints follow the failed attempts."""

from datetime import datetime
from pathlib import Path
from threading import Thread

import pytest

from autograde import progress
from autograde.grades import CheckGrade, ExerciseGrade, LessonGrade, State
from tests.autograde import grading

NOW = datetime(2026, 11, 23, 8, 5)
HINTS = {"double": ("first", "second"), "half": ()}


def graded(lesson: str = "1_1_small_sums", **states: State) -> LessonGrade:
    exercises = tuple(
        ExerciseGrade(name, state, 2.0 * (state == "passed"), 2.0, (), (CheckGrade(f"check-{name}", 0, 2),))
        for name, state in states.items()
    )
    return LessonGrade(lesson, "1.1", "Small sums", sum(e.points for e in exercises), 2.0 * len(exercises), exercises)


def hint(state: Path, **states: State) -> list[str]:
    grade, note = progress.record(state, graded(**states), HINTS, NOW)
    assert note == ""
    return [exercise.hint for exercise in grade.exercises]


def test_each_failed_check_shows_the_next_hint(tmp_path: Path) -> None:
    assert hint(tmp_path, double="unanswered", half="failed") == ["", ""]
    assert hint(tmp_path, double="failed", half="failed") == ["first", ""]
    assert hint(tmp_path, double="failed", half="passed") == ["second", ""]
    assert hint(tmp_path, double="unanswered", half="passed") == ["", ""]
    assert hint(tmp_path, double="failed", half="passed") == ["second", ""]
    assert hint(tmp_path, double="passed", half="passed") == ["", ""]
    assert hint(tmp_path, double="failed", half="passed") == ["first", ""]


def test_what_was_recorded_is_read_back(tmp_path: Path) -> None:
    progress.record(tmp_path / ".course", graded(double="passed", half="failed"), HINTS, NOW)
    lessons, note = progress.read(tmp_path / ".course", NOW)
    assert note == ""
    tried = {"double": progress.Tried(2.0, 2.0, 0), "half": progress.Tried(0.0, 2.0, 1)}
    assert lessons == {"1_1_small_sums": progress.Checked(2.0, 4.0, "2026-11-23T08:05:00", tried)}


def test_the_map_has_every_lesson(tmp_path: Path) -> None:
    lessons = [grading.small(tmp_path), grading.small(tmp_path, stem="1_2_more_sums")]
    progress.record(tmp_path, graded(double="passed"), HINTS, NOW)
    first, second = progress.rows(lessons, progress.read(tmp_path, NOW)[0])
    assert (first.number, first.points, first.max_points, first.exercises) == ("1.1", 2.0, 6, 2)
    assert (second.points, second.max_points, second.checked) == (0.0, 6, "")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 9, "lessons": {}}', '{"version": 1, "lessons": {"x": {}}}']
)
def test_an_unreadable_file_is_set_aside_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "progress.json").write_text(text)
    (tmp_path / "progress-unreadable-20261123-080500.json").write_text("an earlier one")
    grade, note = progress.record(tmp_path, graded(double="failed"), HINTS, NOW)
    assert "is kept as progress-unreadable-20261123-080500-2.json" in note
    assert (tmp_path / "progress-unreadable-20261123-080500-2.json").read_text() == text
    assert (tmp_path / "progress-unreadable-20261123-080500.json").read_text() == "an earlier one"
    assert grade.exercises[0].hint == "first"
    assert list(progress.read(tmp_path, NOW)[0]) == ["1_1_small_sums"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress.record(tmp_path, graded(double="passed"), HINTS, NOW)
    before = (tmp_path / "progress.json").read_text()

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(progress.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        progress.record(tmp_path, graded(double="failed"), HINTS, NOW)
    assert (tmp_path / "progress.json").read_text() == before


def test_a_second_check_waits_until_the_first_has_written(tmp_path: Path) -> None:
    with progress._locked(tmp_path / "progress.lock"):
        second = Thread(target=progress.record, args=(tmp_path, graded(double="failed"), HINTS, NOW))
        second.start()
        second.join(timeout=1)
        assert second.is_alive()
        assert not (tmp_path / "progress.json").exists()
    second.join()
    assert list(progress.read(tmp_path, NOW)[0]) == ["1_1_small_sums"]
