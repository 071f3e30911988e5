"""Whether anything that learners must not see survives in `notebooks/`: solutions, hidden tests, other answers.

Two nets. Lines: every secret line, without its spaces and quotes, is looked for in every string of the notebook
(sources, outputs, metadata, attachments). Fragments: every statement and expression of a right answer, with its names
made anonymous, is looked for in all code of the notebook, so a rewrapped or renamed answer is found too.
"""

import ast
import builtins
import html
import re
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from autograde import lesson
from autograde.course import START_PAGE, Course
from autograde.errors import Problem
from autograde.lesson import BEGIN_HIDDEN, BEGIN_SOLUTION, END_HIDDEN, END_SOLUTION, Cell, Lesson

# Shorter lines (`return total`) and smaller fragments (`x.mean(0)`) are anybody's code, not an answer.
_LINE_CHARACTERS = 12
_FRAGMENT_NODES = 10
_FENCE = re.compile(r"```(?:python|py)?\n(.*?)```", re.DOTALL)
_BUILTINS = frozenset(dir(builtins))
_NO_MATTER = {"ctx", "annotation", "returns", "decorator_list", "type_comment", "type_params", "kind"}
_WHAT = {
    "exercise": 'the solution of "{name}"',
    "check": 'the hidden tests of "{name}"',
    "mistake": 'the mistake "{name}" of "{of}"',
    "alternative": 'the alternative "{name}" of "{of}"',
}
_CHECKPOINTS = ".ipynb_checkpoints"


@dataclass(frozen=True)
class _Secret:
    """What must not be seen of one cell: its lines (squashed → as written) and its fragments (anonymous → as code)."""

    line: int
    what: str
    lines: dict[str, str]
    fragments: dict[str, str]


def leaks(course: Course) -> list[Problem]:
    """Every leak in the built notebooks, and every file in `notebooks/` that no build makes."""
    problems = stray_files(course)
    for source in course.sources():
        path = course.notebook(source)
        if path.exists():
            problems += leaks_in(lesson.load(source), nbformat.read(path, as_version=4), path)
    return problems


def stray_files(course: Course) -> list[Problem]:
    """Files beside the built notebooks; JupyterLab's checkpoints, which git ignores, are not looked at."""
    built = {course.notebook(source) for source in course.sources()} | {course.notebooks / f"{START_PAGE}.ipynb"}
    files = (path for path in sorted(course.notebooks.rglob("*")) if path.is_file() and _CHECKPOINTS not in path.parts)
    message = "no build makes this file, and notebooks/ holds nothing else"
    return [Problem(path, 1, message) for path in files if path not in built]


def leaks_in(parsed: Lesson, notebook: NotebookNode, path: Path) -> list[Problem]:
    """Every leak of the lesson in its learner's notebook, at the line of the source cell that leaks.

    A solution's fragment that the learner was shown before the exercise is no secret; one that stands in a later demo
    or visible check is.
    """
    problems = []
    for place, cell in enumerate(notebook.cells, 1):
        if cell.get("outputs") or cell.get("execution_count") is not None:
            problems.append(Problem(path, 1, f"cell {place} was run: a built notebook has no outputs"))
    texts = [(where, _squash(text)) for where, text in _strings(notebook)]
    code = [(where, _fragments(text)) for where, text in _code(notebook)]
    for secret in _secrets(parsed):

        def report(thing: str, where: str, secret: _Secret = secret) -> None:
            problems.append(Problem(parsed.path, secret.line, f"{thing} of {secret.what} is in {path.name}, {where}"))

        for where, text in texts:
            for squashed, line in secret.lines.items():
                if squashed in text:
                    report(f"the line {line!r}", where)
        for where, fragments in code:
            if found := [text for shape, text in secret.fragments.items() if shape in fragments]:
                report(f"the code {max(found, key=len)!r}", where)  # the others are parts of the longest
    return problems


def _secrets(parsed: Lesson) -> list[_Secret]:
    shown = [cell for cell in parsed.cells if not cell.hidden]
    everything = _squash("\n".join(_without(cell.source, _region(cell)) for cell in shown))
    code = [(cell.line, _fragments(cell.source, without=_region(cell))) for cell in shown if cell.kind != "markdown"]
    places = {cell.name: cell.line for cell in parsed.exercises}
    secrets = []
    for cell in parsed.cells:
        region = set(range(1, cell.source.count("\n") + 2)) if cell.hidden else _region(cell)
        if not region:
            continue
        written = [line for number, line in enumerate(cell.source.splitlines(), 1) if number in region]
        if cell.hidden:
            written.append(cell.name)
        lines = {_squash(line): line.strip() for line in written}
        lines = {key: line for key, line in lines.items() if len(key) >= _LINE_CHARACTERS and key not in everything}
        fragments: dict[str, str] = {}
        if cell.kind in ("exercise", "alternative"):
            given = {shape for line, shapes in code if line <= places[cell.exercise] for shape in shapes}
            own = _fragments(cell.source, within=region)
            fragments = {shape: text for shape, text in own.items() if shape not in given}
        secrets.append(_Secret(cell.line, _WHAT[cell.kind].format(name=cell.name, of=cell.of), lines, fragments))
    return secrets


def _region(cell: Cell) -> set[int]:
    """The numbers of a visible cell's lines that are taken out of it for learners: solutions and hidden tests."""
    lines: set[int] = set()
    inside = False
    for number, line in enumerate(cell.source.splitlines(), 1):
        if BEGIN_SOLUTION in line or BEGIN_HIDDEN in line:
            inside = True
        elif END_SOLUTION in line or END_HIDDEN in line:
            inside = False
        elif inside:
            lines.add(number)
    return lines


def _without(text: str, region: set[int]) -> str:
    return "\n".join(line for number, line in enumerate(text.splitlines(), 1) if number not in region)


def _squash(text: str) -> str:
    """Text without what a formatter, JSON or HTML changes: spaces, quotes, backslashes, entities."""
    return re.sub(r"[\s\\\"']+", "", html.unescape(text))


def _strings(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    """Every string of a notebook, keys included, with where it stands."""

    def walk(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(key)
                yield from walk(inner)
        elif isinstance(value, list):
            yield "\n".join(str(inner) for inner in value)
            for inner in value:
                yield from walk(inner)
        else:
            yield str(value)

    for place, cell in enumerate(notebook.cells, 1):
        for part, value in cell.items():
            for text in walk(value):
                yield f"cell {place} ({part})", text
    for text in walk(notebook.metadata):
        yield "the notebook's metadata", text


def _code(notebook: NotebookNode) -> Iterator[tuple[str, str]]:
    for place, cell in enumerate(notebook.cells, 1):
        for text in [cell.source] if cell.cell_type == "code" else _FENCE.findall(cell.source):
            yield f"cell {place}", text


def _fragments(source: str, within: Set[int] | None = None, without: Set[int] = frozenset()) -> dict[str, str]:
    """The statements and expressions of a piece of code, anonymous → as code; none when it is no Python.

    Only those on lines `within`, when given, and touching no line of `without` (1-based).
    """
    try:
        tree = ast.parse(TransformerManager().transform_cell(source))
    except SyntaxError:
        return {}
    fragments = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.expr):
            lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            shape = _shape(node, {})
            if (within is None or lines <= within) and not lines & without and _size(shape) >= _FRAGMENT_NODES:
                fragments[shape] = ast.unparse(node)
    return fragments


def _size(shape: str) -> int:
    """The number of syntax nodes and names."""
    return shape.count("(") + shape.count("$")


def _shape(value: Any, names: dict[str, str]) -> str:
    """A syntax tree as text, with names numbered as they come; without types, decorators and docstrings."""
    if isinstance(value, ast.Name | ast.arg):
        name = value.id if isinstance(value, ast.Name) else value.arg
        return name if name in _BUILTINS else names.setdefault(name, f"${len(names)}")
    if isinstance(value, list):
        return f"[{', '.join(_shape(part, names) for part in value if not _is_docstring(part))}]"
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = [_shape(inner, names) for key, inner in ast.iter_fields(value) if key not in _NO_MATTER]
    return f"{type(value).__name__}({', '.join(fields)})"


def _is_docstring(node: Any) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
