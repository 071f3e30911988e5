"""A submitted notebook is put back into a shape that can be graded, and nothing a learner wrote is lost."""

import random
from pathlib import Path

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbformat import NotebookNode

from autograde.grades import Repair
from autograde.heal import heal, kind
from autograde.lesson import Lesson
from tests.autograde import grading

ORDER = ["double", "check-double", "check-double-2", "half", "check-half"]


@pytest.fixture
def lesson(tmp_path: Path) -> Lesson:
    return grading.small(tmp_path)


def graded_ids(notebook: NotebookNode) -> list[str]:
    return [cell.metadata.nbgrader.grade_id for cell in notebook.cells if cell.metadata.get("nbgrader")]


def position(notebook: NotebookNode, grade_id: str) -> int:
    return notebook.cells.index(grading.cell_of(notebook, grade_id))


def assert_whole(healed: NotebookNode, original: NotebookNode) -> None:
    """Every released code cell stands once, in order, as code, with its metadata; checks with their text."""
    assert graded_ids(healed) == ORDER
    for cell in original.cells:
        if kind(cell) in ("exercise", "check"):
            there = grading.cell_of(healed, cell.metadata.nbgrader.grade_id)
            assert there.cell_type == "code"
            assert there.metadata == cell.metadata
            if kind(cell) == "check":
                assert there.source == cell.source
    nbformat.validate(healed)
    assert len({cell.id for cell in healed.cells}) == len(healed.cells)


def test_a_sound_notebook_comes_back_as_it_was(lesson: Lesson) -> None:
    notebook = grading.answered(lesson)
    healed, repairs = heal(notebook, grading.released(lesson))
    assert repairs == ()
    assert [cell.source for cell in healed.cells] == [cell.source for cell in notebook.cells]


def test_the_arguments_are_not_changed(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    notebook.cells.reverse()
    before = nbformat.writes(notebook), nbformat.writes(original)
    heal(notebook, original)
    assert (nbformat.writes(notebook), nbformat.writes(original)) == before


@pytest.mark.parametrize("gone", ORDER)
def test_a_deleted_cell_is_put_back_in_its_place(lesson: Lesson, gone: str) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    notebook.cells.remove(grading.cell_of(notebook, gone))
    healed, repairs = heal(notebook, original)
    assert_whole(healed, original)
    assert [repair.cell for repair in repairs] == [gone]
    assert "deleted" in repairs[0].message
    assert position(healed, gone) == position(original, gone)


def test_all_deleted(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    notebook.cells = []
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    assert [c.source for c in healed.cells] == [c.source for c in original.cells if c.cell_type == "code"]


def test_an_answer_written_instead_of_a_deleted_exercise_is_what_the_check_sees(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    at = position(notebook, "double")
    notebook.cells[at] = grading.plain(grading.DOUBLE)
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    mine = next(i for i, cell in enumerate(healed.cells) if cell.source == grading.DOUBLE)
    assert position(healed, "double") < mine < position(healed, "check-double")


def test_a_deleted_check_comes_back_after_what_was_written_instead_of_its_exercise(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    at = position(notebook, "double")
    notebook.cells[at : at + 3] = [grading.plain(grading.DOUBLE)]  # the exercise and both its checks are gone
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    mine = next(i for i, cell in enumerate(healed.cells) if cell.source == grading.DOUBLE)
    assert position(healed, "double") < mine < position(healed, "check-double") < position(healed, "check-double-2")


def test_the_deleted_imports_are_put_back(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    imports = notebook.cells.pop(1)
    assert imports.source.startswith("import math")
    healed, repairs = heal(notebook, original)
    assert healed.cells[1].source == imports.source
    assert repairs == (Repair("", "the lesson's code cell that starts `import math` was deleted; it was put back"),)


@pytest.mark.parametrize("name", ORDER)
@pytest.mark.parametrize("wrong", ["markdown", "raw"])
def test_a_retyped_cell_is_code_again_with_the_learners_words(lesson: Lesson, name: str, wrong: str) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    cell = grading.cell_of(notebook, name)
    words = cell.source
    cell.cell_type = wrong
    del cell["outputs"], cell["execution_count"]
    healed, repairs = heal(notebook, original)
    assert_whole(healed, original)
    assert grading.cell_of(healed, name).source == words
    assert [repair.cell for repair in repairs] == [name]
    assert f"was a {wrong} cell" in repairs[0].message


@pytest.mark.parametrize("name", ORDER)
def test_a_duplicate_is_graded_once_and_the_copy_still_runs(lesson: Lesson, name: str) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    at = position(notebook, name)
    notebook.cells.insert(at, nbformat.from_dict(notebook.cells[at]))  # the same id too
    healed, repairs = heal(notebook, original)
    assert_whole(healed, original)
    assert len(healed.cells) == len(notebook.cells)
    assert [repair.cell for repair in repairs] == [name]
    assert "2 times" in repairs[0].message


def test_a_split_answer_keeps_both_halves_in_order(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    at = position(notebook, "half")
    second = nbformat.from_dict(notebook.cells[at])
    notebook.cells[at].source, second.source = "factor = 0.5", "def half(x):\n    return factor * x"
    notebook.cells.insert(at + 1, second)
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    sources = [cell.source for cell in healed.cells]
    assert sources.index("factor = 0.5") < sources.index(second.source) < position(healed, "check-half")


def test_a_check_moved_before_its_exercise_goes_back(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    check = notebook.cells.pop(position(notebook, "check-half"))
    notebook.cells.insert(0, check)
    healed, repairs = heal(notebook, original)
    assert_whole(healed, original)
    assert [repair.cell for repair in repairs] == ["check-half"]
    assert "moved" in repairs[0].message


def test_an_exercise_moved_to_the_end_keeps_its_place_or_its_check_follows(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    notebook.cells.append(notebook.cells.pop(position(notebook, "double")))
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    assert grading.cell_of(healed, "double").source == grading.DOUBLE


def test_an_edited_check_gets_its_text_back(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    grading.cell_of(notebook, "check-half").source = "pass"
    healed, repairs = heal(notebook, original)
    assert_whole(healed, original)
    assert "changed" in repairs[0].message


def test_marks_that_an_editor_threw_away_come_back(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    assert grading.cell_of(healed, "half").source == grading.HALF


def test_stray_marks_on_other_cells_are_taken_off(lesson: Lesson) -> None:
    notebook, original = grading.answered(lesson), grading.released(lesson)
    stray = grading.plain("1 + 1")
    stray.metadata.nbgrader = {"grade": True, "grade_id": "invented", "points": 100, "solution": False}
    notebook.cells.insert(2, stray)
    notebook.cells[1].metadata.nbgrader = ["nonsense"]
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[NotebookNode, NotebookNode]:
    parsed = grading.small(tmp_path_factory.mktemp("lesson"))
    return grading.answered(parsed), grading.released(parsed)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_whatever_was_done_to_the_cells_the_notebook_is_whole(
    pair: tuple[NotebookNode, NotebookNode], seed: int
) -> None:
    notebook, original = nbformat.from_dict(pair[0]), pair[1]
    chance = random.Random(seed)
    for _ in range(chance.randint(1, 8)):
        if not notebook.cells:
            break
        at = chance.randrange(len(notebook.cells))
        cell = notebook.cells[at]
        action = chance.choice(["delete", "copy", "move", "markdown", "add", "strip"])
        if action == "delete":
            del notebook.cells[at]
        elif action == "copy":
            notebook.cells.insert(chance.randint(0, len(notebook.cells)), nbformat.from_dict(cell))
        elif action == "move":
            notebook.cells.insert(chance.randint(0, len(notebook.cells) - 1), notebook.cells.pop(at))
        elif action == "markdown" and cell.cell_type == "code":
            cell.cell_type = "markdown"
            del cell["outputs"], cell["execution_count"]
        elif action == "add":
            notebook.cells.insert(at, grading.plain(f"note = {seed}"))
        elif action == "strip":
            cell.metadata.pop("nbgrader", None)
    healed, _ = heal(notebook, original)
    assert_whole(healed, original)
    again, repairs = heal(healed, original)
    assert repairs == ()
    assert [cell.source for cell in again.cells] == [cell.source for cell in healed.cells]
