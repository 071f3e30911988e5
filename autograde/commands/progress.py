"""`course progress`: the map of the path with my points."""

import json
from collections.abc import Sequence
from datetime import datetime
from itertools import groupby
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from autograde import lesson
from autograde import progress as core
from autograde.course import find
from autograde.home import MODULES


def progress(
    json_output: Annotated[bool, typer.Option("--json", help="Print the map as JSON.")] = False,
) -> None:
    """Show the path: every lesson, my points as last checked, and what is left."""
    course = find()
    checked, note = core.read(course.state, datetime.now())
    if note:
        typer.secho(note, fg=typer.colors.YELLOW, err=True)
    rows = core.rows([lesson.load(source) for source in course.sources()], checked)
    if json_output:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=2, ensure_ascii=False))
    else:
        show(rows)


def show(rows: Sequence[core.Row]) -> None:
    """Print a row a lesson under its module, then the sum and what comes next."""
    table = Table(box=box.SIMPLE)
    for heading, justify in (("lesson", "left"), ("points", "right"), ("", "left"), ("last checked", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for module, lessons in groupby(rows, key=lambda row: row.module):
        table.add_row(f"[bold]{module.split('_')[0]} {MODULES.get(module, module)}[/bold]")
        for row in lessons:
            table.add_row(
                f"  {row.number} {row.title}",
                f"{row.points:g} / {row.max_points}",
                _bar(row.points, row.max_points),
                row.checked.replace("T", " ")[:16],
            )
    Console().print(table)
    earned, available = sum(row.points for row in rows), sum(row.max_points for row in rows)
    typer.echo(f"{earned:g} of {available} points on {len(rows)} {'lesson' if len(rows) == 1 else 'lessons'}.")
    following = next((row for row in rows if row.points < row.max_points), None)
    if following is not None:
        typer.echo(f"Next: {following.number} {following.title}, then `course check {following.number}`.")


def _bar(points: float, available: int, width: int = 12) -> str:
    full = int(width * points / available) if available else 0
    return "#" * full + "." * (width - full)
