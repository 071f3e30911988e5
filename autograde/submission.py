"""Reads a learner's notebook for grading: once, as bytes, and never writes it."""

import json
import warnings
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.warnings import DuplicateCellId, MissingIDFieldWarning

from autograde.errors import CourseError
from autograde.lesson import Lesson


def read(path: Path, lesson: Lesson) -> NotebookNode:
    """The notebook at `path` in nbformat 4.5, without its outputs.

    Raises `CourseError`, with what to do, when the file is missing, is no notebook, or is another lesson's.
    """
    mend = f"`course reset {lesson.number or lesson.stem}` keeps this file as a backup and puts a fresh notebook there"
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CourseError(
            f"there is no notebook {path}: `course reset {lesson.number}` puts a fresh one there"
        ) from error
    try:
        notebook = _parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CourseError(f"{path} cannot be read as a notebook ({reason}). It was left as it is; {mend}") from error
    _refuse_another(notebook, path, lesson, mend)
    return notebook


def _parse(data: bytes) -> NotebookNode:
    raw = json.loads(data.decode("utf-8-sig"))
    if not isinstance(raw, dict) or not isinstance(raw.get("nbformat"), int):
        raise ValueError("it is JSON, but no notebook")
    with warnings.catch_warnings():
        # Cells without an id, or with a copied one, are ordinary in files of other editors; `heal` settles them.
        warnings.simplefilter("ignore", DuplicateCellId)
        warnings.simplefilter("ignore", MissingIDFieldWarning)
        notebook = nbformat.convert(nbformat.from_dict(raw), 4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
            if isinstance(cell.source, list):
                cell.source = "".join(cell.source)
        nbformat.validate(notebook)
    return notebook


def _refuse_another(notebook: NotebookNode, path: Path, lesson: Lesson, mend: str) -> None:
    course = notebook.metadata.get("course", {})
    theirs = str(course.get("lesson", "")) if isinstance(course, dict) else ""
    if theirs and theirs != lesson.stem:
        raise CourseError(f"{path} is the notebook of {theirs}, not of {lesson.stem}. It was left as it is; {mend}")
    if not theirs:
        known = {cell.name for cell in lesson.exercises}
        marks = [cell.metadata.get("nbgrader", {}) for cell in notebook.cells]
        names = {str(mark.get("grade_id")) for mark in marks if isinstance(mark, dict)}
        if not known & (names | {str(cell.get("id")) for cell in notebook.cells}):
            raise CourseError(f"{path} holds no exercise of {lesson.stem}. It was left as it is; {mend}")
