"""The commands of a learner: what they print, their exit codes, and that they leave the learner's files alone."""

import json
import webbrowser
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import typer

from autograde.commands import check, doctor, grade, progress, reset
from autograde.course import Course
from autograde.doctor import Finding
from autograde.grades import CheckGrade, ExerciseGrade, LessonGrade, Repair
from tests.autograde import grading

FAILED = ExerciseGrade("double", "failed", 1, 3, ("Keep the [sign]",), (CheckGrade("check-double", 1, 3),))
PASSED = ExerciseGrade("half", "passed", 3, 3, (), (CheckGrade("check-half", 3, 3),))
PARTIAL = LessonGrade(
    grading.STEM, "1.1", "Small sums", 4, 6, (FAILED, PASSED), (Repair("half", "it had moved"),), ("no sandbox: x",)
)


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    """A course with one lesson, both of whose exercises the learner has answered, one wrongly."""
    course = Course(tmp_path)
    parsed = grading.small(course.solutions)
    path = course.notebook(parsed.path)
    path.parent.mkdir(parents=True)
    path.write_text(nbformat.writes(grading.answered(parsed, double="def double(x):\n    return 3 * x")))
    for module in (check, doctor, grade, progress, reset):
        monkeypatch.setattr(module, "find", lambda: course)
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    monkeypatch.setenv("COLUMNS", "100")
    return course


@pytest.fixture
def fake_grading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "grade_notebook", lambda lesson, submitted, html: replace(PARTIAL, html="<p>"))


def snapshot(course: Course) -> dict[Path, bytes]:
    return {
        path: path.read_bytes() for path in course.root.rglob("*") if path.is_file() and ".course" not in path.parts
    }


def test_a_real_check_touches_neither_my_work_nor_the_sources(
    course: Course, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(course)
    with pytest.raises(typer.Exit) as exit_code:
        check.check(["1.1"], json_output=True, html=True)
    assert exit_code.value.exit_code == 1
    assert snapshot(course) == before
    assert sorted(path.name for path in course.state.rglob("*") if path.is_file()) == [
        f"{grading.STEM}.html",
        "progress.json",
        "progress.lock",
    ]
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["points"], found["max_points"]) == (3, 6)
    assert found["exercises"][0]["messages"] == ["Twice three is six: add the number to itself", "Keep the sign"]
    assert found["exercises"][0]["hint"] == "What is `x + x`?"
    progress.progress(json_output=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["number"], row["points"], row["max_points"]) == ("1.1", 3, 6)


@pytest.mark.usefixtures("fake_grading")
def test_what_a_learner_reads(course: Course, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit):
        check.check(["1"])
    printed = capsys.readouterr().out
    for expected in ("double", "1 / 3", "not yet", "Keep the [sign]", "Hint: What is `x + x`?", "it had moved"):
        assert expected in printed
    assert "no sandbox: x" in printed
    assert "4 of 6 points" in printed
    assert "Traceback" not in printed
    progress.progress()
    printed = capsys.readouterr().out
    assert "1.1 Small sums" in printed
    assert "4 of 6 points on 1 lesson." in printed
    assert "Next: 1.1 Small sums" in printed


def test_full_points_are_success(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    full = replace(PARTIAL, points=6)
    monkeypatch.setattr(check, "grade_notebook", lambda lesson, submitted, html: full)
    check.check(["1.1"])


def test_a_reset_says_where_my_work_is(course: Course, capsys: pytest.CaptureFixture[str]) -> None:
    reset.reset("1.1")
    (backup,) = (course.state / "backups").iterdir()
    printed = capsys.readouterr().out
    assert f"kept as {backup}" in printed
    reset.reset("1.1")
    assert "is fresh already" in capsys.readouterr().out


@pytest.mark.parametrize(("state", "code"), [("optional", 0), ("missing", 1)])
def test_the_doctors_exit_code(
    course: Course, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    monkeypatch.setattr(doctor, "gather", lambda course: None)
    finding = Finding("torch", state, "9.9", "make lab")  # type: ignore[arg-type]
    monkeypatch.setattr(doctor, "examine", lambda facts: [finding])
    if code:
        with pytest.raises(typer.Exit):
            doctor.doctor()
    else:
        doctor.doctor()
    assert "To mend torch:\n  make lab" in capsys.readouterr().out


def test_a_class_with_a_broken_submission(course: Course, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    broken = tmp_path / "in" / "cem" / f"{grading.STEM}.ipynb"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(typer.Exit):
        grade.grade(tmp_path / "in")
    printed = capsys.readouterr().out
    assert f"cem {grading.STEM}: not graded" in printed
    assert str(tmp_path / "graded") in printed
    assert (tmp_path / "graded" / "grades.csv").exists()
