"""`course prove`: solution 100 %, empty notebook 0 %, every mistake caught by name, every alternative accepted."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from autograde.course import find
from autograde.limits import side_by_side
from autograde.prove import LessonProof, prove_lesson


def prove(
    lessons: Annotated[list[str] | None, typer.Argument(help="Lessons (2.1) or modules (2); all by default.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print the proofs as JSON.")] = False,
) -> None:
    """Prove that the checks of lessons give points to right answers and to no others."""
    sources = find().select(lessons or [])
    proofs = _prove_all(sources)
    if json_output:
        typer.echo(json.dumps([proof.to_dict() for proof in proofs], indent=2))
    else:
        show(proofs)
    if not all(proof.ok for proof in proofs):
        raise typer.Exit(1)


def show(proofs: Sequence[LessonProof]) -> None:
    """Print a row a lesson, then every problem as `file:line: message`."""
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    table.add_column("lesson", no_wrap=True)
    for heading in ("tasks", "checks", "points", "solution", "empty", "caught", "accepted", "s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for proof in proofs:
        row = proof.to_dict()
        table.add_row(
            proof.lesson,
            str(row["exercises"]),
            str(row["checks"]),
            str(row["points"]),
            _percent(row["solution_points"], row["points"]),
            _percent(row["empty_points"], row["points"]),
            f"{row['mistakes']['ok']} / {row['mistakes']['total']}",
            f"{row['alternatives']['ok']} / {row['alternatives']['total']}",
            f"{proof.seconds:.0f}",
        )
    Console().print(table)
    for proof in proofs:
        for problem in proof.problems:
            typer.echo(str(problem), err=True)


def _prove_all(sources: list[Path]) -> list[LessonProof]:
    """Lessons side by side on the cores there are; one lesson alone tries its answers side by side."""
    cores = os.cpu_count() or 1
    together = max(1, min(cores, len(sources)))
    return side_by_side(lambda source: prove_lesson(source, jobs=max(1, cores // together)), sources, together)


def _percent(earned: int, points: int) -> str:
    return f"{100 * earned / points:.0f} %" if points else "-"
