"""What grading found, as data: points and messages of a lesson, its exercises and their checks."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["passed", "failed", "unanswered"]


@dataclass(frozen=True)
class Repair:
    """One thing that was put right in a notebook: the grade id of the cell (empty for ordinary code), and what."""

    cell: str
    message: str


@dataclass(frozen=True)
class CheckGrade:
    """One check cell: nbgrader's grade id, its points, and what it said when it failed."""

    id: str
    points: float
    max_points: float
    message: str = ""


@dataclass(frozen=True)
class ExerciseGrade:
    """One exercise: the sum of its checks. `hint` is filled in by who knows how often it was tried."""

    name: str
    state: State
    points: float
    max_points: float
    messages: tuple[str, ...]
    checks: tuple[CheckGrade, ...]
    hint: str = ""


@dataclass(frozen=True)
class LessonGrade:
    """What one grading found. `notes` are about this machine, `repairs` about the notebook; `html` only when asked."""

    lesson: str
    number: str
    title: str
    points: float
    max_points: float
    exercises: tuple[ExerciseGrade, ...]
    repairs: tuple[Repair, ...] = ()
    notes: tuple[str, ...] = ()
    html: str = field(default="", repr=False)

    @property
    def complete(self) -> bool:
        return self.points == self.max_points

    def to_dict(self) -> dict[str, Any]:
        """The schema of `course check --json`: these fields, nested, without the HTML."""
        data = asdict(self)
        del data["html"]
        return data
