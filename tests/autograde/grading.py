"""A small lesson, and learners' notebooks of it, for the tests of grading."""

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from autograde import build, lesson
from autograde.execute import GradeLimits
from autograde.lesson import Lesson

STEM = "1_1_small_sums"
SOURCE = '''# %% [markdown]
# # 1.1 Small sums

# %%
import math
import sys

# %% [markdown]
# ## Doubling
#
# **Exercise.** Return twice `x`.
#
# <details><summary>Hint 1</summary>What is `x + x`?</details>
#
# <details><summary>Hint 2</summary>Multiply by <b>2</b> &amp; return it.</details>

# %% exercise="double" difficulty=1 minutes=5
def double(x: float) -> float:
    """Return twice x."""
    ### BEGIN SOLUTION
    return 2 * x
    ### END SOLUTION

# %% check="double" points=1
assert double(3) == 6, "Twice three is six: add the number to itself"
### BEGIN HIDDEN TESTS
secret_number = 7.25
assert double(secret_number) == 14.5, "Your double works for whole numbers only"
### END HIDDEN TESTS

# %% check="double" points=2
assert double(-3) == -6, "Keep the sign"

# %% [markdown]
# ## Halving

# %%
print("a demo", double(1))

# %% [markdown]
# **Exercise.** Return half of `x`.

# %% exercise="half" difficulty=1 minutes=5
def half(x: float) -> float:
    """Return half of x."""
    ### BEGIN SOLUTION
    return x / 2
    ### END SOLUTION

# %% check="half" points=3
assert half(3) == 1.5, "Half of three is one and a half: divide with /"
'''
DOUBLE = "def double(x):\n    return 2 * x"
HALF = "def half(x):\n    return x / 2"
SHORT = GradeLimits(cell_seconds=2.0, run_seconds=120.0, mebibytes=1024.0, grace_seconds=2.0)


def small(folder: Path, source: str = SOURCE, stem: str = STEM) -> Lesson:
    """The small lesson, as a file in `folder/1_sums/`."""
    path = folder / "1_sums" / f"{stem}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    return lesson.load(path)


def released(parsed: Lesson) -> NotebookNode:
    """What the learner gets."""
    return build.release(build.source_notebook(parsed))


def cell_of(notebook: NotebookNode, grade_id: str) -> NotebookNode:
    """The cell with an nbgrader grade id."""
    (found,) = [cell for cell in notebook.cells if cell.metadata.get("nbgrader", {}).get("grade_id") == grade_id]
    return found


def answered(parsed: Lesson, **answers: str) -> NotebookNode:
    """A learner's notebook with both exercises answered, rightly unless `answers` says otherwise."""
    notebook = released(parsed)
    for name, source in {"double": DOUBLE, "half": HALF, **answers}.items():
        cell_of(notebook, name).source = source
    return notebook


def plain(source: str) -> NotebookNode:
    """A code cell that a learner added."""
    return nbformat.v4.new_code_cell(source)
