"""Runs lessons with their solutions through papermill: each in a process of its own, under limits, side by side."""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import papermill
import yaml
from nbformat import NotebookNode
from nbgrader.utils import determine_grade, is_grade

from autograde import build, lesson
from autograde.course import Course, number
from autograde.errors import CourseError, Problem
from autograde.lesson import Lesson
from autograde.limits import Limits, Outcome, run_limited, side_by_side

Parameters = Mapping[str, Any]
Progress = Callable[[Path, int, int], None]

# Guards against a lesson that hangs, with room for a busy machine; an author's budget is in docs/authoring.md.
LIMITS = Limits(seconds=900, mebibytes=3 * 1024)
# One thread a library, on every machine and for any number of lessons at once: the order in which a sum is taken, and
# with it the last digits of every result, would otherwise depend on both.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "JUPYTER_PREFER_ENV_PATH": "1",  # the kernel of this environment, not one of the same name in the home folder
}
_KERNEL_CHOOSES = "MPLBACKEND"


@dataclass(frozen=True)
class LessonRun:
    """One executed lesson: `problem` says where and why it stopped, or is None."""

    source: Path
    folder: Path
    seconds: float
    peak_mebibytes: float
    earned: float
    points: int
    problem: Problem | None

    @property
    def ok(self) -> bool:
        return self.problem is None

    @property
    def result_file(self) -> Path:
        """Where the lesson wrote what it measured."""
        return self.folder / f"{self.source.stem}.json"

    def to_dict(self) -> dict[str, object]:
        """The JSON form that `course run --json` prints, one object a lesson; `notebook` is the executed one."""
        return {
            "lesson": number(self.source),
            "path": str(self.source),
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
            "peak_mib": round(self.peak_mebibytes),
            "earned": self.earned,
            "points": self.points,
            "notebook": str(self.folder / "executed.ipynb"),
            "problem": None if self.problem is None else {"line": self.problem.line, "message": self.problem.message},
        }


def run_lessons(
    course: Course,
    sources: Sequence[Path],
    parameters: Parameters,
    limits: Limits,
    jobs: int,
    progress: Progress,
    *,
    quick: bool = False,
) -> list[LessonRun]:
    """Run the lessons at `sources`, `jobs` at a time; one that fails does not stop the others.

    With `quick`, the parameters that are not given have the small values that each lesson names.

    `progress(source, i, n)` is called from other threads as cell i of n starts. Raises `CourseError` before anything
    runs when a source cannot be built, has no parameter of a given name, or is being run in this tree already.
    """
    lessons = [lesson.load(source).quick() if quick else lesson.load(source) for source in sources]
    notebooks = [build.source_notebook(parsed) for parsed in lessons]

    def run(item: tuple[Lesson, Path]) -> LessonRun:
        parsed, folder = item
        return _run(parsed, folder, parameters, limits, lambda at, of: progress(parsed.path, at, of))

    with ExitStack() as held:
        work = []
        for parsed, notebook in zip(lessons, notebooks, strict=True):
            folder = course.state / "runs" / parsed.stem
            held.enter_context(_alone(parsed, folder.with_suffix(".lock")))
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            (folder / "source.ipynb").write_text(build.to_text(notebook), encoding="utf-8")
            _refuse_unknown(parsed, folder / "source.ipynb", parameters)
            work.append((parsed, folder))
        return side_by_side(run, work, jobs)


def parse_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """`["steps=10", "lr=1e-3"]` as values: YAML, and also the numbers that YAML 1.1 reads as text, such as `1e-3`.

    Raises `CourseError` for what is no `name=value`, or no YAML.
    """
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (equals and name.isidentifier()):
            raise CourseError(f"{text!r} is no parameter: write -p NAME VALUE, as in -p steps 10")
        try:
            parameters[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise CourseError(f"the value of -p {name} is no YAML: {value!r}") from error
        if parameters[name] == value:
            parameters[name] = _number_or_text(value)
    return parameters


def save(run: LessonRun, to: Path) -> None:
    """Commit what a run measured: its result file with the run's own time and memory added, written to `to`."""
    measured: dict[str, Any] = {"lesson": run.source.stem, "results": {}}
    if run.result_file.exists():
        measured = json.loads(run.result_file.read_text(encoding="utf-8"))
    measured["run"] = {"seconds": round(run.seconds, 1), "peak_mib": round(run.peak_mebibytes)}
    to.parent.mkdir(parents=True, exist_ok=True)
    scratch = to.with_suffix(".json.new")
    scratch.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    scratch.replace(to)


@contextmanager
def _alone(parsed: Lesson, lock: Path) -> Iterator[None]:
    """Hold the lesson's folder of runs; the system lets go of it however this process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CourseError(
                f"lesson {parsed.number} is being run in this folder already: wait for that run's end, or stop it"
            ) from None
        yield


def _run(
    parsed: Lesson, folder: Path, parameters: Parameters, limits: Limits, progress: Callable[[int, int], None]
) -> LessonRun:
    events: list[dict[str, Any]] = []

    def on_line(line: str) -> None:
        event = json.loads(line)
        events.append(event)
        if "cell" in event:
            progress(event["number"], event["of"])

    environment = {**os.environ, **_ENVIRONMENT, "COURSE_RESULTS": str(folder)}
    environment.pop(_KERNEL_CHOOSES, None)
    executed = folder / "executed.ipynb"
    outcome = run_limited(
        [sys.executable, "-m", "autograde.papermill_worker", folder / "source.ipynb", executed, json.dumps(parameters)],
        limits, cwd=folder, env=environment, on_line=on_line,
    )  # fmt: skip
    problem = None if outcome.ok else _problem(parsed, folder, events, outcome, limits)
    earned = _earned(executed)
    if problem is None and earned < parsed.points:
        problem = Problem(
            parsed.path, 1, f"the solution earns {earned:g} of {parsed.points} points: `course prove` says why"
        )
    return LessonRun(parsed.path, folder, outcome.seconds, outcome.peak_mebibytes, earned, parsed.points, problem)


def _refuse_unknown(parsed: Lesson, notebook: Path, parameters: Parameters) -> None:
    known = papermill.inspect_notebook(notebook)
    if unknown := [name for name in parameters if name not in known]:
        there = ", ".join(f"{name} = {known[name]['default']}" for name in known) or "none"
        raise CourseError(f"lesson {parsed.number} has no parameter {', '.join(unknown)}; its parameters: {there}")


def _problem(parsed: Lesson, folder: Path, events: list[dict[str, Any]], outcome: Outcome, limits: Limits) -> Problem:
    """Where the run stopped, as a line of the source, and why."""
    source = nbformat.read(folder / "source.ipynb", as_version=4)
    visible = [cell for cell in parsed.cells if not cell.hidden]
    lines = {node.id: cell.line for node, cell in zip(source.cells, visible, strict=True)}
    cells = [event for event in events if "cell" in event]
    where = f"cell {cells[-1]['number']} of {cells[-1]['of']}: " if cells else "before the first cell: "
    line = lines.get(cells[-1]["cell"], 1) if cells else 1  # papermill's own cell of parameters has no line
    errors = [event for event in events if "error" in event]
    if errors:
        why = f"{errors[-1]['error']}: {errors[-1]['message']}"
        line += errors[-1]["line"]
    else:
        tail = outcome.stderr_tail.strip().splitlines()
        why = outcome.reason(limits) + (f": {tail[-1]}" if tail and outcome.ended == "exit" else "")
    return Problem(parsed.path, line, where + why)


def _earned(executed: Path) -> float:
    """The points of the check cells that ran, as nbgrader grades them."""
    if not executed.exists():
        return 0.0
    notebook: NotebookNode = nbformat.read(executed, as_version=4)
    return sum(determine_grade(cell)[0] or 0.0 for cell in notebook.cells if is_grade(cell) and cell.execution_count)


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
