"""Where things stand: the root of the course, its lessons, and the names people use for them (`2.1`, `2`)."""

import re
from dataclasses import dataclass
from pathlib import Path

from autograde.errors import CourseError

START_PAGE = "start_here"


@dataclass(frozen=True)
class Course:
    """The folders of one course tree. Nothing is read until asked for."""

    root: Path

    @property
    def solutions(self) -> Path:
        return self.root / "solutions"

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def state(self) -> Path:
        """What the command keeps for this learner: progress, backups, runs. Never committed."""
        return self.root / ".course"

    def sources(self) -> list[Path]:
        """Every lesson source, in the order of the path."""
        return sorted(self.solutions.glob("[0-9]*_*/[0-9]*_[0-9]*_*.py"), key=_place)

    def select(self, names: list[str]) -> list[Path]:
        """The sources that `names` mean: `2.1` a lesson, `2` a module, nothing at all the whole path.

        Raises `CourseError` for a name that means nothing, with the names that would.
        """
        sources = self.sources()
        if not names:
            return sources
        chosen = []
        for name in names:
            matching = [path for path in sources if name in (number(path), number(path).split(".")[0], path.stem)]
            if not matching:
                known = ", ".join(number(path) for path in sources)
                raise CourseError(f"there is no lesson or module {name!r}; there are: {known}")
            chosen += [path for path in matching if path not in chosen]
        return sorted(chosen, key=_place)

    def select_one(self, name: str) -> Path:
        """The source of one lesson; a module's name is refused."""
        matching = self.select([name])
        if len(matching) != 1:
            raise CourseError(
                f"{name!r} means {len(matching)} lessons; name one: {', '.join(number(p) for p in matching)}"
            )
        return matching[0]

    def notebook(self, source: Path) -> Path:
        """The learner's notebook of a lesson source: the same place in the tree."""
        return self.notebooks / source.parent.name / f"{source.stem}.ipynb"

    def result_file(self, source: Path) -> Path:
        return self.results / f"{source.stem}.json"


def number(source: Path) -> str:
    """`2.1` for `2_1_lora_from_scratch.py`."""
    match = re.match(r"(\d+)_(\d+)_", source.stem)
    if match is None:
        raise CourseError(f"{source}: a lesson file is named like 2_1_lora_from_scratch.py")
    return f"{int(match[1])}.{int(match[2])}"


def _place(source: Path) -> tuple[int, int]:
    module, lesson = number(source).split(".")
    return int(module), int(lesson)


def find(start: Path | None = None) -> Course:
    """The course that holds `start` (the working directory by default).

    Raises `CourseError` when no parent folder has both `solutions/` and `notebooks/`.
    """
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents):
        if (folder / "solutions").is_dir() and (folder / "pyproject.toml").is_file():
            return Course(folder)
    raise CourseError(f"{here} is not inside the course: change into the folder that holds solutions/ and notebooks/")
