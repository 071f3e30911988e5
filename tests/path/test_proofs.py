"""Every lesson is proven, by forks of one run."""

from autograde.course import Course

from .conftest import Json


def test_every_answer_gets_what_it_deserves(proofs: list[Json], course: Course) -> None:
    assert len(proofs) == len(course.sources())
    for proof in proofs:
        assert proof["problems"] == [], proof["lesson"]
        assert proof["solution_points"] == proof["points"] > 0
        assert proof["empty_points"] == 0
        for kind in ("mistakes", "alternatives"):
            assert proof[kind]["ok"] == proof[kind]["total"] > 0
