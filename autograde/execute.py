"""Runs a whole notebook for grading and comes back with every cell's outputs, whatever the cells do.

A cell that kills the kernel, eats the memory or cannot be stopped is taken out and shown as failed, and the others are
run again without it in a fresh kernel. nbgrader sees ordinary outputs: `SandboxedExecute` stands in for its `Execute`.
"""

import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.exporters.exporter import ResourcesDict
from nbconvert.preprocessors import ClearMetadataPreprocessor
from nbformat import NotebookNode
from nbgrader.preprocessors import (
    AssignLatePenalties,
    CheckCellMetadata,
    LimitOutput,
    NbGraderPreprocessor,
    SaveAutoGrades,
)
from nbgrader.utils import is_grade
from traitlets import Float, List, Unicode

from autograde import sandbox
from autograde.errors import CourseError
from autograde.limits import Limits, Outcome, run_limited

STOPPED = "Stopped"  # the error name of a cell that was stopped or could not be run, in an output's `ename`
_MOST_DEATHS = 10


@dataclass(frozen=True)
class GradeLimits:
    """What one notebook may use when it is graded: seconds a cell and in all, MiB with everything it starts.

    `grace_seconds` is how long an interrupted cell may take to stop before its kernel is killed.
    """

    cell_seconds: float = 300.0
    run_seconds: float = 1200.0
    mebibytes: float = 3072.0
    grace_seconds: float = 5.0


@dataclass
class _Attempt:
    """What one run of the worker reported, line by line."""

    outputs: dict[int, tuple[list[dict[str, Any]], int | None]] = field(default_factory=dict)
    last: int | None = None
    reason: str = ""
    done: bool = False

    def take(self, line: str) -> None:
        try:
            message = json.loads(line)
        except ValueError:  # the last line of a worker that was killed while it wrote it
            return
        if "started" in message:
            self.last = message["started"]
        elif "ended" in message:
            self.outputs[message["ended"]] = (message["outputs"], message["count"])
        elif "died" in message:
            self.reason = message["reason"]
        else:
            self.done = True


def execute(notebook: NotebookNode, limits: GradeLimits, hidden: list[Path] | None = None) -> NotebookNode:
    """A copy of `notebook` with the outputs of running it in the sandbox (folders in `hidden` look empty in there).

    Never raises for what a cell does: a cell that was stopped, or not reached, has one error output named `STOPPED`.
    Raises `CourseError` when no kernel starts.
    """
    notebook = nbformat.from_dict(notebook)
    cells = [
        (i, cell.source) for i, cell in enumerate(notebook.cells) if cell.cell_type == "code" and cell.source.strip()
    ]
    outputs: dict[int, tuple[list[dict[str, Any]], int | None]] = {}
    stopped: dict[int, str] = {}
    end = time.monotonic() + limits.run_seconds
    while True:
        remaining = [(i, source) for i, source in cells if i not in stopped]
        left = end - time.monotonic()
        attempt, outcome = _attempt(remaining, limits, left, hidden or [])
        outputs.update(attempt.outputs)
        if attempt.done:
            break
        if attempt.last is None and outcome.ended == "exit":
            raise CourseError(
                f"the notebook could not be run ({outcome.reason(Limits(left, limits.mebibytes))}): "
                f"`course doctor` looks for the cause\n{outcome.stderr_tail.strip()}"
            )
        culprit = attempt.last if attempt.last is not None else remaining[0][0]
        stopped[culprit] = _why(attempt, outcome, limits)
        if outcome.ended == "time" or len(stopped) >= _MOST_DEATHS:
            for i, _ in remaining:
                if i != culprit and i not in outputs:
                    stopped[i] = f"it was not run: {stopped[culprit]} in an earlier cell"
            break
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            shown, count = outputs.get(i, ([], None))
            if i in stopped:
                shown, count = [_stop(stopped[i])], None
            cell.outputs = [nbformat.from_dict(item) for item in shown]
            cell.execution_count = count
    return notebook


def _attempt(
    cells: list[tuple[int, str]], limits: GradeLimits, seconds: float, hidden: list[Path]
) -> tuple[_Attempt, Outcome]:
    attempt = _Attempt()
    with tempfile.TemporaryDirectory(prefix="course-") as name:
        folder = Path(name)
        job = {"cells": cells, "cell_seconds": limits.cell_seconds, "grace_seconds": limits.grace_seconds}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "autograde.kernel_worker", str(folder / "job.json")]
        outcome = run_limited(
            sandbox.find().command(command, folder, hidden), Limits(seconds, limits.mebibytes),
            cwd=folder, env=sandbox.environment(folder), on_line=attempt.take,
        )  # fmt: skip
    return attempt, outcome


def _why(attempt: _Attempt, outcome: Outcome, limits: GradeLimits) -> str:
    if outcome.ended == "memory":
        return f"it used more than its limit of {limits.mebibytes:g} MiB of memory"
    if outcome.ended == "time":
        return f"the notebook ran longer than its limit of {limits.run_seconds:g} s"
    return attempt.reason or "it ended the process that ran it"


def _stop(reason: str) -> dict[str, Any]:
    return {"output_type": "error", "ename": STOPPED, "evalue": reason, "traceback": [f"{STOPPED}: {reason}"]}


class SandboxedExecute(NbGraderPreprocessor):
    """nbgrader's `Execute`, replaced by `execute`; configured by its traits in `nbgrader_config.py`."""

    cell_seconds = Float(GradeLimits.cell_seconds, help="Seconds that one cell may run.").tag(config=True)
    run_seconds = Float(GradeLimits.run_seconds, help="Seconds that one notebook may run.").tag(config=True)
    mebibytes = Float(GradeLimits.mebibytes, help="MiB that one notebook may use.").tag(config=True)
    grace_seconds = Float(GradeLimits.grace_seconds, help="Seconds an interrupted cell has to stop.").tag(config=True)
    hidden = List(Unicode(), help="Folders that the notebook must not see.").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: ResourcesDict) -> tuple[NotebookNode, ResourcesDict]:
        limits = GradeLimits(self.cell_seconds, self.run_seconds, self.mebibytes, self.grace_seconds)
        return execute(nb, limits, [Path(name) for name in self.hidden]), resources


class ScoreByErrorsAlone(NbGraderPreprocessor):
    """Leaves nbgrader one thing to score a check by: whether it raised.

    nbgrader gives no points to a check that writes to stderr (a warning, a progress bar), and takes a last expression's
    value for a partial score. The text stays to be read: stderr is relabelled stdout, a value is shown as a display.
    """

    def preprocess_cell(
        self, cell: NotebookNode, resources: ResourcesDict, cell_index: int
    ) -> tuple[NotebookNode, ResourcesDict]:
        if is_grade(cell) and cell.cell_type == "code":
            for output in cell.outputs:
                if output.output_type == "stream":
                    output.name = "stdout"
                elif output.output_type == "execute_result":
                    output.output_type = "display_data"
                    del output["execution_count"]
        return cell, resources


# nbgrader's own list, with the notebook run in the sandbox and warnings kept from costing points.
AUTOGRADE_PREPROCESSORS = [
    SandboxedExecute,
    ScoreByErrorsAlone,
    ClearMetadataPreprocessor,
    LimitOutput,
    SaveAutoGrades,
    AssignLatePenalties,
    CheckCellMetadata,
]
