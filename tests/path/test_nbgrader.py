"""Real nbgrader gives an answered exercise every point and an unanswered one none, check by check."""

from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from autograde import build, lesson, results
from autograde.course import Course
from autograde.grade import grade_notebook
from autograde.lesson import Lesson
from autograde.results import LessonResults

SOURCES = Course(Path(__file__).resolve().parents[2]).sources()


def answering(parsed: Lesson, measured: LessonResults, answered: set[str]) -> NotebookNode:
    """The learner's notebook with the solutions of these exercises in it."""
    empty = build.learner_notebook(parsed, measured)
    solved = {grade_id(cell): cell for cell in build.source_notebook(parsed, measured).cells}
    cells = [solved[grade_id(cell)] if grade_id(cell) in answered else cell for cell in empty.cells]
    notebook: NotebookNode = nbformat.from_dict({**empty, "cells": cells})
    return notebook


def grade_id(cell: NotebookNode) -> str:
    return str(cell.metadata.get("nbgrader", {}).get("grade_id", ""))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_nbgrader_gives_what_is_answered_and_nothing_else(course: Course, source: Path) -> None:
    """Every other exercise is answered, so a check that needs the exercise before its own fails here.

    In one lesson the first, third, ... are answered and in the next the others: both halves of each would take twice
    the time, and the proof shows every check on every answer.
    """
    parsed = lesson.load(source).quick()
    names = [exercise.name for exercise in parsed.exercises]
    answered = set(names[SOURCES.index(source) % 2 :: 2])
    graded = grade_notebook(parsed, answering(parsed, results.read(course.result_file(source)), answered))
    earned = {check.id: check.points for exercise in graded.exercises for check in exercise.checks}
    assert earned == {name: cell.points if cell.name in answered else 0 for name, cell in parsed.check_ids().items()}, {
        exercise.name: exercise.messages for exercise in graded.exercises
    }
