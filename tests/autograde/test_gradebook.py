"""A class graded into one folder that nbgrader itself can work with, broken submissions and all."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbgrader.api import Gradebook

from autograde import classroom
from autograde.classroom import Row, find_submissions, grade_class
from autograde.course import Course
from autograde.errors import CourseError
from autograde.lesson import Lesson
from tests.autograde import grading
from tests.conftest import ROOT

NESTED = "1_sums/1_1_small_sums.ipynb"


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Course:
    root = tmp_path_factory.mktemp("course")
    for stem in ("1_1_small_sums", "1_2_more_sums"):
        grading.small(root / "solutions", stem=stem)
    return Course(root)


@pytest.fixture(scope="module")
def lessons(course: Course) -> list[Lesson]:
    return [grading.lesson.load(source) for source in course.sources()]


def hand_in(path: Path, notebook: nbformat.NotebookNode) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(notebook), encoding="utf-8")


@pytest.fixture(scope="module")
def graded(course: Course, lessons: list[Lesson]) -> tuple[list[Row], list[Path], Path]:
    """Ada is right in both lessons, Ben wrong and flat, Cem's file is cut off, Dia handed in twice."""
    first, second = lessons
    folder = course.root / "handed-in"
    hand_in(folder / "ada" / NESTED, grading.answered(first))
    hand_in(folder / "ada/1_sums/1_2_more_sums.ipynb", grading.answered(second))
    hand_in(folder / "ada/.ipynb_checkpoints/1_1_small_sums.ipynb", grading.answered(first))
    hand_in(folder / "ben/1_1_small_sums.ipynb", grading.answered(first, half="def half(x):\n    return x"))
    hand_in(folder / "ben/holiday.ipynb", nbformat.v4.new_notebook())
    hand_in(folder / "cem" / NESTED, grading.answered(first))
    cut = (folder / "cem" / NESTED).read_bytes()[:500]
    (folder / "cem" / NESTED).write_bytes(cut)
    hand_in(folder / "dia" / NESTED, grading.answered(first))
    hand_in(folder / "dia/1_1_small_sums.ipynb", grading.answered(first))
    before = {path: path.read_bytes() for path in folder.rglob("*.ipynb")}
    out = course.root / "out"
    told: list[Row] = []
    rows, ignored = grade_class(course, folder, out, grading.SHORT, told.append)
    assert told == rows
    assert {path: path.read_bytes() for path in folder.rglob("*.ipynb")} == before
    return rows, ignored, out


def test_everyone_gets_a_row(graded: tuple[list[Row], list[Path], Path]) -> None:
    rows, ignored, _ = graded
    found = [(row.student, row.lesson, row.grade.points if row.grade else None) for row in rows]
    assert found == [
        ("ada", "1_1_small_sums", 6),
        ("ada", "1_2_more_sums", 6),
        ("ben", "1_1_small_sums", 3),
        ("cem", "1_1_small_sums", None),
        ("dia", "1_1_small_sums", None),
        ("dia", "1_1_small_sums", None),
    ]
    assert "cannot be read as a notebook" in rows[3].problem
    assert "handed in twice" in rows[4].problem
    assert [path.name for path in ignored] == ["holiday.ipynb"]


def test_the_tables(graded: tuple[list[Row], list[Path], Path]) -> None:
    out = graded[2]
    with (out / "grades.csv").open(newline="", encoding="utf-8") as file:
        grades = list(csv.DictReader(file))
    assert [(row["student"], row["points"], row["max_points"]) for row in grades[:3]] == [
        ("ada", "6.0", "6"),
        ("ada", "6.0", "6"),
        ("ben", "3.0", "6"),
    ]
    with (out / "exercises.csv").open(newline="", encoding="utf-8") as file:
        (wrong,) = [row for row in csv.DictReader(file) if row["state"] == "failed"]
    assert (wrong["student"], wrong["exercise"]) == ("ben", "half")
    assert wrong["message"] == "Half of three is one and a half: divide with /"


def test_nbgraders_gradebook_has_the_scores(graded: tuple[list[Row], list[Path], Path]) -> None:
    with Gradebook(f"sqlite:///{graded[2] / 'gradebook.db'}", "") as gradebook:
        scores = {student.id: student.score for student in gradebook.students}
        assert gradebook.find_assignment("1_sums").max_score == 12
    assert scores == {"ada": 12, "ben": 3}


def test_the_pages_for_students_show_no_hidden_test(graded: tuple[list[Row], list[Path], Path]) -> None:
    pages = sorted((graded[2] / "feedback").rglob("*.html"))
    assert [page.parts[-3] for page in pages] == ["ada", "ada", "ben"]
    assert not [page for page in pages if "secret_number" in page.read_text(encoding="utf-8")]


def test_the_form_graders_notebook_keeps_the_hidden_tests(graded: tuple[list[Row], list[Path], Path]) -> None:
    assert "secret_number" in (graded[2] / "autograded/ben" / NESTED).read_text(encoding="utf-8")


def nbgrader(folder: Path, *arguments: str) -> str:
    """Run an nbgrader command as an instructor would, in a folder with its settings; return what it printed."""
    command = [sys.executable, "-m", "nbgrader", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nbgraders_own_command_writes_pages_without_hidden_tests(graded: tuple[list[Row], list[Path], Path]) -> None:
    page = graded[2] / "feedback/ben/1_sums/1_1_small_sums.html"
    page.unlink()
    nbgrader(graded[2], "generate_feedback", "1_sums", "--student", "ben", "--force")
    text = page.read_text(encoding="utf-8")
    assert "divide with /" in text
    assert "secret_number" not in text


def test_validation_with_the_settings_of_this_tree(lessons: list[Lesson], tmp_path: Path) -> None:
    shutil.copy(ROOT / "nbgrader_config.py", tmp_path)
    warning = "def double(x):\n    import warnings\n    warnings.warn('careful')\n    return 2 * x"
    hand_in(tmp_path / "right.ipynb", grading.answered(lessons[0], double=warning))
    hand_in(tmp_path / "wrong.ipynb", grading.answered(lessons[0], double="def double(x):\n    return 3 * x"))
    assert "Success! Your notebook passes all the tests." in nbgrader(tmp_path, "validate", "right.ipynb")
    told = nbgrader(tmp_path, "validate", "wrong.ipynb")
    assert "VALIDATION FAILED ON 2 CELL(S)" in told
    assert "AssertionError: Keep the sign" in told


def test_grading_again_keeps_what_a_person_entered(
    graded: tuple[list[Row], list[Path], Path], course: Course, tmp_path: Path, lessons: list[Lesson]
) -> None:
    out = graded[2]
    where = ("check-half", "1_1_small_sums", "1_sums", "ben")
    with Gradebook(f"sqlite:///{out / 'gradebook.db'}", "") as gradebook:
        gradebook.find_grade(*where).manual_score = 2
        gradebook.db.commit()
    hand_in(tmp_path / "late/ben" / NESTED, grading.answered(lessons[0], half="def half(x):\n    return x"))
    rows, _ = grade_class(course, tmp_path / "late", out, grading.SHORT, lambda row: None)
    assert [row.grade.points for row in rows if row.grade] == [5]
    with Gradebook(f"sqlite:///{out / 'gradebook.db'}", "") as gradebook:
        assert gradebook.find_grade(*where).manual_score == 2
        assert gradebook.find_student("ada").score == 12


def test_an_unexpected_failure_is_told_and_the_rest_is_graded(
    course: Course, lessons: list[Lesson], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ada", "ben"):
        hand_in(tmp_path / "in" / name / NESTED, grading.answered(lessons[0]))
    read = classroom.submission.read

    def break_ada(path: Path, lesson: Lesson) -> nbformat.NotebookNode:
        if "ada" in path.parts:
            raise RuntimeError("a bug")
        return read(path, lesson)

    monkeypatch.setattr(classroom.submission, "read", break_ada)
    ada, ben = grade_class(course, tmp_path / "in", tmp_path / "out", grading.SHORT, lambda row: None)[0]
    assert ada.grade is None
    assert "RuntimeError('a bug')" in ada.problem
    assert "a bug" in (tmp_path / "out/errors/ada-1_1_small_sums.txt").read_text()
    assert ben.grade is not None


def test_folders_that_cannot_be_used(course: Course, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match="there is no folder"):
        find_submissions(tmp_path / "nowhere", set())
    (tmp_path / "submitted" / "ada").mkdir(parents=True)
    with pytest.raises(CourseError, match="holds no submission"):
        find_submissions(tmp_path / "submitted", {"1_1_small_sums"})
    for folder, out in [(tmp_path / "submitted", tmp_path), (tmp_path, tmp_path), (course.root, tmp_path)]:
        with pytest.raises(CourseError, match="would be mixed"):
            grade_class(course, folder, out, grading.SHORT, lambda row: None)
