"""The exceptions that a person sees: each message says what is wrong, where, and what to do."""

from dataclasses import dataclass
from pathlib import Path


class CourseError(Exception):
    """Anything the `course` command reports as one line instead of a traceback."""


@dataclass(frozen=True)
class Problem:
    """One fault in a lesson source, with the line (1-based) on which the faulty cell starts."""

    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


class LessonError(CourseError):
    """A lesson source that cannot be built; carries every problem found, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class LearnerWorkError(CourseError):
    """A write that would have destroyed a learner's work was refused."""
