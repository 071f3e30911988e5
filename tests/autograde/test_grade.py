"""nbgrader's points for learners' notebooks of every kind, and the words that come with them. Real kernels."""

import textwrap
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from autograde import build, sandbox, submission
from autograde.errors import CourseError
from autograde.grade import Room, grade_notebook
from autograde.grades import LessonGrade
from autograde.lesson import Lesson
from autograde.sandbox import Sandbox
from tests.autograde import grading
from tests.autograde.grading import SHORT


@pytest.fixture
def lesson(tmp_path: Path) -> Lesson:
    return grading.small(tmp_path)


def points(grade: LessonGrade) -> dict[str, float]:
    return {exercise.name: exercise.points for exercise in grade.exercises}


def messages(grade: LessonGrade, name: str) -> tuple[str, ...]:
    return next(exercise.messages for exercise in grade.exercises if exercise.name == name)


def test_the_solution_earns_everything(lesson: Lesson) -> None:
    grade = grade_notebook(lesson, build.source_notebook(lesson), limits=SHORT)
    assert grade.complete
    assert (grade.points, grade.max_points) == (6, 6)
    assert [exercise.state for exercise in grade.exercises] == ["passed", "passed"]


def test_the_untouched_notebook_earns_nothing(lesson: Lesson) -> None:
    grade = grade_notebook(lesson, grading.released(lesson), limits=SHORT)
    assert [check.points for exercise in grade.exercises for check in exercise.checks] == [0, 0, 0]
    assert {exercise.state for exercise in grade.exercises} == {"unanswered"}
    assert messages(grade, "double") == ("not answered yet",)


def test_a_mistake_is_named_and_partial_knowledge_earns_partial_points(lesson: Lesson) -> None:
    notebook = grading.answered(
        lesson, double="def double(x):\n    return abs(2 * x)", half="def half(x):\n    return x.half"
    )
    grade = grade_notebook(lesson, notebook, limits=SHORT)
    assert points(grade) == {"double": 1, "half": 0}
    assert messages(grade, "double") == ("Keep the sign",)
    assert messages(grade, "half") == ("AttributeError: 'int' object has no attribute 'half' (line 2 of your answer)",)
    assert grade == grade_notebook(lesson, notebook, limits=SHORT)


def test_a_hidden_test_takes_its_points_with_its_message(lesson: Lesson) -> None:
    notebook = grading.answered(
        lesson, double="def double(x):\n    return int(2 * x) if x > 0 else 2 * x", half="def half(x:"
    )
    grade = grade_notebook(lesson, notebook, limits=SHORT)
    assert points(grade) == {"double": 2, "half": 0}
    assert messages(grade, "double") == ("Your double works for whole numbers only",)
    assert messages(grade, "half") == (
        "your answer did not run: SyntaxError: incomplete input (line 1 of your answer)",
    )


def test_warnings_progress_bars_and_values_cost_nothing(tmp_path: Path) -> None:
    source = grading.SOURCE.replace(
        'assert double(-3) == -6, "Keep the sign"', 'assert double(-3) == -6, "Keep the sign"\n0.25'
    )
    answer = """
    def double(x):
        import os, sys, warnings
        warnings.warn("deprecated", stacklevel=1)
        print("50 %", file=sys.stderr)
        os.system("echo from a child process >&2")
        os.write(2, b"from a library written in C")
        display(0.0)
        return 2 * x
    """
    lesson = grading.small(tmp_path, source)
    grade = grade_notebook(lesson, grading.answered(lesson, double=textwrap.dedent(answer)), limits=SHORT)
    assert points(grade) == {"double": 3, "half": 3}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("while True: pass", "it ran longer than its limit of 2 s"),
        ("import os; os._exit(0)", "it ended the kernel"),
        ("exit()", "it ended the kernel"),
    ],
)
def test_an_answer_that_hangs_or_kills_costs_its_own_points(lesson: Lesson, body: str, said: str) -> None:
    answer = f"def double(x):\n    if x == 1:\n        return 2\n    {body}"
    grade = grade_notebook(lesson, grading.answered(lesson, double=answer), limits=SHORT)
    assert points(grade) == {"double": 0, "half": 3}
    assert messages(grade, "double") == (f"this cell was stopped: {said}",)


def test_a_damaged_notebook_is_graded_by_what_is_in_it(lesson: Lesson) -> None:
    notebook = grading.answered(lesson)
    check = grading.cell_of(notebook, "check-half")
    notebook.cells.remove(check)
    answer = grading.cell_of(notebook, "half")
    answer.cell_type = "markdown"
    del answer["outputs"], answer["execution_count"]
    exercise = grading.cell_of(notebook, "double")
    notebook.cells.remove(exercise)
    notebook.cells.append(nbformat.from_dict(exercise))  # moved to the end …
    notebook.cells.append(exercise)  # … and there twice
    grade = grade_notebook(lesson, notebook, limits=SHORT)
    assert points(grade) == {"double": 3, "half": 3}
    assert {repair.cell for repair in grade.repairs} >= {"check-half", "half", "double"}


def test_a_machine_without_a_sandbox_says_so(lesson: Lesson, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "find", lambda: Sandbox("", sandbox.NO_BUBBLEWRAP))
    grade = grade_notebook(lesson, grading.answered(lesson), limits=SHORT)
    assert grade.complete
    assert grade.notes == ("no sandbox: install bubblewrap",)


def _grade(path: Path, answer: str) -> dict[str, float]:
    parsed = grading.small(path.parent.parent, stem=path.stem)
    return points(grade_notebook(parsed, grading.answered(parsed, double=answer), limits=SHORT))


def test_two_lessons_can_be_graded_at_once(tmp_path: Path) -> None:
    right, wrong = grading.DOUBLE, "def double(x):\n    return x"
    paths = [tmp_path / "a/1_sums/1_1_small_sums.py", tmp_path / "b/1_sums/1_2_more_sums.py"]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_grade, paths, [right, wrong]))
    assert found == [{"double": 3, "half": 3}, {"double": 0, "half": 3}]


def test_what_nbgrader_says_reaches_the_person(lesson: Lesson, tmp_path: Path) -> None:
    room = Room(tmp_path / "room", SHORT)
    with pytest.raises(CourseError, match=r"nbgrader could not grade 1_1_small_sums of ada:\n.*1_sums"):
        room.grade(lesson, "ada", grading.answered(lesson))


def written(path: Path, notebook: NotebookNode) -> Path:
    path.write_text(nbformat.writes(notebook), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"cells": [', "Expecting value"),
        (b"\xff\xfe\x00", "codec can't decode"),
        (b"[1, 2]", "it is JSON, but no notebook"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}}', "cells"),
        (b'{"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": [{"cell_type": "code"}]}', ""),
        (b'{"nbformat": 99, "nbformat_minor": 5, "metadata": {}, "cells": []}', ""),
    ],
)
def test_a_file_that_is_no_notebook_is_told_apart(lesson: Lesson, tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "mine.ipynb"
    path.write_bytes(data)
    with pytest.raises(CourseError, match=r"cannot be read as a notebook.*`course reset 1.1`") as error:
        submission.read(path, lesson)
    assert reason in str(error.value)
    assert path.read_bytes() == data


def test_another_lessons_notebook_is_refused(lesson: Lesson, tmp_path: Path) -> None:
    other = grading.small(tmp_path, stem="1_2_more_sums")
    with pytest.raises(CourseError, match="is the notebook of 1_2_more_sums, not of 1_1_small_sums"):
        submission.read(written(tmp_path / "mine.ipynb", grading.released(other)), lesson)


def test_a_notebook_without_our_exercises_is_refused(lesson: Lesson, tmp_path: Path) -> None:
    stranger = nbformat.v4.new_notebook(cells=[grading.plain("1 + 1")])
    with pytest.raises(CourseError, match="holds no exercise of 1_1_small_sums"):
        submission.read(written(tmp_path / "mine.ipynb", stranger), lesson)


def test_no_file(lesson: Lesson, tmp_path: Path) -> None:
    with pytest.raises(CourseError, match=r"there is no notebook .*mine.ipynb: `course reset 1.1`"):
        submission.read(tmp_path / "mine.ipynb", lesson)


def test_notebooks_of_other_editors_are_read(lesson: Lesson, tmp_path: Path) -> None:
    notebook = grading.answered(lesson)
    for cell in notebook.cells:
        del cell["id"]  # older format minor, and no metadata of the course
    notebook.nbformat_minor = 2
    notebook.metadata = {}
    path = tmp_path / "mine.ipynb"
    path.write_text("\ufeff" + nbformat.v4.writes(notebook), encoding="utf-8")
    assert len(submission.read(path, lesson).cells) == len(notebook.cells)
