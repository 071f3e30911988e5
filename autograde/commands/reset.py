"""`course reset 2.1`: a fresh notebook; mine is kept in a dated backup."""

from datetime import datetime
from typing import Annotated

import typer

from autograde.course import find
from autograde.reset import reset_notebook


def reset(lesson: Annotated[str, typer.Argument(help="The lesson, such as 2.1.")]) -> None:
    """Put a fresh notebook in place of mine, and keep mine in a dated backup."""
    course = find()
    done = reset_notebook(course, course.select_one(lesson), datetime.now())
    if not done.changed:
        typer.echo(f"{done.notebook} is fresh already.")
        return
    if done.backup is not None:
        typer.echo(f"Your notebook is kept as {done.backup}")
    typer.echo(f"A fresh one is at {done.notebook}")
    typer.echo("If it is open in JupyterLab, reload it there: File > Reload Notebook from Disk.")
