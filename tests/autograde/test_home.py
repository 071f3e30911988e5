"""The start page and the README's table."""

import re
from pathlib import Path

import pytest

from autograde import home
from autograde.course import Course
from autograde.errors import CourseError

LESSON = """# %% [markdown]
# # 2.1 LoRA
#
# **You will measure.** exact match from {{before}}
# to {{after}}.
#
# More.

# %% exercise="one" difficulty=1 minutes=7
### BEGIN SOLUTION
x = 1
### END SOLUTION

# %% check="one" points=3
assert x == 1, "one"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Course:
    source = tmp_path / "solutions" / "2_peft" / "2_1_lora.py"
    source.parent.mkdir(parents=True)
    source.write_text(LESSON)
    (tmp_path / "solutions" / "start_here.py").write_text("# %% [markdown]\n# # Start\n#\n# {{path:map}}\n")
    (tmp_path / "results").mkdir()
    numbers = ", ".join(
        f'"{name}": {{"value": {value}, "format": ".0%"}}' for name, value in [("before", 0), ("after", 1)]
    )
    (tmp_path / "results" / "2_1_lora.json").write_text(f'{{"results": {{{numbers}}}}}')
    return Course(tmp_path)


def test_table_shows_measured_numbers(tree: Course) -> None:
    row = "| [2.1 LoRA](notebooks/2_peft/2_1_lora.ipynb) | 1 in 7 min | 3 | exact match from 0% to 100%. |"
    assert row in home.table(home.entries(tree), "notebooks/")
    assert "**2. Finetuning with PEFT**" in home.table(home.entries(tree), "")


def test_start_page_links_into_its_own_folder(tree: Course) -> None:
    (cell,) = home.start_page(tree).cells
    assert "[2.1 LoRA](2_peft/2_1_lora.ipynb)" in cell.source


def test_readme_changes_only_between_its_markers(tree: Course) -> None:
    text = f"# Title\n\n{home._BEGIN}\nold\n{home._END}\n\nrest\n"
    made = home.readme(text, tree)
    assert made.startswith("# Title\n\n")
    assert made.endswith("\n\nrest\n")
    assert "old" not in made
    assert "2.1 LoRA" in made
    assert home.readme(made, tree) == made


@pytest.mark.parametrize("text", ["no markers", "{end}{begin}", "{begin}{end}{begin}"])
def test_readme_without_its_markers_is_refused(tree: Course, text: str) -> None:
    with pytest.raises(CourseError, match=re.escape(home._BEGIN)):
        home.readme(text.format(begin=home._BEGIN, end=home._END), tree)


def test_an_unmeasured_headline_says_what_to_run(tree: Course) -> None:
    (tree.results / "2_1_lora.json").unlink()
    with pytest.raises(CourseError, match=r"\{\{before\}\}, \{\{after\}\} was not measured: `course run 2.1 --save`"):
        home.entries(tree)
