"""Grades a submitted notebook with nbgrader itself: its assignment, autograde and feedback steps, and its gradebook.

A `Room` is an nbgrader course folder: `grade_notebook` makes one in scratch for one notebook, `course grade` keeps one.
"""

import logging
import sqlite3
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import nbgrader
from alembic.script import ScriptDirectory
from nbformat import NotebookNode
from nbgrader.api import Gradebook
from nbgrader.converters import Autograde, GenerateAssignment, GenerateFeedback
from nbgrader.converters.base import BaseConverter, NbGraderException
from nbgrader.coursedir import CourseDirectory
from sqlalchemy.exc import SAWarning
from traitlets.config import Config

from autograde import build, feedback, sandbox
from autograde.errors import CourseError
from autograde.execute import AUTOGRADE_PREPROCESSORS, GradeLimits
from autograde.grades import CheckGrade, ExerciseGrade, LessonGrade, State
from autograde.heal import heal
from autograde.lesson import Lesson

LEARNER = "learner"  # the student id of whoever checks their own notebook


def grade_notebook(
    lesson: Lesson, submitted: NotebookNode, *, limits: GradeLimits | None = None, html: bool = False
) -> LessonGrade:
    """Grade one submission of a lesson in a scratch folder. Nothing else is read or written.

    Raises `CourseError` when the grading itself is impossible; never for what the notebook does.
    """
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        room = Room(Path(folder), limits or GradeLimits())
        room.add(lesson)
        return room.grade(lesson, LEARNER, submitted, html=html)


@dataclass(frozen=True)
class Room:
    """An nbgrader course folder: source/, release/, submitted/, autograded/, feedback/ and gradebook.db under `root`.

    `hidden` are folders that no graded notebook may look into, such as the other submissions.
    """

    root: Path
    limits: GradeLimits
    hidden: tuple[Path, ...] = ()

    def add(self, lesson: Lesson) -> None:
        """Write the lesson's nbgrader source notebook and register it in the gradebook."""
        self.root.mkdir(parents=True, exist_ok=True)
        _stamp(self.root / "gradebook.db")
        _write(build.source_notebook(lesson), self._path("source", ".", lesson))
        self._convert(GenerateAssignment, lesson, ".")

    def grade(self, lesson: Lesson, student: str, submitted: NotebookNode, *, html: bool = False) -> LessonGrade:
        """Heal, autograde and read back one submission of a lesson that was added."""
        released = build.release(build.source_notebook(lesson))
        healed, repairs = heal(submitted, released)
        _write(healed, self._path("submitted", student, lesson))
        self._convert(Autograde, lesson, student)
        graded = nbformat.read(self._path("autograded", student, lesson), as_version=4)
        page = ""
        if html:
            self._convert(GenerateFeedback, lesson, student)
            page = self._path("feedback", student, lesson, ".html").read_text(encoding="utf-8")
        points = self._points(lesson, student)
        exercises = _exercises(lesson, graded, released, points)
        note = sandbox.find().note
        return LessonGrade(
            lesson.stem, lesson.number, lesson.title, sum(points.values()), lesson.points, exercises, repairs,
            (note,) if note else (), page,
        )  # fmt: skip

    def _path(self, step: str, student: str, lesson: Lesson, suffix: str = ".ipynb") -> Path:
        return self.root / step / student / lesson.module / f"{lesson.stem}{suffix}"

    @property
    def _database(self) -> str:
        return f"sqlite:///{self.root / 'gradebook.db'}"

    def _convert(self, converter: type[BaseConverter], lesson: Lesson, student: str) -> None:
        """Run one of nbgrader's steps on one notebook. Raises `CourseError` with what nbgrader logged."""
        config = Config()
        config.CourseDirectory.root = str(self.root)
        config.CourseDirectory.db_url = self._database
        config.CourseDirectory.assignment_id = lesson.module
        config.CourseDirectory.notebook_id = lesson.stem
        config.CourseDirectory.student_id = student
        config.Autograde.autograde_preprocessors = AUTOGRADE_PREPROCESSORS
        config.GenerateFeedback.preprocessors = feedback.FEEDBACK_PREPROCESSORS
        config.SandboxedExecute.update(asdict(self.limits), hidden=[str(folder) for folder in self.hidden])
        log = _Log()
        try:
            step = converter(coursedir=CourseDirectory(config=config, log=log.logger), config=config, log=log.logger)
            step.force = True
            with warnings.catch_warnings():
                # nbgrader's own queries make SQLAlchemy warn of objects that are not in the session yet.
                warnings.simplefilter("ignore", SAWarning)
                step.start()
        except (NbGraderException, SystemExit) as error:
            raise CourseError(f"nbgrader could not grade {lesson.stem} of {student}:\n{log.text()}") from error

    def _points(self, lesson: Lesson, student: str) -> dict[str, float]:
        with Gradebook(self._database) as gradebook:
            notebook = gradebook.find_submission_notebook(lesson.stem, lesson.module, student)
            return {grade.name: float(grade.score) for grade in notebook.grades}


class _Log:
    """Collects what nbgrader logs, since it logs an error's cause and raises only that there was one."""

    def __init__(self) -> None:
        self._records: list[str] = []
        self.logger = logging.Logger("nbgrader", logging.WARNING)
        handler = logging.Handler()
        handler.emit = lambda record: self._records.append(record.getMessage())  # type: ignore[method-assign]
        self.logger.addHandler(handler)

    def text(self) -> str:
        return "\n".join(self._records)


def _stamp(database: Path) -> None:
    """Start an empty gradebook with nbgrader's schema version in it.

    nbgrader asks the `alembic` program for that version, which takes longer than grading a small notebook; here
    the same migration scripts are asked directly.
    """
    if database.exists():
        return
    version = ScriptDirectory(str(Path(nbgrader.__file__).parent / "alembic")).get_current_head()
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version (version_num) VALUES (?)", (version,))
    connection.close()


def _write(notebook: NotebookNode, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(build.to_text(notebook), encoding="utf-8")


def _exercises(
    lesson: Lesson, graded: NotebookNode, released: NotebookNode, points: dict[str, float]
) -> tuple[ExerciseGrade, ...]:
    ids = lesson.check_ids()
    cells = _by_grade_id(graded)
    stubs = _by_grade_id(released)
    found = []
    for exercise in lesson.exercises:
        answer = cells[exercise.name]
        checks = tuple(
            CheckGrade(name, points[name], check.points, _message(cells[name], answer))
            for name, check in ids.items()
            if check.name == exercise.name
        )
        earned, available = sum(check.points for check in checks), sum(check.max_points for check in checks)
        state: State = "passed" if earned == available else "failed"
        messages = list(dict.fromkeys(check.message for check in checks if check.message))
        if state == "failed" and answer.source.strip() == stubs[exercise.name].source.strip():
            state, messages = "unanswered", ["not answered yet"]
        elif state == "failed" and (error := feedback.error_of(answer)) is not None:
            messages = [f"your answer did not run: {feedback.message(error, answer)}"]
        found.append(ExerciseGrade(exercise.name, state, earned, available, tuple(messages), checks))
    return tuple(found)


def _by_grade_id(notebook: NotebookNode) -> dict[str, NotebookNode]:
    return {cell.metadata.nbgrader.grade_id: cell for cell in notebook.cells if cell.metadata.get("nbgrader")}


def _message(check: NotebookNode, answer: NotebookNode) -> str:
    error = feedback.error_of(check)
    return feedback.message(error, answer) if error is not None else ""
