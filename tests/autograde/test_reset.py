"""A reset gives a fresh notebook and keeps the learner's, whatever state it is in."""

from datetime import datetime
from pathlib import Path

import nbformat
import pytest

from autograde import build
from autograde.course import Course
from autograde.errors import LessonError
from autograde.reset import reset_notebook
from tests.autograde import grading

NOW = datetime(2026, 11, 23, 8, 5, 9)
NAME = "1_1_small_sums-20261123-080509"


@pytest.fixture
def course(tmp_path: Path) -> Course:
    grading.small(tmp_path / "solutions")
    return Course(tmp_path)


def source(course: Course) -> Path:
    return course.sources()[0]


def test_a_missing_notebook_is_made(course: Course) -> None:
    done = reset_notebook(course, source(course), NOW)
    assert (done.changed, done.backup) == (True, None)
    assert not build.holds_work(nbformat.read(done.notebook, as_version=4))


def test_a_fresh_notebook_is_left_alone(course: Course) -> None:
    path = reset_notebook(course, source(course), NOW).notebook
    before = path.stat().st_mtime_ns
    done = reset_notebook(course, source(course), NOW)
    assert (done.changed, done.backup, path.stat().st_mtime_ns) == (False, None, before)


@pytest.mark.parametrize("mine", [b"my work", b"", b"\xff\x00{"])
def test_mine_is_kept_byte_for_byte(course: Course, mine: bytes) -> None:
    path = course.notebook(source(course))
    path.parent.mkdir(parents=True)
    path.write_bytes(mine)
    done = reset_notebook(course, source(course), NOW)
    assert done.backup == course.state / "backups" / f"{NAME}.ipynb"
    assert done.backup.read_bytes() == mine
    assert [cell.cell_type for cell in nbformat.read(path, as_version=4).cells][:2] == ["markdown", "code"]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_no_backup_is_overwritten(course: Course) -> None:
    path = course.notebook(source(course))
    path.parent.mkdir(parents=True)
    for number in range(3):
        path.write_text(f"work {number}")
        reset_notebook(course, source(course), NOW)
    backups = sorted((course.state / "backups").iterdir())
    assert [(file.name, file.read_text()) for file in backups] == [
        (f"{NAME}-2.ipynb", "work 1"),
        (f"{NAME}-3.ipynb", "work 2"),
        (f"{NAME}.ipynb", "work 0"),
    ]


def test_a_lesson_that_cannot_be_built_touches_nothing(course: Course) -> None:
    path = course.notebook(source(course))
    path.parent.mkdir(parents=True)
    path.write_text("my work")
    broken = source(course)
    broken.write_text(broken.read_text().replace("points=3", ""))
    with pytest.raises(LessonError, match="points"):
        reset_notebook(course, broken, NOW)
    assert path.read_text() == "my work"
    assert not course.state.exists()
