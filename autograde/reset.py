"""A fresh notebook for the learner; theirs is kept, byte for byte, in a dated backup."""

import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from autograde import build, lesson, results
from autograde.course import Course


@dataclass(frozen=True)
class Reset:
    """What was done: the notebook's path, and its backup unless the file was missing or fresh already."""

    notebook: Path
    backup: Path | None
    changed: bool


def reset_notebook(course: Course, source: Path, now: datetime) -> Reset:
    """Put a fresh build of `source` in the learner's place. The backup is on disk before anything is overwritten.

    Raises `LessonError` when the lesson cannot be built; then nothing was touched.
    """
    fresh = build.to_text(
        build.learner_notebook(lesson.load(source), results.read(course.result_file(source)))
    ).encode()
    path = course.notebook(source)
    there = path.read_bytes() if path.exists() else None
    if there == fresh:
        return Reset(path, None, changed=False)
    backup = None
    if there is not None:
        backup = _keep(there, course.state / "backups", f"{source.stem}-{now:%Y%m%d-%H%M%S}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(fresh)
    draft.replace(path)
    return Reset(path, backup, changed=True)


def _keep(data: bytes, folder: Path, stem: str) -> Path:
    """Write `data` to a name that does not exist yet: `stem.ipynb`, else `stem-2.ipynb`, and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / (f"{stem}.ipynb" if number == 1 else f"{stem}-{number}.ipynb")
        try:
            with path.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            return path
        except FileExistsError:
            number += 1
