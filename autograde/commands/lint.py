"""`course lint`: what a lesson must hold beyond what builds, and must not show."""

from typing import Annotated

import typer

from autograde import build, lesson
from autograde.course import find
from autograde.errors import LessonError
from autograde.leaks import leaks_in
from autograde.lint import lint as lint_lesson


def lint(
    lessons: Annotated[list[str] | None, typer.Argument(help="Lessons (2.1) or modules (2); all by default.")] = None,
) -> None:
    """Check sections, hints, mistakes, alternatives and check messages, and that no later cell gives an answer away."""
    problems = []
    course = find()
    for source in course.select(lessons or []):
        try:
            parsed = lesson.load(source)
            problems += lint_lesson(parsed)
            released = build.release(build.source_notebook(parsed))
            problems += leaks_in(parsed, released, course.notebook(source))
        except LessonError as error:
            problems += error.problems
    for problem in problems:
        typer.echo(str(problem), err=True)
    if problems:
        raise typer.Exit(1)
