"""`course build`: sources → notebooks."""

from typing import Annotated

import typer

from autograde.course import find
from autograde.publish import build_all


def build(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail when something is out of date.")] = False,
) -> None:
    """Build the notebooks, the start page and the README's table from the sources."""
    course = find()
    report = build_all(course, check)
    for path in report.changed:
        place = path.relative_to(course.root)
        done = f"{'wrote' if path.exists() else 'removed'} {place}"
        typer.echo(f"{place} is not what `course build` makes of the sources" if check else done)
    for message in report.refused:
        typer.secho(message, fg=typer.colors.RED, err=True)
    typer.echo(f"{len(report.changed)} {'out of date' if check else 'written'}, {report.unchanged} unchanged", err=True)
    if report.refused or (check and report.changed):
        raise typer.Exit(1)
