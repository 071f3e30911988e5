"""`course check 2.1`: grades my notebook with the hidden tests, and says what is wrong."""

import json
import webbrowser
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from autograde import feedback, lesson, progress, submission
from autograde.course import Course, find
from autograde.grade import grade_notebook
from autograde.grades import LessonGrade

_WORDS = {"passed": "[green]passed[/green]", "failed": "[red]not yet[/red]", "unanswered": "unanswered"}


def check(
    lessons: Annotated[list[str], typer.Argument(help="Lessons (2.1) or modules (2).")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the grades as JSON.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Write the feedback as a page and open it.")] = False,
) -> None:
    """Grade my notebook: points, what is wrong, and the next hint. Exit code 0 when every point is earned."""
    course = find()
    grades = []
    for source in course.select(lessons):
        with Console(stderr=True).status(f"Running {source.stem} with the hidden tests"):
            grade, page = check_one(course, source, html=html)
        grades.append(grade)
        if not json_output:
            show(grade)
        if page is not None:
            typer.echo(f"Feedback: {page}", err=json_output)
            webbrowser.open(page.as_uri())
    if json_output:
        typer.echo(json.dumps([grade.to_dict() for grade in grades], indent=2, ensure_ascii=False))
    if not all(grade.complete for grade in grades):
        raise typer.Exit(1)


def check_one(course: Course, source: Path, *, html: bool) -> tuple[LessonGrade, Path | None]:
    """Grade the learner's notebook of one lesson, note the progress, and write the feedback page when asked."""
    parsed = lesson.load(source)
    grade = grade_notebook(parsed, submission.read(course.notebook(source), parsed), html=html)
    grade, note = progress.record(course.state, grade, feedback.hints(parsed), datetime.now())
    if note:
        typer.secho(note, fg=typer.colors.YELLOW, err=True)
    if not html:
        return grade, None
    page = course.state / "feedback" / f"{source.stem}.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(grade.html, encoding="utf-8")
    return grade, page


def show(grade: LessonGrade) -> None:
    """Print a row an exercise, then what is wrong with each that is not passed, with its next hint."""
    console = Console(highlight=False)
    table = Table(box=box.SIMPLE, title=f"{grade.number} {escape(grade.title)}", title_justify="left")
    table.add_column("exercise")
    table.add_column("points", justify="right", no_wrap=True)
    table.add_column("")
    for exercise in grade.exercises:
        table.add_row(exercise.name, f"{exercise.points:g} / {exercise.max_points:g}", _WORDS[exercise.state])
    console.print(table)
    for exercise in grade.exercises:
        if exercise.state == "failed":
            console.print(f"[bold]{exercise.name}[/bold]")
            _print_indented(console, [*exercise.messages, *([f"Hint: {exercise.hint}"] if exercise.hint else [])])
    if grade.repairs:
        console.print("Put right in the copy that was graded (your file is as it was):")
        _print_indented(console, [repair.message for repair in grade.repairs])
    for note in grade.notes:
        console.print(note, markup=False)
    console.print(f"[bold]{grade.points:g} of {grade.max_points:g} points[/bold]")


def _print_indented(console: Console, paragraphs: Sequence[str]) -> None:
    for paragraph in paragraphs:
        console.print(Padding(Text(paragraph), (0, 0, 0, 2)))
