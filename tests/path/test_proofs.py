"""Every lesson is proven: by forks of one run, and through real nbgrader."""

from pathlib import Path

import pytest

from autograde import build, lesson, results
from autograde.course import Course
from autograde.grade import grade_notebook

from .conftest import Json

SOURCES = Course(Path(__file__).resolve().parents[2]).sources()


def test_every_answer_gets_what_it_deserves(proofs: list[Json], course: Course) -> None:
    assert len(proofs) == len(course.sources())
    for proof in proofs:
        assert proof["problems"] == [], proof["lesson"]
        assert proof["solution_points"] == proof["points"] > 0
        assert proof["empty_points"] == 0
        for kind in ("mistakes", "alternatives"):
            assert proof[kind]["ok"] == proof[kind]["total"] > 0


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("work", ["solution", "empty"])
def test_nbgrader_gives_everything_or_nothing(course: Course, source: Path, work: str) -> None:
    parsed = lesson.load(source)
    measured = results.read(course.result_file(source))
    notebook = (
        build.source_notebook(parsed, measured) if work == "solution" else build.learner_notebook(parsed, measured)
    )
    graded = grade_notebook(parsed, notebook)
    earned = {check.id: check.points for exercise in graded.exercises for check in exercise.checks}
    full = {grade_id: cell.points for grade_id, cell in parsed.check_ids().items()}
    assert earned == (full if work == "solution" else dict.fromkeys(full, 0))
