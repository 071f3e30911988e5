"""Puts a submitted notebook back into a shape that can be graded, without touching the learner's own words.

Every code cell that the lesson released stands once in the result, as code, in the released order, with its nbgrader
metadata; whatever else the learner wrote stays where it is. So a cell that was deleted, retyped, duplicated, split or
moved costs at most its own points. A pure function of two notebooks.
"""

from collections.abc import Iterable
from uuid import uuid4

import nbformat
from nbformat import NotebookNode

from autograde.grades import Repair

# What a cell weighs when some cells must move to restore the order: a learner's answer moves last.
_WEIGHTS = {"exercise": 1000, "check": 100, "code": 10, "markdown": 1}


def heal(submitted: NotebookNode, released: NotebookNode) -> tuple[NotebookNode, tuple[Repair, ...]]:
    """Return the submission with every released code cell restored once, and what had to be done for it.

    Both are nbformat 4 notebooks; neither is changed.
    """
    cells = _with_unique_ids(submitted)
    repairs: list[Repair] = []
    found = _match(cells, released.cells, repairs)
    placed = _in_order(found, released.cells)
    moved = {i for k, i in found.items() if k not in placed and released.cells[k].cell_type == "code"}
    order = [cell for i, cell in enumerate(cells) if i not in moved]
    where: dict[int, NotebookNode] = {k: cells[i] for k, i in placed.items()}
    for k, original in enumerate(released.cells):
        if original.cell_type == "code":
            if k not in where:
                cell = cells[found[k]] if k in found else nbformat.from_dict(original)
                order.insert(_position(k, original, order, where), cell)
                where[k] = cell
                repairs.append(_moved(original) if k in found else _deleted(original))
            repairs += _restore(where[k], original)
    graded = {id(cell) for k, cell in where.items() if _grade_id(released.cells[k])}
    for cell in order:
        if id(cell) not in graded:
            cell.metadata.pop("nbgrader", None)
    notebook = nbformat.from_dict(
        {**released, "metadata": nbformat.from_dict(released.metadata), "nbformat_minor": 5, "cells": order}
    )
    return notebook, tuple(repairs)


def kind(cell: NotebookNode) -> str:
    """`exercise`, `check`, `code` or `markdown`, by nbgrader's marks."""
    marks = _marks(cell)
    if marks.get("solution"):
        return "exercise"
    if marks.get("grade"):
        return "check"
    return "code" if cell.cell_type == "code" else "markdown"


def _marks(cell: NotebookNode) -> dict[str, object]:
    marks = cell.metadata.get("nbgrader", {})
    return marks if isinstance(marks, dict) else {}


def _grade_id(cell: NotebookNode) -> str:
    return str(_marks(cell).get("grade_id", ""))


def _with_unique_ids(notebook: NotebookNode) -> list[NotebookNode]:
    """Copies of the cells, each with an id; a repeated id stays with its first cell."""
    seen: set[str] = set()
    cells = []
    for cell in notebook.cells:
        copy = nbformat.from_dict(cell)
        if copy.get("id") in seen or not copy.get("id"):
            copy.id = uuid4().hex[:16]
        seen.add(copy.id)
        cells.append(copy)
    return cells


def _match(cells: list[NotebookNode], released: list[NotebookNode], repairs: list[Repair]) -> dict[int, int]:
    """Which submitted cell each released one is: by grade id, else by cell id, else by being the same text."""
    found: dict[int, int] = {}
    free = set(range(len(cells)))

    def take(k: int, candidates: Iterable[int]) -> None:
        same = [i for i in candidates if i in free]
        if k not in found and same:
            original = released[k]
            if kind(original) == "check":
                best = max(same, key=lambda i: (cells[i].cell_type == "code", cells[i].source == original.source, i))
            else:
                best = max(same, key=lambda i: (cells[i].cell_type == original.cell_type, i))
            found[k] = best
            free.discard(best)
            if len(same) > 1:
                repairs.append(Repair(_grade_id(original), _duplicate(original, len(same))))

    numbered = list(enumerate(released))
    for k, original in numbered:
        if _grade_id(original):
            take(k, [i for i in free if _grade_id(cells[i]) == _grade_id(original)])
    for k, original in numbered:
        take(k, [i for i in free if cells[i].id == original.id])
    for k, original in numbered:
        if kind(original) != "exercise" and original.source.strip():
            take(k, [min((i for i in free if _same_text(cells[i], original)), default=-1)])
    return found


def _same_text(cell: NotebookNode, original: NotebookNode) -> bool:
    return bool(cell.cell_type == original.cell_type and cell.source.strip() == original.source.strip())


def _in_order(found: dict[int, int], released: list[NotebookNode]) -> dict[int, int]:
    """The heaviest part of `found` in which the submitted cells stand in released order (they need not move)."""
    best: dict[int, tuple[int, int | None]] = {}
    for k in sorted(found):
        before = [j for j in best if found[j] < found[k]]
        last = max(before, key=lambda j: best[j][0], default=None)
        best[k] = (_WEIGHTS[kind(released[k])] + (best[last][0] if last is not None else 0), last)
    chain: dict[int, int] = {}
    at = max(best, key=lambda j: best[j][0], default=None)
    while at is not None:
        chain[at] = found[at]
        at = best[at][1]
    return chain


def _position(k: int, original: NotebookNode, order: list[NotebookNode], where: dict[int, NotebookNode]) -> int:
    """Where a cell goes back: a check as late as the released order allows, so that it sees what the learner wrote
    instead of the exercise; anything else as early as it allows, so that it hides nothing of it."""
    if kind(original) == "check":
        following = [cell for j, cell in sorted(where.items()) if j > k]
        return _index(order, following[0]) if following else len(order)
    preceding = [cell for j, cell in sorted(where.items()) if j < k]
    return _index(order, preceding[-1]) + 1 if preceding else 0


def _index(order: list[NotebookNode], cell: NotebookNode) -> int:
    return next(i for i, other in enumerate(order) if other is cell)


def _restore(cell: NotebookNode, original: NotebookNode) -> list[Repair]:
    """Give a cell in place its released type, metadata and, for a check, text; say what was different."""
    repairs = []
    if cell.cell_type != "code":
        repairs.append(Repair(_grade_id(original), f"{_name(original)} was a {cell.cell_type} cell; it is run as code"))
        cell.cell_type = "code"
        cell.pop("attachments", None)
    cell.outputs, cell.execution_count = [], None
    if kind(original) == "check" and cell.source != original.source:
        repairs.append(Repair(_grade_id(original), f"{_name(original)} was changed; the original is used"))
        cell.source = original.source
    if kind(original) != "code":
        cell.metadata = nbformat.from_dict(original.metadata)
    return repairs


def _name(original: NotebookNode) -> str:
    names = {"exercise": "the cell of exercise", "check": "the test cell"}
    if kind(original) in names:
        return f"{names[kind(original)]} {_grade_id(original)}"
    return f"the lesson's code cell that starts `{original.source.strip().splitlines()[0][:60]}`"


def _moved(original: NotebookNode) -> Repair:
    return Repair(_grade_id(original), f"{_name(original)} had moved; it is graded in its place")


def _deleted(original: NotebookNode) -> Repair:
    put_back = "an empty one stands in for it" if kind(original) == "exercise" else "it was put back"
    return Repair(_grade_id(original), f"{_name(original)} was deleted; {put_back}")


def _duplicate(original: NotebookNode, count: int) -> str:
    return f"{_name(original)} stands {count} times; one is graded, the others run as ordinary cells"
