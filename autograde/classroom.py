"""Grades a folder of submissions into one nbgrader course folder; one broken submission never stops the rest."""

import csv
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autograde import lesson, submission
from autograde.course import Course
from autograde.errors import CourseError
from autograde.execute import GradeLimits
from autograde.grade import Room
from autograde.grades import LessonGrade
from autograde.lesson import Lesson

_CONFIG = '''"""What nbgrader and its form grader need to work on this folder, which `course grade` made."""

from pathlib import Path

from autograde.execute import AUTOGRADE_PREPROCESSORS
from autograde.feedback import FEEDBACK_PREPROCESSORS

c = get_config()  # noqa: F821
c.CourseDirectory.root = str(Path(__file__).parent)
c.CourseDirectory.db_url = f"sqlite:///{Path(__file__).parent / 'gradebook.db'}"
c.Autograde.autograde_preprocessors = AUTOGRADE_PREPROCESSORS
c.GenerateFeedback.preprocessors = FEEDBACK_PREPROCESSORS
'''


@dataclass(frozen=True)
class Submission:
    """One notebook of one student; `lesson` is the stem of its file name."""

    student: str
    lesson: str
    path: Path


@dataclass(frozen=True)
class Row:
    """What came of one submission: a grade, or the reason why there is none."""

    student: str
    lesson: str
    grade: LessonGrade | None = None
    problem: str = ""


def find_submissions(folder: Path, known: set[str]) -> tuple[list[Submission], list[Path]]:
    """Every notebook named like a lesson in `folder/<student>/` and below, and the notebooks that are not.

    Raises `CourseError` when there is no folder, or nothing in it to grade.
    """
    if not folder.is_dir():
        raise CourseError(f"there is no folder {folder}: name one that holds a folder for each student")
    found, ignored = [], []
    for student in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        for path in sorted(student.rglob("*.ipynb")):
            if any(part.startswith(".") for part in path.relative_to(student).parts):
                continue  # Jupyter's own checkpoints
            if path.stem in known:
                found.append(Submission(student.name, path.stem, path))
            else:
                ignored.append(path)
    if not found:
        raise CourseError(
            f"{folder} holds no submission: they are named {folder}/<student>/<module>/<lesson>.ipynb, "
            f"as in {folder}/ada/2_peft/2_1_lora_from_scratch.ipynb"
        )
    return found, ignored


def grade_class(
    course: Course, folder: Path, out: Path, limits: GradeLimits, on_row: Callable[[Row], None]
) -> tuple[list[Row], list[Path]]:
    """Grade every submission in `folder` into `out`; return a row each, and the notebooks that belong to no lesson.

    `out` becomes an nbgrader course folder, with `grades.csv`, `exercises.csv` and a feedback page a submission. Graded
    into again, it keeps the scores and comments that a person entered.
    Raises `CourseError` before anything is written when the folders cannot be used.
    """
    folder, out = folder.resolve(), out.resolve()
    if folder in (out, out / "submitted") or course.root.is_relative_to(folder):
        raise CourseError(f"{folder} would be mixed with what grading writes to {out}: name another --out")
    sources = {source.stem: source for source in course.sources()}
    submissions, ignored = find_submissions(folder, set(sources))
    room = Room(out, limits, (folder, out))
    out.mkdir(parents=True, exist_ok=True)
    (out / "nbgrader_config.py").write_text(_CONFIG, encoding="utf-8")
    # A module is one nbgrader assignment: all its lessons must be in the gradebook before its first submission is.
    modules = {sources[one.lesson].parent for one in submissions}
    added = {stem: _add(room, source) for stem, source in sources.items() if source.parent in modules}
    rows: list[Row] = []
    for one in submissions:
        rows.append(_grade_one(room, added[one.lesson], one, submissions))
        on_row(rows[-1])
    _write_tables(rows, out)
    return rows, ignored


def _add(room: Room, source: Path) -> Lesson | str:
    try:
        parsed = lesson.load(source)
        room.add(parsed)
    except CourseError as error:
        return f"{error}\nIf the lesson changed since this folder was graded into, name another --out."
    return parsed


def _grade_one(room: Room, parsed: Lesson | str, one: Submission, everything: Sequence[Submission]) -> Row:
    same = [other.path for other in everything if (other.student, other.lesson) == (one.student, one.lesson)]
    if isinstance(parsed, str):
        return Row(one.student, one.lesson, problem=parsed)
    if len(same) > 1:
        return Row(one.student, one.lesson, problem=f"handed in twice: {', '.join(map(str, same))}")
    if any(character in one.student for character in "*?[]+"):
        return Row(one.student, one.lesson, problem="nbgrader refuses names with any of *?[]+: rename the folder")
    try:
        grade = room.grade(parsed, one.student, submission.read(one.path, parsed), html=True)
        return Row(one.student, one.lesson, grade)
    except CourseError as error:
        return Row(one.student, one.lesson, problem=str(error))
    except Exception as error:  # told in the table and in full beside it; the rest of the class is still graded
        report = room.root / "errors" / f"{one.student}-{one.lesson}.txt"
        report.parent.mkdir(exist_ok=True)
        report.write_text(traceback.format_exc(), encoding="utf-8")
        return Row(one.student, one.lesson, problem=f"{error!r}; the traceback is in {report}")


def _write_tables(rows: Sequence[Row], out: Path) -> None:
    with (out / "grades.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["student", "lesson", "points", "max_points", "repairs", "problem"])
        for row in rows:
            points = [row.grade.points, row.grade.max_points, len(row.grade.repairs)] if row.grade else ["", "", ""]
            table.writerow([row.student, row.lesson, *points, row.problem])
    with (out / "exercises.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["student", "lesson", "exercise", "points", "max_points", "state", "message"])
        for row in rows:
            for exercise in row.grade.exercises if row.grade else ():
                table.writerow(
                    [row.student, row.lesson, exercise.name, exercise.points, exercise.max_points, exercise.state,
                     " | ".join(exercise.messages)]
                )  # fmt: skip
