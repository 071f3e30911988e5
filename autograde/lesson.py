"""A lesson source (percent-format Python) parsed into typed cells, or refused with file and line.

The vocabulary is the one of `docs/authoring.md`: `exercise`, `check`, `mistake`, `alternative`, and papermill's
`parameters` tag. Everything here is a pure function of the text.
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jupytext
from nbformat import NotebookNode

from autograde.errors import LessonError, Problem

Kind = Literal["markdown", "code", "exercise", "check", "mistake", "alternative"]

BEGIN_SOLUTION, END_SOLUTION = "### BEGIN SOLUTION", "### END SOLUTION"
BEGIN_HIDDEN, END_HIDDEN = "### BEGIN HIDDEN TESTS", "### END HIDDEN TESTS"

# What each marked cell may carry, beside the key that names its kind: (required, optional).
_ATTRIBUTES: dict[Kind, tuple[frozenset[str], frozenset[str]]] = {
    "exercise": (frozenset({"difficulty", "minutes"}), frozenset()),
    "check": (frozenset({"points"}), frozenset()),
    "mistake": (frozenset({"of", "says"}), frozenset()),
    "alternative": (frozenset({"of"}), frozenset()),
}
_JUPYTEXT_OWN = {"lines_to_next_cell", "lines_to_end_of_cell_marker"}
_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*\Z")
_QUICK = re.compile(r"^(\w+ = )[^#\n]*?(  #[^\n]*\bquick: ([^\s;]+))", re.MULTILINE)
_FILE_NAME = re.compile(r"(?P<module>\d+)_(?P<number>\d+)_[a-z0-9_]+\Z")


@dataclass(frozen=True)
class Cell:
    """One cell of a lesson source. `name` is the exercise's slug for marked cells, the wording for wrong answers."""

    kind: Kind
    source: str
    line: int
    name: str = ""
    of: str = ""
    says: str = ""
    points: int = 0
    difficulty: int = 0
    minutes: int = 0
    tags: tuple[str, ...] = ()

    @property
    def exercise(self) -> str:
        """The slug of the exercise the cell belongs to; empty for prose and demo code."""
        return self.of if self.kind in ("mistake", "alternative") else self.name

    @property
    def hidden(self) -> bool:
        """Whether learners never see the cell."""
        return self.kind in ("mistake", "alternative")


@dataclass(frozen=True)
class Lesson:
    """A parsed lesson: its cells in order, and what its file name says about its place on the path."""

    path: Path
    cells: tuple[Cell, ...]

    @property
    def stem(self) -> str:
        return self.path.stem

    @property
    def module(self) -> str:
        """The nbgrader assignment, which is the folder: `2_peft`."""
        return self.path.parent.name

    @property
    def number(self) -> str:
        """What people say: `2.1`. A page that is no lesson (the start page) has none."""
        match = _FILE_NAME.match(self.stem)
        return f"{match['module']}.{match['number']}" if match else ""

    @property
    def title(self) -> str:
        """The first heading, without its number."""
        for cell in self.cells:
            if cell.kind == "markdown" and cell.source.startswith("# "):
                heading = cell.source.splitlines()[0][2:].strip()
                return heading.removeprefix(self.number).strip()
        return self.stem

    def of_kind(self, *kinds: Kind) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.kind in kinds)

    @property
    def exercises(self) -> tuple[Cell, ...]:
        return self.of_kind("exercise")

    @property
    def points(self) -> int:
        return sum(cell.points for cell in self.of_kind("check"))

    def quick(self) -> "Lesson":
        """The same lesson with the small values that its parameters cell names: `steps = 160  # quick: 3`.

        It runs through in seconds and measures nothing. No check may depend on a parameter, so points are the same.
        """
        return replace(self, cells=tuple(_quick(cell) for cell in self.cells))

    def check_ids(self) -> dict[str, Cell]:
        """nbgrader's grade id of each check cell, in order: `check-lora-delta`, then `check-lora-delta-2`."""
        seen: Counter[str] = Counter()
        ids: dict[str, Cell] = {}
        for cell in self.of_kind("check"):
            seen[cell.name] += 1
            count = seen[cell.name]
            ids[f"check-{cell.name}" + (f"-{count}" if count > 1 else "")] = cell
        return ids


def parse(text: str, path: Path) -> Lesson:
    """Parse a lesson source.

    Raises `LessonError` with every problem found, each with its file and line.
    """
    notebook = jupytext.reads(text, fmt="py:percent")
    lines = _cell_lines(text)
    if len(lines) != len(notebook.cells):
        raise LessonError(
            [Problem(path, 1, "the file must start with a cell marker: put '# %% [markdown]' on its first line")]
        )
    problems: list[Problem] = []
    cells = []
    for node, line in zip(notebook.cells, lines, strict=True):
        cell, found = _read_cell(node, line, path)
        problems += found
        if cell is not None:
            cells.append(cell)
    lesson = Lesson(path, tuple(cells))
    if not problems:  # a cell that cannot be read would be missed by its neighbours, and reported again there
        problems = _structure_problems(lesson)
    if problems:
        raise LessonError(sorted(problems, key=lambda problem: problem.line))
    return lesson


def load(path: Path) -> Lesson:
    """Read and parse the lesson source at `path`."""
    return parse(path.read_text(encoding="utf-8"), path)


def _quick(cell: Cell) -> Cell:
    if "parameters" not in cell.tags:
        return cell
    return replace(cell, source=_QUICK.sub(r"\1\3\2", cell.source))


def _cell_lines(text: str) -> list[int]:
    return [number for number, line in enumerate(text.splitlines(), 1) if re.match(r"# %%($|\s)", line)]


def _read_cell(node: NotebookNode, line: int, path: Path) -> tuple[Cell | None, list[Problem]]:
    metadata = {key: value for key, value in node.metadata.items() if key not in _JUPYTEXT_OWN}
    tags = tuple(metadata.pop("tags", ()))
    kinds = [kind for kind in _ATTRIBUTES if kind in metadata]

    def refuse(message: str) -> tuple[None, list[Problem]]:
        return None, [Problem(path, line, message)]

    if len(kinds) > 1:
        return refuse(f"a cell is one of {', '.join(_ATTRIBUTES)}; this one says {' and '.join(kinds)}")
    if not kinds:
        if metadata:
            return refuse(
                f"unknown cell attribute {', '.join(sorted(metadata))}; known: {', '.join(_ATTRIBUTES)}, tags"
            )
        return Cell("markdown" if node.cell_type == "markdown" else "code", node.source, line, tags=tags), []

    kind = kinds[0]
    if node.cell_type != "code":
        return refuse(f"a cell marked {kind} must be a code cell; remove [{node.cell_type}]")
    name = metadata.pop(kind)
    required, optional = _ATTRIBUTES[kind]
    if missing := required - metadata.keys():
        return refuse(f'{kind}="{name}" lacks {", ".join(sorted(missing))}')
    if unknown := metadata.keys() - required - optional:
        return refuse(f'{kind}="{name}" has unknown {", ".join(sorted(unknown))}')
    if kind in ("exercise", "check") and not (isinstance(name, str) and _SLUG.match(name)):
        return refuse(f'{kind}="{name}": a name is lower-case words joined by hyphens, such as "lora-delta"')
    for key in ("points", "difficulty", "minutes"):
        if key in metadata and not (isinstance(metadata[key], int) and metadata[key] > 0):
            return refuse(f'{kind}="{name}": {key} must be a whole number above 0, not {metadata[key]!r}')
    if kind == "mistake" and not str(metadata["says"]).strip():
        return refuse(f'mistake="{name}": says must hold the words that the failing check prints')
    return Cell(kind, node.source, line, name=str(name), tags=tags, **metadata), []


def _structure_problems(lesson: Lesson) -> list[Problem]:
    problems: list[Problem] = []

    def report(cell: Cell, message: str) -> None:
        problems.append(Problem(lesson.path, cell.line, message))

    checked = {cell.name for cell in lesson.of_kind("check")}
    seen: set[str] = set()
    for cell in lesson.cells:
        solutions = _regions(cell.source, BEGIN_SOLUTION, END_SOLUTION)
        hidden = _regions(cell.source, BEGIN_HIDDEN, END_HIDDEN)
        if solutions is None:
            report(cell, f"unbalanced markers: every '{BEGIN_SOLUTION}' needs one '{END_SOLUTION}' after it")
        if hidden is None:
            report(cell, f"unbalanced markers: every '{BEGIN_HIDDEN}' needs one '{END_HIDDEN}' after it")
        if solutions and cell.kind != "exercise":
            report(cell, f"a solution outside its region: '{BEGIN_SOLUTION}' belongs in a cell marked exercise=…")
        if hidden and cell.kind != "check":
            report(cell, f"hidden tests outside a check: '{BEGIN_HIDDEN}' belongs in a cell marked check=…")
        if cell.kind == "exercise":
            if cell.name in seen:
                report(cell, f'duplicate name: exercise="{cell.name}" stands in the file already')
            seen.add(cell.name)
            if solutions == 0:
                report(
                    cell,
                    f'exercise="{cell.name}" has no solution region; put its answer between the SOLUTION markers',
                )
            if cell.name not in checked:
                report(
                    cell,
                    f'exercise="{cell.name}" has no check; add a cell check="{cell.name}" points=… after it',
                )
        elif cell.kind == "check" and cell.name not in seen:
            report(cell, f'check="{cell.name}" has no exercise of that name before it')
        elif cell.hidden and cell.of not in seen:
            report(
                cell,
                f'{cell.kind}="{cell.name}" is of="{cell.of}", but no exercise of that name stands before it',
            )
    return problems


def _regions(source: str, begin: str, end: str) -> int | None:
    """The number of well-formed regions, or None when the markers do not balance."""
    count, inside = 0, False
    for line in source.splitlines():
        if begin in line:
            if inside:
                return None
            inside = True
        elif end in line:
            if not inside:
                return None
            inside, count = False, count + 1
    return None if inside else count
