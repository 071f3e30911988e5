"""`course grade DIR`: grades a folder of submissions into CSV and an nbgrader gradebook."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from autograde.classroom import Row, grade_class
from autograde.course import find
from autograde.execute import GradeLimits


def grade(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds DIR/<student>/<module>/<lesson>.ipynb.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; by default graded/ beside DIR.")] = None,
) -> None:
    """Grade a class. Exit code 0 when every submission could be graded, whatever its points."""
    target = out or folder.resolve().parent / "graded"
    rows, ignored = grade_class(find(), folder, target, GradeLimits(), _tell)
    show(rows)
    for path in ignored:
        typer.echo(f"passed over, since no lesson has that name: {path}")
    typer.echo(f"Written to {target}: grades.csv, exercises.csv, gradebook.db, and pages for students in feedback/")
    if any(row.grade is None for row in rows):
        raise typer.Exit(1)


def _tell(row: Row) -> None:
    points = f"{row.grade.points:g} / {row.grade.max_points:g}" if row.grade else "not graded"
    typer.echo(f"{row.student} {row.lesson}: {points}")


def show(rows: Sequence[Row]) -> None:
    """Print a row a submission: points, or why there are none."""
    table = Table(box=box.SIMPLE)
    for heading in ("student", "lesson", "points", ""):
        table.add_column(heading)
    for row in rows:
        points = f"{row.grade.points:g} / {row.grade.max_points:g}" if row.grade else "-"
        repaired = f"{len(row.grade.repairs)} cells put right" if row.grade and row.grade.repairs else ""
        table.add_row(escape(row.student), row.lesson, points, escape(row.problem) or repaired)
    Console(highlight=False).print(table)
