"""What a learner has earned so far: `.course/progress.json`, written whole or not at all, and never thrown away."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from autograde.grades import LessonGrade
from autograde.lesson import Lesson

_VERSION = 1


@dataclass(frozen=True)
class Tried:
    """One exercise as last checked. `attempts` counts the failed checks since it was last passed."""

    points: float
    max_points: float
    attempts: int = 0


@dataclass(frozen=True)
class Checked:
    """One lesson as last checked, at `when` (ISO 8601, local time)."""

    points: float
    max_points: float
    when: str
    exercises: dict[str, Tried] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One lesson of the map: points as last checked (none before the first check) of those available now."""

    module: str
    lesson: str
    number: str
    title: str
    points: float
    max_points: int
    exercises: int
    checked: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(state: Path, now: datetime) -> tuple[dict[str, Checked], str]:
    """The progress kept in the folder `state`, by lesson, and a note about a file that could not be read.

    Such a file is set aside under a dated name, not overwritten.
    """
    path = state / "progress.json"
    if not path.exists():
        return {}, ""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}")
        return {stem: _checked(entry) for stem, entry in data["lessons"].items()}, ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        aside = _free_name(state / f"progress-unreadable-{now:%Y%m%d-%H%M%S}.json")
        path.rename(aside)
        return {}, f"{path} could not be read ({error!r}): it is kept as {aside.name}, and progress starts afresh"


def record(
    state: Path, grade: LessonGrade, hints: dict[str, tuple[str, ...]], now: datetime
) -> tuple[LessonGrade, str]:
    """Write one lesson's grade down; return it with the hints that its failed exercises have reached, and a note.

    A failed exercise shows its first hint, then its second, and so on. An unanswered one counts no attempt.
    """
    state.mkdir(parents=True, exist_ok=True)
    with _locked(state / "progress.lock"):
        lessons, note = read(state, now)
        before = lessons[grade.lesson].exercises if grade.lesson in lessons else {}
        tried: dict[str, Tried] = {}
        shown = []
        for exercise in grade.exercises:
            attempts = before[exercise.name].attempts if exercise.name in before else 0
            if exercise.state == "failed":
                attempts += 1
                known = hints.get(exercise.name, ())
                exercise = replace(exercise, hint=known[min(attempts, len(known)) - 1] if known else "")
            elif exercise.state == "passed":
                attempts = 0
            tried[exercise.name] = Tried(exercise.points, exercise.max_points, attempts)
            shown.append(exercise)
        when = now.isoformat(timespec="seconds")
        lessons[grade.lesson] = Checked(grade.points, grade.max_points, when, tried)
        _write(state / "progress.json", lessons)
    return replace(grade, exercises=tuple(shown)), note


def rows(lessons: list[Lesson], checked: dict[str, Checked]) -> list[Row]:
    """The map of the path: a row a lesson, in the given order."""
    found = []
    for lesson in lessons:
        done = checked.get(lesson.stem)
        found.append(
            Row(
                lesson.module,
                lesson.stem,
                lesson.number,
                lesson.title,
                done.points if done else 0.0,
                lesson.points,
                len(lesson.exercises),
                done.when if done else "",
            )
        )
    return found


def _checked(entry: dict[str, Any]) -> Checked:
    exercises = {name: Tried(**tried) for name, tried in entry["exercises"].items()}
    return Checked(float(entry["points"]), float(entry["max_points"]), str(entry["when"]), exercises)


def _write(path: Path, lessons: dict[str, Checked]) -> None:
    data = {"version": _VERSION, "lessons": {stem: asdict(entry) for stem, entry in sorted(lessons.items())}}
    draft = path.with_suffix(".json.new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(data, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def _free_name(path: Path) -> Path:
    candidates = (path if n == 1 else path.with_stem(f"{path.stem}-{n}") for n in range(1, 10_000))
    return next(candidate for candidate in candidates if not candidate.exists())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time read, change and write the progress."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
