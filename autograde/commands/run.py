"""`course run`: the lessons with their solutions through papermill, measured."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperCommand

from autograde.course import Course, find, number
from autograde.errors import CourseError
from autograde.limits import Limits
from autograde.run import LIMITS, LessonRun, parse_parameters, run_lessons, save


class Command(TyperCommand):
    """Accepts papermill's `-p NAME VALUE`, an option of two words, which typer itself does not have."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, join_pairs(args))


def run(
    lessons: Annotated[list[str] | None, typer.Argument(help="Lessons (2.1) or modules (2); all by default.")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="Set a parameter of the lessons.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small values of the parameters: does it run?")] = False,
    save_results: Annotated[bool, typer.Option("--save", help="Commit the measured numbers to results/.")] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Lessons at a time.")] = os.cpu_count() or 1,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit of a lesson.")] = LIMITS.seconds,
    mebibytes: Annotated[float, typer.Option(min=1, help="Memory limit of a lesson.")] = LIMITS.mebibytes,
    json_output: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """Run lessons with their solutions; executed notebooks and results go to .course/runs/."""
    if save_results and (parameters or quick):
        raise CourseError("--save keeps the numbers of the default parameters: leave out -p and --quick")
    course = find()
    sources = course.select(lessons or [])
    values = parse_parameters(parameters or [])
    with _Display(sources) as display:
        runs = run_lessons(course, sources, values, Limits(seconds, mebibytes), jobs, display.at, quick=quick)
    if json_output:
        typer.echo(json.dumps([one.to_dict() for one in runs], indent=2))
    else:
        _show(runs)
    if save_results:
        _save(course, runs)
    if not all(one.ok for one in runs):
        raise typer.Exit(1)


def join_pairs(args: Sequence[str]) -> list[str]:
    """`-p steps 10` as `-p steps=10`, which is also accepted as it is."""
    joined: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        joined.append(word)
        if word == "-p" and rest:
            name = rest.pop(0)
            joined.append(f"{name}={rest.pop(0)}" if rest and "=" not in name else name)
    return joined


class _Display:
    """Where each lesson is: bars on a terminal, else a line as a lesson starts and at each quarter. On stderr."""

    def __init__(self, sources: Sequence[Path]) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.console = Console(stderr=True)
        self.progress = Progress(*columns, console=self.console, disable=not sys.stderr.isatty())
        self.bars = {source: self.progress.add_task(number(source), total=None, start=False) for source in sources}
        self.quarters: set[tuple[Path, int]] = set()

    def __enter__(self) -> "_Display":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def at(self, source: Path, cell: int, of: int) -> None:
        if cell == 1:
            self.progress.start_task(self.bars[source])
        self.progress.update(self.bars[source], completed=cell, total=of)
        quarter = (source, 4 * cell // of)
        if self.progress.disable and quarter not in self.quarters:
            self.quarters.add(quarter)
            self.console.print(f"{number(source)}: cell {cell} of {of}")


def _show(runs: Sequence[LessonRun]) -> None:
    table = Table(box=box.SIMPLE)
    table.add_column("lesson", no_wrap=True)
    for heading in ("seconds", "peak MiB", "points", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in runs:
        points = f"{one.earned:g} / {one.points}"
        state = "" if one.ok else "failed"
        table.add_row(number(one.source), f"{one.seconds:.0f}", f"{one.peak_mebibytes:.0f}", points, state)
    Console().print(table)
    for one in runs:
        if one.problem is not None:
            typer.echo(str(one.problem), err=True)


def _save(course: Course, runs: Sequence[LessonRun]) -> None:
    for one in runs:
        if one.ok:
            save(one, course.result_file(one.source))
            typer.echo(f"saved {course.result_file(one.source)}", err=True)
        else:
            typer.echo(f"{number(one.source)} failed, so its results were not saved", err=True)
