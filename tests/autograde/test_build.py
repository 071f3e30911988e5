"""Sources → notebooks, against mirror files.

`mirror/NAME.py` must build exactly `mirror/NAME.ipynb` (the learner's) and `mirror/NAME.source.ipynb` (nbgrader's, with
answers); `mirror/errors/NAME.py` must be refused with the text of `NAME.txt`.

After a wanted change, look at what this writes before committing it:  python -m tests.autograde.test_build
"""

from pathlib import Path

import nbformat
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from nbformat import NotebookNode

from autograde import build, lesson, results
from autograde.errors import LearnerWorkError, LessonError
from tests.autograde.sources import CHECK, EXERCISE

MIRROR = Path(__file__).parent / "mirror"
SOURCES = sorted(MIRROR.glob("*.py"))
ERRORS = sorted((MIRROR / "errors").glob("*.py"))
PARSED = lesson.parse(EXERCISE + CHECK, Path("solutions/1_demo/1_1_sums.py"))


def _built(source: Path) -> dict[str, str]:
    """The texts that the source's mirror files must have, by suffix."""
    parsed = lesson.load(source)
    measured = results.read(source.with_suffix(".json"))
    answers = build.source_notebook(parsed, measured)
    return {".source.ipynb": build.to_text(answers), ".ipynb": build.to_text(build.learner_notebook(parsed, measured))}


def _refusal(source: Path) -> str:
    with pytest.raises(LessonError) as refused:
        build.learner_notebook(lesson.load(source), results.LessonResults())
    return "".join(f"{source.name}:{problem.line}: {problem.message}\n" for problem in refused.value.problems)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_source_builds_its_mirror_files(source: Path) -> None:
    for suffix, text in _built(source).items():
        assert text == source.with_suffix(suffix).read_text(encoding="utf-8")


@pytest.mark.parametrize("source", ERRORS, ids=lambda path: path.stem)
def test_a_faulty_source_is_refused_with_file_and_line(source: Path) -> None:
    assert _refusal(source) == source.with_suffix(".txt").read_text(encoding="utf-8")


def test_every_mirror_file_has_its_source() -> None:
    made = {path.with_suffix(suffix) for path in SOURCES for suffix in (".ipynb", ".source.ipynb")}
    assert set(MIRROR.glob("*.ipynb")) == made
    assert set((MIRROR / "errors").glob("*.txt")) == {path.with_suffix(".txt") for path in ERRORS}


def test_what_is_built_is_a_valid_notebook_with_unique_ids() -> None:
    for path in MIRROR.glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        ids = [cell.id for cell in notebook.cells]
        assert len(set(ids)) == len(ids)


def test_an_inserted_cell_changes_no_other_cells_id() -> None:
    more = lesson.parse("# %%\nnew = 1\n\n" + EXERCISE + CHECK, PARSED.path)
    before, after = (build.source_notebook(parsed).cells for parsed in (PARSED, more))
    assert [cell.id for cell in after][1:] == [cell.id for cell in before]


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20)


@st.composite
def lessons(draw: st.DrawFn) -> str:
    """Sources with prose, demos and exercises of any wording."""
    parts = ["# %% [markdown]\n# # Title\n"]
    for place in range(draw(st.integers(0, 3))):
        kind = draw(st.sampled_from(["prose", "demo", "exercise"]))
        text = repr(draw(WORDS))
        if kind == "prose":
            parts.append(f"# %% [markdown]\n# {text}\n")
        elif kind == "demo":
            parts.append(f"# %%\n{text}\n")
        else:
            region = f"### BEGIN SOLUTION\nx = {text}\n### END SOLUTION"
            parts.append(f'# %% exercise="e{place}" difficulty=1 minutes=5\n{region}\n')
            parts.append(f'# %% check="e{place}" points=1\nassert x, {text}\n')
    return "\n".join(parts)


@settings(max_examples=25, deadline=None)
@given(text=lessons())
def test_building_twice_gives_equal_bytes_and_no_answers(text: str) -> None:
    path = Path("solutions/1_demo/1_1_any.py")
    first, again = (build.learner_notebook(lesson.parse(text, path), results.LessonResults()) for _ in range(2))
    assert build.to_text(first) == build.to_text(again)
    assert build.to_text(nbformat.reads(build.to_text(first), as_version=4)) == build.to_text(first)
    assert not build.holds_work(first)
    assert not any("SOLUTION" in cell.source for cell in first.cells)


def _edited(draw: st.DrawFn, notebook: NotebookNode) -> NotebookNode:
    cells = notebook.cells
    place = draw(st.integers(0, len(cells) - 1))
    how = draw(st.sampled_from(["write", "insert", "delete", "retype", "repeat"]))
    if how == "write":
        cells[place].source = draw(WORDS)
    elif how == "insert":
        cells.insert(place, nbformat.v4.new_code_cell(draw(WORDS)))
    elif how == "delete":
        del cells[place]
    elif how == "repeat":
        cells.insert(place, nbformat.v4.new_code_cell(cells[place].source))
    else:
        cells[place] = nbformat.v4.new_markdown_cell(cells[place].source)
    return notebook


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_learners_work_is_never_overwritten(tmp_path: Path, data: st.DataObject) -> None:
    released = build.learner_notebook(PARSED, results.LessonResults())
    worked = data.draw(st.composite(_edited)(nbformat.from_dict(released)))
    assume([(c.cell_type, c.source) for c in worked.cells] != [(c.cell_type, c.source) for c in released.cells])
    path = tmp_path / "lesson.ipynb"
    path.write_text(nbformat.writes(worked), encoding="utf-8")
    kept = path.read_bytes()
    with pytest.raises(LearnerWorkError, match="holds a learner's work and was left as it is"):
        build.write(released, path)
    assert path.read_bytes() == kept


@pytest.mark.parametrize("text", ["", "{", "{}", '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_left_to_its_owner(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lesson.ipynb"
    path.write_text(text)
    with pytest.raises(LearnerWorkError):
        build.write(build.learner_notebook(PARSED, results.LessonResults()), path)
    assert path.read_text() == text


def test_a_notebook_that_was_only_run_is_built_anew(tmp_path: Path) -> None:
    path = tmp_path / "module" / "lesson.ipynb"
    released = build.learner_notebook(PARSED, results.LessonResults())
    assert build.write(released, path)
    assert not build.write(released, path)
    run = nbformat.read(path, as_version=4)
    run.cells[0].outputs = [nbformat.v4.new_output("stream", text="ran")]
    run.cells[0].execution_count = 1
    path.write_text(nbformat.writes(run), encoding="utf-8")
    assert build.write(released, path)
    assert path.read_text() == build.to_text(released)
    assert [file.name for file in path.parent.iterdir()] == ["lesson.ipynb"]


if __name__ == "__main__":
    for one in SOURCES:
        for suffix, text in _built(one).items():
            one.with_suffix(suffix).write_text(text, encoding="utf-8")
    for one in ERRORS:
        one.with_suffix(".txt").write_text(_refusal(one), encoding="utf-8")
