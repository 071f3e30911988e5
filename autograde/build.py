"""Lesson → notebooks: the nbgrader source notebook (with answers) and the learner's notebook (without).

Building is a pure function of the lesson and its results: the same input gives the same bytes. The stripping is
nbgrader's own; nothing here removes a solution by itself.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbgrader.preprocessors import (
    CheckCellMetadata,
    ClearHiddenTests,
    ClearMarkScheme,
    ClearOutput,
    ClearSolutions,
    ComputeChecksums,
    LockCells,
)

from autograde.errors import LearnerWorkError, LessonError, Problem
from autograde.lesson import Cell, Lesson
from autograde.results import LessonResults, fill

_KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# nbgrader's own order for releasing an assignment (nbgrader.converters.GenerateAssignment), less its gradebook steps.
_RELEASE = (
    LockCells,
    ClearSolutions,
    ClearOutput,
    CheckCellMetadata,
    ComputeChecksums,
    ClearHiddenTests,
    ClearMarkScheme,
    ComputeChecksums,
    CheckCellMetadata,
)


def source_notebook(lesson: Lesson, results: LessonResults | None = None) -> NotebookNode:
    """The nbgrader source notebook: solutions, hidden tests and nbgrader metadata (schema v3).

    With `results`, the placeholders in prose are filled; a run that is about to measure them goes without.
    Raises `LessonError` for a placeholder that nothing was measured for.
    """
    problems: list[Problem] = []
    names = iter(lesson.check_ids())
    occurrences: Counter[str] = Counter()
    nodes = []
    for cell in lesson.cells:
        if cell.hidden:
            continue
        source = cell.source
        if cell.kind == "markdown" and results is not None:
            missing: list[str] = []
            source = fill(source, results, missing.append)
            problems += [_unmeasured(lesson, cell, placeholder) for placeholder in missing]
        if cell.kind == "exercise":
            source = f"# difficulty {cell.difficulty} of 5, about {cell.minutes} minutes\n{source}"
        node = nbformat.v4.new_markdown_cell(source) if cell.kind == "markdown" else nbformat.v4.new_code_cell(source)
        node.metadata = nbformat.from_dict(_metadata(cell, names))
        occurrences[cell.source] += 1
        node.id = _cell_id(lesson.stem, cell, occurrences[cell.source])
        nodes.append(node)
    if problems:
        raise LessonError(problems)
    metadata = {"kernelspec": dict(_KERNEL), "course": {"lesson": lesson.stem}}
    return nbformat.v4.new_notebook(cells=nodes, metadata=metadata)


def release(source: NotebookNode) -> NotebookNode:
    """The learner's notebook of a source notebook: nbgrader's release pipeline, then a fingerprint of the release."""
    notebook = nbformat.from_dict(source)
    resources: dict[str, object] = {}
    for preprocessor in _RELEASE:
        notebook, resources = preprocessor().preprocess(notebook, resources)
    notebook.metadata.course.release = fingerprint(notebook)
    return notebook


def learner_notebook(lesson: Lesson, results: LessonResults) -> NotebookNode:
    """The notebook that learners open, with every measured number in its prose."""
    return release(source_notebook(lesson, results))


def to_text(notebook: NotebookNode) -> str:
    """The one serialisation of a built notebook (nbformat's, keys sorted), so equal notebooks are equal bytes."""
    return nbformat.writes(notebook, version=4) + "\n"


def fingerprint(notebook: NotebookNode) -> str:
    """A hash of everything a learner can write in a notebook: the cells' types and sources, in order."""
    digest = hashlib.sha256()
    for cell in notebook.cells:
        for part in (cell.cell_type, cell.source):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def holds_work(notebook: NotebookNode) -> bool:
    """Whether a person changed the notebook since it was built. Outputs do not count: running it makes them again."""
    return notebook.metadata.get("course", {}).get("release") != fingerprint(notebook)


def write(notebook: NotebookNode, path: Path) -> bool:
    """Write a built notebook; return whether the file changed.

    Raises `LearnerWorkError` when the file there holds a learner's work (or cannot be read as a notebook).
    """
    text = to_text(notebook)
    if path.exists():
        there = path.read_text(encoding="utf-8")
        if there == text:
            return False
        if _may_hold_work(there):
            raise LearnerWorkError(
                f"{path} holds a learner's work and was left as it is: "
                f"`course reset` keeps a dated backup of it and puts a fresh notebook there"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)  # an interrupted build leaves the old notebook or the new one, never half of one
    return True


def _may_hold_work(text: str) -> bool:
    try:
        return holds_work(nbformat.reads(text, as_version=4))
    except Exception:  # whatever is wrong with the file, only its owner may throw it away
        return True


def _metadata(cell: Cell, check_ids: Iterator[str]) -> dict[str, object]:
    if cell.kind == "exercise":
        marks: dict[str, object] = {"grade": False, "solution": True, "locked": False, "grade_id": cell.name}
    elif cell.kind == "check":
        marks = {
            "grade": True,
            "solution": False,
            "locked": True,
            "grade_id": next(check_ids),
            "points": cell.points,
        }
    else:
        return {"tags": list(cell.tags)} if cell.tags else {}
    metadata: dict[str, object] = {"nbgrader": {"schema_version": 3, "task": False, **marks}}
    if cell.kind == "exercise":
        metadata["exercise"] = {"difficulty": cell.difficulty, "minutes": cell.minutes}
    if cell.tags:
        metadata["tags"] = list(cell.tags)
    return metadata


def _cell_id(stem: str, cell: Cell, occurrence: int) -> str:
    if cell.kind == "exercise":
        return cell.name[:64]
    return hashlib.sha256(f"{stem}\0{cell.kind}\0{cell.source}\0{occurrence}".encode()).hexdigest()[:16]


def _unmeasured(lesson: Lesson, cell: Cell, placeholder: str) -> Problem:
    return Problem(
        lesson.path,
        cell.line,
        f"{placeholder} was not measured: `course run {lesson.number} --save` writes results/{lesson.stem}.json",
    )
