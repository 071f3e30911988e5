"""Proves a lesson: its solution earns everything, an empty notebook nothing, every mistake is caught by name.

One process runs the lesson once, with its quick parameters (`autograde.prover_worker`); at each exercise it forks for
the empty answer, each mistake and each alternative. This module plans that run, reads its events and judges them; both
are pure functions.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from autograde import build, lesson
from autograde.errors import Problem
from autograde.lesson import Cell, Lesson
from autograde.limits import Limits, Outcome, run_limited

Json = dict[str, Any]
Kind = Literal["solution", "empty", "mistake", "alternative"]

ANSWER_SECONDS = 60.0
LESSON_LIMITS = Limits(seconds=900, mebibytes=6 * 1024)
# One thread a library: an OpenMP pool does not survive the fork. No GPU either, for the same reason.
_ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
}


@dataclass(frozen=True)
class CheckOutcome:
    """One check cell run on one answer: its exception's class and message, empty when it passed."""

    id: str
    passed: bool
    error: str = ""
    message: str = ""


@dataclass(frozen=True)
class Answer:
    """One answer to one exercise and what its checks said. `fault` says why it is not as it must be, or is empty."""

    kind: Kind
    name: str
    exercise: str
    line: int
    points: int
    checks: tuple[CheckOutcome, ...]
    fault: str

    @property
    def ok(self) -> bool:
        return not self.fault


@dataclass(frozen=True)
class LessonProof:
    """What was proven about one lesson."""

    lesson: str
    path: Path
    points: int
    checks: int
    answers: tuple[Answer, ...]
    problems: tuple[Problem, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems

    def of_kind(self, kind: Kind) -> list[Answer]:
        return [answer for answer in self.answers if answer.kind == kind]

    def earned(self, kind: Literal["solution", "empty"]) -> int:
        """The points of all solutions, or of all empty answers."""
        return sum(answer.points for answer in self.of_kind(kind))

    def to_dict(self) -> Json:
        """The JSON form that `course prove --json` prints, one object a lesson.

        Keys: `lesson`, `path`, `ok`, `seconds`, `exercises`, `checks`, `points`, `solution_points`, `empty_points`,
        `mistakes` and `alternatives` (`total` and `ok` each), `answers` (`kind`, `name`, `exercise`, `line`, `points`,
        `fault`, and `checks`: `id`, `passed`, `error`, `message`), `problems` (`line`, `message`).
        """
        return {
            "lesson": self.lesson,
            "path": str(self.path),
            "ok": self.ok,
            "seconds": round(self.seconds, 1),
            "exercises": len(self.of_kind("solution")),
            "checks": self.checks,
            "points": self.points,
            "solution_points": self.earned("solution"),
            "empty_points": self.earned("empty"),
            "mistakes": _count(self.of_kind("mistake")),
            "alternatives": _count(self.of_kind("alternative")),
            "answers": [asdict(answer) for answer in self.answers],
            "problems": [{"line": problem.line, "message": problem.message} for problem in self.problems],
        }


def prove_lesson(
    source: Path, *, answer_seconds: float = ANSWER_SECONDS, limits: Limits = LESSON_LIMITS, jobs: int | None = None
) -> LessonProof:
    """Prove the lesson at `source`, with at most `jobs` forked answers at once (by default one a core).

    An answer may take `answer_seconds` of processor time, and four times that by the clock.

    Raises `LessonError` when the source cannot be built; everything else that is wrong is in the proof.
    """
    parsed = lesson.load(source).quick()
    with tempfile.TemporaryDirectory(prefix="prove-") as folder:
        scratch = Path(folder)
        plan_file = scratch / "plan.json"
        plan_file.write_text(json.dumps(plan(parsed, answer_seconds, jobs or os.cpu_count() or 1)), encoding="utf-8")
        environment = {**os.environ, **_ENVIRONMENT, "COURSE_RESULTS": str(scratch / "results")}
        events: list[Json] = []
        outcome = run_limited(
            [sys.executable, "-m", "autograde.prover_worker", plan_file], limits, cwd=scratch, env=environment,
            on_line=lambda line: events.append(json.loads(line)),
        )  # fmt: skip
    return judge(parsed, events, outcome, limits)


def plan(parsed: Lesson, answer_seconds: float, jobs: int) -> Json:
    """What the worker does: the lesson's code cells in order, and at each exercise the other answers to try."""
    released = {node.metadata.get("nbgrader", {}).get("grade_id"): node.source for node in _released(parsed)}
    visible = [cell for cell in parsed.cells if not cell.hidden and cell.kind != "markdown"]
    while visible and visible[-1].kind != "check":
        visible.pop()  # what runs after the last check cannot change a verdict; `course run` shows that it runs
    ids = iter(parsed.check_ids())
    checks = [next(ids) if cell.kind == "check" else "" for cell in visible]
    steps = []
    for cell, check in zip(visible, checks, strict=True):
        variants: list[Json] = []
        if cell.kind == "exercise":
            own = [place for place, other in enumerate(visible) if other.kind == "check" and other.name == cell.name]
            last, names = own[-1], [checks[place] for place in own]
            for kind, answer in _tries(parsed, cell):
                text = released[cell.name] if kind == "empty" else answer.source
                variants.append({"id": f"{kind}-{answer.line}", "source": text, "last": last, "checks": names})
        steps.append({"source": cell.source, "line": cell.line, "check": check, "variants": variants})
    return {"answer_seconds": answer_seconds, "jobs": jobs, "steps": steps}


def judge(parsed: Lesson, events: Iterable[Json], outcome: Outcome, limits: Limits) -> LessonProof:
    """Turn the worker's events into verdicts."""
    events = list(events)
    solution = {event["id"]: event for event in events if event["event"] == "check"}
    forked = {event["id"]: event for event in events if event["event"] == "answer"}
    ids = parsed.check_ids()
    problems = _run_problems(parsed, events, outcome, limits)
    answers = []
    for cell in parsed.exercises:
        checks = {id_: check for id_, check in ids.items() if check.name == cell.name}
        answers.append(_solution(parsed, cell, checks, solution, problems))
        for kind, answer in _tries(parsed, cell):
            event = forked.get(f"{kind}-{answer.line}")
            judged = _answer(kind, answer, cell.name, checks, event)
            if judged.fault and (event is not None or outcome.ok):  # a run that broke off is reported once, above
                problems.append(Problem(parsed.path, answer.line, f"{_title(judged)}: {judged.fault}"))
            answers.append(judged)
    ordered = tuple(sorted(problems, key=lambda problem: problem.line))
    return LessonProof(parsed.number, parsed.path, parsed.points, len(ids), tuple(answers), ordered, outcome.seconds)


def _released(parsed: Lesson) -> list[Any]:
    cells: list[Any] = build.release(build.source_notebook(parsed)).cells
    return cells


def _tries(parsed: Lesson, exercise: Cell) -> list[tuple[Kind, Cell]]:
    """The answers to fork for at an exercise; the empty one stands in the exercise's own cell."""
    tries: list[tuple[Kind, Cell]] = [("empty", exercise)]
    for cell in parsed.of_kind("mistake", "alternative"):
        if cell.of == exercise.name:
            tries.append(("mistake" if cell.kind == "mistake" else "alternative", cell))
    return tries


def _title(answer: Answer) -> str:
    if answer.kind == "empty":
        return f'the empty answer to "{answer.exercise}"'
    return f'{answer.kind} "{answer.name}" of "{answer.exercise}"'


def _count(answers: list[Answer]) -> Json:
    return {"total": len(answers), "ok": sum(answer.ok for answer in answers)}


def _run_problems(parsed: Lesson, events: list[Json], outcome: Outcome, limits: Limits) -> list[Problem]:
    """Faults of the lesson's own run: a cell that fails, or a run that broke off."""
    problems = []
    for event in events:
        if event["event"] == "failed cell":
            message = f"with the solution this cell fails: {event['error']}: {event['message']}"
            problems.append(Problem(parsed.path, event["line"], message))
    if not outcome.ok:
        lines = [event["line"] for event in events if event["event"] == "cell"]
        tail = outcome.stderr_tail.strip().splitlines()
        detail = f": {tail[-1]}" if tail else ""
        message = f"the proof broke off at this cell: {outcome.reason(limits)}{detail}"
        problems.append(Problem(parsed.path, lines[-1] if lines else 1, message))
    return problems


def _solution(
    parsed: Lesson, cell: Cell, checks: dict[str, Cell], seen: dict[str, Json], problems: list[Problem]
) -> Answer:
    """The solution's verdict; its faults are reported at the check's line. Both traps cost points in nbgrader."""
    outcomes, points, faults = [], 0, []
    for id_, check in checks.items():
        if id_ not in seen:
            faults.append("a check was not reached")
            continue
        event = seen[id_]
        outcomes.append(_outcome(event))
        found = []
        if not event["passed"]:
            found.append(f"the solution fails it: {event['error']}: {event['message']}")
        if event["stderr"]:
            found.append(f"it writes to stderr, and nbgrader gives no points then: {event['stderr'].strip()!r}")
        if event["value"]:
            found.append("it ends in an expression's value, which nbgrader may read as a grade: end it in an assert")
        points += 0 if found else check.points
        faults += found
        problems += [Problem(parsed.path, check.line, f'check="{check.name}": {fault}') for fault in found]
    return Answer("solution", cell.name, cell.name, cell.line, points, tuple(outcomes), "; ".join(faults))


def _answer(kind: Kind, cell: Cell, exercise: str, checks: dict[str, Cell], event: Json | None) -> Answer:
    outcomes = tuple(_outcome(check) for check in event["checks"]) if event else ()
    passed = {outcome.id for outcome in outcomes if outcome.passed}
    points = sum(check.points for id_, check in checks.items() if id_ in passed)
    name = "empty" if kind == "empty" else cell.name
    fault = "was not tried" if event is None else _fault(kind, cell, checks, outcomes, event)
    return Answer(kind, name, exercise, cell.line, points, outcomes, fault)


def _fault(kind: Kind, cell: Cell, checks: dict[str, Cell], outcomes: tuple[CheckOutcome, ...], event: Json) -> str:
    if event["ended"]:
        return f"{event['ended']} instead of failing a check" if kind != "alternative" else str(event["ended"])
    failed = [outcome for outcome in outcomes if not outcome.passed]
    if kind == "empty":
        given = ", ".join(f"{o.id} ({checks[o.id].points} points)" for o in outcomes if o.passed)
        return f"earns points that nobody worked for: {given}" if given else ""
    if kind == "alternative":
        refused = "; ".join(f"{o.id}: {o.error}: {o.message}" for o in failed)
        return f"is refused: {_own_error(event)}{refused}" if refused else ""
    if not failed:
        return "is not caught: every check passes"
    if any(cell.says in outcome.message for outcome in failed):
        return ""
    got = "; ".join(f"{o.id}: {o.error}: {o.message}" for o in failed)
    if not any(outcome.error == "AssertionError" for outcome in failed):
        return f"crashes, where a check must say {cell.says!r}: {_own_error(event)}{got}"
    return f"is caught, but no message says {cell.says!r}: {got}"


def _own_error(event: Json) -> str:
    own = event["cell"]
    return "" if own is None or own["passed"] else f"the cell itself raises {own['error']}: {own['message']}; "


def _outcome(event: Json) -> CheckOutcome:
    return CheckOutcome(event["id"], event["passed"], event["error"], event["message"])
