"""Real nbgrader gives a solution every point and an empty notebook none, check by check."""

from pathlib import Path

import pytest

from autograde import build, lesson, results
from autograde.course import Course
from autograde.grade import grade_notebook

SOURCES = Course(Path(__file__).resolve().parents[2]).sources()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("work", ["solution", "empty"])
def test_nbgrader_gives_everything_or_nothing(course: Course, source: Path, work: str) -> None:
    parsed = lesson.load(source).quick()
    measured = results.read(course.result_file(source))
    notebook = (
        build.source_notebook(parsed, measured) if work == "solution" else build.learner_notebook(parsed, measured)
    )
    graded = grade_notebook(parsed, notebook)
    earned = {check.id: check.points for exercise in graded.exercises for check in exercise.checks}
    full = {grade_id: cell.points for grade_id, cell in parsed.check_ids().items()}
    assert earned == (full if work == "solution" else dict.fromkeys(full, 0))
