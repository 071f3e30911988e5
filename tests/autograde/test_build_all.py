"""The whole tree: what `course build` writes, compares, refuses and removes."""

from pathlib import Path

import nbformat
import pytest
import typer
from typer.testing import CliRunner

from autograde.commands.build import build as build_command
from autograde.course import Course
from autograde.publish import build_all
from tests.autograde.sources import CHECK, EXERCISE, course_of

LESSON = f"# %% [markdown]\n# # 1.1 Sums\n#\n# **You will measure.** A sum.\n\n{EXERCISE}\n{CHECK}"
README = "# Path\n\n<!-- path:begin (made by `course build`) -->\n<!-- path:end -->\n\nEnd.\n"


@pytest.fixture
def built(tmp_path: Path) -> Course:
    course = course_of(tmp_path, _1_1_sums=LESSON, _1_2_more=LESSON.replace("1.1", "1.2"))
    (course.solutions / "start_here.py").write_text("# %% [markdown]\n# # Start\n#\n# {{path:map}}\n")
    (course.root / "README.md").write_text(README)
    assert build_all(course).refused == ()
    return course


def _bytes(course: Course) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(course.root.rglob("*")) if path.is_file()}


def _work(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell("mine = 1"))
    path.write_text(nbformat.writes(notebook), encoding="utf-8")


def test_a_build_makes_every_page_once(built: Course) -> None:
    notebooks = [built.notebook(source) for source in built.sources()] + [built.notebooks / "start_here.ipynb"]
    assert all(path.exists() for path in notebooks)
    assert "1_demo/1_2_more.ipynb" in (built.notebooks / "start_here.ipynb").read_text()
    assert "notebooks/1_demo/1_1_sums.ipynb" in (built.root / "README.md").read_text()
    before = _bytes(built)
    report = build_all(built)
    assert (report.changed, report.unchanged, report.refused) == ((), 4, ())
    assert _bytes(built) == before


def test_checking_writes_nothing_and_names_what_is_out_of_date(built: Course) -> None:
    assert build_all(built, check=True).changed == ()
    source, gone = built.sources()
    source.write_text(source.read_text().replace("Add every number", "Add them all"))
    gone.unlink()
    before = _bytes(built)
    report = build_all(built, check=True)
    # The start page and the README list the lesson that is gone.
    start, readme = built.notebooks / "start_here.ipynb", built.root / "README.md"
    assert set(report.changed) == {built.notebook(source), built.notebook(gone), start, readme}
    assert _bytes(built) == before


def test_a_learners_work_is_refused_and_the_others_go_on(built: Course) -> None:
    for source in built.sources():
        source.write_text(source.read_text().replace("Add every number", "Add them all"))
    mine, other = (built.notebook(source) for source in built.sources())
    _work(mine)
    kept = mine.read_bytes()
    report = build_all(built)
    assert mine.read_bytes() == kept
    assert report.changed == (other,)
    (refusal,) = report.refused
    assert "1_1_sums.ipynb holds a learner's work" in refusal


def test_a_faulty_source_is_refused_and_the_others_go_on(built: Course) -> None:
    broken, other = built.sources()
    broken.write_text(broken.read_text().replace(CHECK, ""))
    other.write_text(other.read_text().replace("Add every number", "Add them all"))
    report = build_all(built)
    assert report.changed == (built.notebook(other),)
    (refusal,) = report.refused
    assert '1_1_sums.py:6: exercise="total" has no check' in refusal


def test_the_notebook_of_a_lesson_that_is_gone_is_removed(built: Course) -> None:
    gone = built.sources()[1]
    gone.unlink()
    assert built.notebook(gone) in build_all(built).changed
    assert not built.notebook(gone).exists()


def test_work_in_a_lesson_that_is_gone_is_kept(built: Course) -> None:
    gone = built.sources()[1]
    _work(built.notebook(gone))
    kept = built.notebook(gone).read_bytes()
    gone.unlink()
    report = build_all(built)
    assert built.notebook(gone).read_bytes() == kept
    assert any("has no lesson any more, but holds a learner's work" in refusal for refusal in report.refused)


@pytest.mark.parametrize("text", ["not JSON", nbformat.writes(nbformat.v4.new_notebook())])
def test_files_that_no_build_made_are_left_alone(built: Course, text: str) -> None:
    notes = built.notebooks / "1_demo" / "my_notes.ipynb"
    notes.write_text(text)
    report = build_all(built)
    assert (report.changed, report.refused) == ((), ())
    assert notes.read_text() == text


def test_the_command_says_what_it_did(built: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.root)
    app = typer.Typer()
    app.command()(build_command)
    source, gone = built.sources()
    gone.unlink()
    stale = CliRunner().invoke(app, ["--check"])
    assert stale.exit_code == 1
    assert "notebooks/1_demo/1_2_more.ipynb is not what `course build` makes of the sources" in stale.stdout
    made = CliRunner().invoke(app, [])
    assert made.exit_code == 0
    assert "removed notebooks/1_demo/1_2_more.ipynb" in made.stdout
    assert "wrote README.md" in made.stdout
    _work(built.notebook(source))
    source.write_text(source.read_text().replace("Add every number", "Add them all"))
    refused = CliRunner().invoke(app, [])
    assert refused.exit_code == 1
    assert "holds a learner's work" in refused.stderr
