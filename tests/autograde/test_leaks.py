"""Planted leaks of each kind are found; what learners are shown on purpose is none."""

import copy
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from autograde import build, lesson
from autograde.course import Course
from autograde.leaks import leaks, leaks_in
from autograde.lesson import Lesson
from tests.autograde.sources import course_of

LESSON = '''# %% [markdown]
# # 1.1 Spread
#
# The variance divides the squared deviations by n - 1.

# %%
def mean(values: list[float]) -> float:
    return sum(values) / len(values)

# %% exercise="variance" difficulty=2 minutes=5
def variance(values: list[float]) -> float:
    """Return the unbiased variance."""
    ### BEGIN SOLUTION
    centre = mean(values)
    squares = [(value - centre) ** 2 for value in values]
    return sum(squares) / (len(values) - 1)  # Bessel's correction
    ### END SOLUTION

# %% check="variance" points=1
assert variance([1.0, 3.0]) == 2.0, "Divide by n - 1"
### BEGIN HIDDEN TESTS
hidden_case = [0.5, 0.5, 8.0]
assert abs(variance(hidden_case) - 18.75) < 1e-9, "Use the mean of the values"
### END HIDDEN TESTS

# %% mistake="divides by the wrong count" of="variance" says="Divide by n - 1"
def variance(values):
    return sum((value - mean(values)) ** 2 for value in values) / len(values)

# %% alternative="by the mean of squares" of="variance"
def variance(values):
    n = len(values)
    return (sum(value * value for value in values) - n * mean(values) ** 2) / (n - 1)

# %% [markdown]
# The end.
'''
PATH = Path("1_1_spread.ipynb")


@pytest.fixture(scope="module")
def parsed() -> Lesson:
    return lesson.parse(LESSON, Path("solutions/1_demo/1_1_spread.py"))


def _released(parsed: Lesson) -> NotebookNode:
    return build.release(build.source_notebook(parsed))


def _add(kind: str, source: str) -> Callable[[NotebookNode], None]:
    def plant(notebook: NotebookNode) -> None:
        make = nbformat.v4.new_code_cell if kind == "code" else nbformat.v4.new_markdown_cell
        notebook.cells.append(make(source))

    return plant


def _in_output(notebook: NotebookNode) -> None:
    text = "<pre>squares = [(value - centre) ** 2\nfor value in values]</pre>"
    notebook.cells[1].outputs = [nbformat.v4.new_output("display_data", data={"text/html": text})]


def _in_plain_output(notebook: NotebookNode) -> None:
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="harmless")]


def _in_cell_metadata(notebook: NotebookNode) -> None:
    notebook.cells[2].metadata["backup"] = {"old": ["centre = mean(values)"]}


def _in_metadata_key(notebook: NotebookNode) -> None:
    notebook.metadata["return sum(squares) / (len(values) - 1)  # Bessel's correction"] = 1


def _in_attachment(notebook: NotebookNode) -> None:
    notebook.cells[0].attachments = {"a.txt": {"text/plain": "hidden_case = [0.5, 0.5, 8.0]"}}


RENAMED = "def spread(xs):\n    m = mean(xs)\n    return sum([(x - m) ** 2 for x in xs])"
REWRAPPED = "squares = [\n    (value - centre) ** 2\n    for value in values\n]"
OTHER = "(sum(q * q for q in qs) - k * mean(qs) ** 2) / (k - 1)"
# what is planted, and what the report must say
PLANTED = {
    "a solution's line in prose": (_add("markdown", "Write `centre  = mean(values)`."), 'the solution of "variance"'),
    "a rewrapped line": (_add("code", REWRAPPED), "'squares = [(value - centre) ** 2 for value in values]'"),
    "renamed code": (_add("code", RENAMED), "the code '[(value - centre) ** 2 for value in values]'"),
    "code in a fence": (_add("markdown", f"```python\n{RENAMED}\n```"), 'of the solution of "variance"'),
    "code beside a magic": (_add("code", f"%matplotlib inline\n{RENAMED}"), 'of the solution of "variance"'),
    "another right answer": (_add("code", f"v = {OTHER}"), 'of the alternative "by the mean of squares" of "variance"'),
    "a hidden test": (_add("code", "hidden_case = [0.5, 0.5, 8.0]"), 'the hidden tests of "variance"'),
    "a mistake's name": (
        _add("markdown", "Divides by the wrong count".lower()),
        'the mistake "divides by the wrong count"',
    ),
    "an output": (_in_output, "cell 2 (outputs)"),
    "any output": (_in_plain_output, "cell 2 was run: a built notebook has no outputs"),
    "a cell's metadata": (_in_cell_metadata, "cell 3 (metadata)"),
    "a metadata key": (_in_metadata_key, "the notebook's metadata"),
    "an attachment": (_in_attachment, "cell 1 (attachments)"),
}


def test_a_release_has_no_leak(parsed: Lesson) -> None:
    assert leaks_in(parsed, _released(parsed), PATH) == []


def test_the_source_notebook_is_full_of_them(parsed: Lesson) -> None:
    found = leaks_in(parsed, build.source_notebook(parsed), PATH)
    assert {problem.line for problem in found} == {cell.line for cell in parsed.of_kind("exercise", "check")}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_leak_is_found(parsed: Lesson, kind: str) -> None:
    plant, message = PLANTED[kind]
    notebook = copy.deepcopy(_released(parsed))
    plant(notebook)
    found = leaks_in(parsed, notebook, PATH)
    assert found
    assert any(message in problem.message for problem in found), found


def test_what_was_shown_before_the_exercise_is_no_secret() -> None:
    shown = "# %%\nsquares = [(value - centre) ** 2 for value in values]\n\n"
    for text, leaking in (
        (LESSON.replace("# %% exercise", f"{shown}# %% exercise"), False),
        (f"{LESSON}\n{shown.replace('squares', 'again')}", True),
    ):
        parsed = lesson.parse(text, Path("solutions/1_demo/1_1_spread.py"))
        assert bool(leaks_in(parsed, _released(parsed), PATH)) == leaking


@pytest.mark.parametrize("name", ["1_demo/answers.py", "1_demo/1_1_spread-solution.ipynb", "notes.txt", ".hidden"])
def test_a_neighbouring_file_is_reported(tmp_path: Path, name: str) -> None:
    course = _built(tmp_path)
    assert leaks(course) == []
    (course.notebooks / name).write_text("{}")
    (problem,) = leaks(course)
    assert problem.path == course.notebooks / name


def test_checkpoints_are_no_part_of_what_is_shipped(tmp_path: Path) -> None:
    course = _built(tmp_path)
    (course.notebooks / "1_demo" / ".ipynb_checkpoints").mkdir()
    (course.notebooks / "1_demo" / ".ipynb_checkpoints" / "1_1_spread-checkpoint.ipynb").touch()
    assert leaks(course) == []


def _built(root: Path) -> Course:
    course = course_of(root, _1_1_spread=LESSON)
    (source,) = course.sources()
    build.write(_released(lesson.load(source)), course.notebook(source))
    return course


def test_nothing_leaks_into_the_notebooks_of_the_path(course: Course) -> None:
    assert [str(problem) for problem in leaks(course)] == []
