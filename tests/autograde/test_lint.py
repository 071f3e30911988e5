"""Each rule of the lint finds its fault, at its line, and a complete lesson has none."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from autograde import lesson
from autograde.commands.lint import lint as lint_command
from autograde.course import Course
from autograde.lint import lint
from tests.autograde.sources import course_of, line_of

MISTAKES = "\n\n".join(
    f'# %% mistake="adds {extra}" of="total" says="Add every number"\ndef total(numbers):\n    return {extra}'
    for extra in (1, 2, 3)
)
COMPLETE = f"""# %% [markdown]
# # 1.1 Sums
#
# You will be able to add numbers.
#
# **You will measure.** A sum of {{{{sum}}}}.
#
# **You need.** Nothing.
#
# **Time.** About 20 minutes; the solution runs in {{{{run:seconds}}}} s.

# %% [markdown]
# ## Why it matters at work
#
# It does.

# %% tags=["parameters"]
steps = 160  # quick: 3
seed = 0

# %% [markdown]
# ## Adding
#
# Return the sum.
#
# <details><summary>Hint 1</summary>Think.</details>
#
# <details><summary>Hint 2</summary>Which call?</details>

# %% [markdown]
# <details><summary>Hint 3</summary>Call sum.</details>

# %% exercise="total" difficulty=1 minutes=5
def total(numbers):
    ### BEGIN SOLUTION
    return sum(numbers)
    ### END SOLUTION

# %% check="total" points=1
assert total([1]) == 1, "Add every number"
### BEGIN HIDDEN TESTS
assert total([]) == 0, "The sum of nothing is 0"
### END HIDDEN TESTS

# %% check="total" points=1
try:
    total(None)
except TypeError:
    pass
else:
    raise AssertionError("Refuse what has no numbers")
print("done")

{MISTAKES}

# %% alternative="a loop" of="total"
def total(numbers):
    return sum(number + 0 * number for number in numbers)

# %% [markdown]
# ## With a real model
#
# Run it.

# %% [markdown]
# ## Result card

# %%
print("card")

# %% [markdown]
# ## Say it in an interview
#
# <details><summary>One?</summary>Yes.</details>
#
# <details><summary>Two?</summary>Yes.</details>

# %% [markdown]
# <details><summary>Three?</summary>Yes.</details>

# %% [markdown]
# ## Read next
#
# - A. Author, "A title", 2020.
"""
GIVEN_AWAY = "\n# %%\nprint(sum(value + 0 * value for value in values))\n"


def _problems(text: str) -> list[tuple[int, str]]:
    parsed = lesson.parse(text, Path("solutions/1_demo/1_1_sums.py"))
    return [(problem.line, problem.message) for problem in lint(parsed)]


def test_a_complete_lesson_has_no_problem() -> None:
    assert _problems(COMPLETE) == []


# what is replaced, by what, the cell at whose line it is reported, the message
FAULTS = {
    "number in the title": ("# # 1.1 Sums", "# # 1.2 Sums", None, "starts with the title '# 1.1 …'"),
    "aim": (
        "# You will be able to add numbers.\n#\n",
        "",
        "# # 1.1",
        "one sentence that says what the learner will be",
    ),
    "measured number": (
        "A sum of {{sum}}.",
        "A sum of 3.",
        "# # 1.1",
        "'**You will measure.** …' with the measured number",
    ),
    "needs": ("# **You need.** Nothing.\n#\n", "", "# # 1.1", "'**You need.** …'"),
    "run time": ("{{run:seconds}}", "9", "# # 1.1", "'**Time.** …' with 'N minutes' and the run time"),
    "minutes": ("20 minutes", "a while", "# # 1.1", "'**Time.** …' with 'N minutes' and the run time"),
    "a section": ("# ## With a real model", "# ## With a toy", None, "the section '## With a real model' is missing"),
    "its level": ("# ## Result card", "# ### Result card", None, "the section '## Result card' is missing"),
    "parameters": (' tags=["parameters"]', "", None, 'one cell with tags=["parameters"]; this one has 0'),
    "a hint": ("Hint 3", "Hint three", "exercise=", "no '<details><summary>Hint 3</summary>"),
    "an empty hint": (">Call sum.<", "> <", "exercise=", "no '<details><summary>Hint 3</summary>"),
    "difficulty": ("difficulty=1", "difficulty=6", "exercise=", "difficulty is 1 to 5, not 6"),
    "mistakes": (MISTAKES, MISTAKES.split("\n\n")[0], "exercise=", "1 mistake cells, at least 3 are needed"),
    "alternatives": (
        'alternative="a loop"',
        'mistake="a loop" says="x"',
        "exercise=",
        "0 alternative cells, at least 1",
    ),
    "a message": (', "Add every number"\n###', "\n###", "assert total([1])", "an assert without a message"),
    "a hidden message": (', "The sum of nothing is 0"', "", "assert total([])", "an assert without a message"),
    "an expression": ('print("done")', "total([1])[0]", "total([1])[0]", "ends in an expression"),
    "plain Python": ('print("done")', "%time 1", "%time 1", "is no plain Python"),
    "an assertion": ('    raise AssertionError("Refuse what has no numbers")', "    pass", None, "asserts nothing"),
    "a question": (
        "# <details><summary>Three?</summary>Yes.</details>",
        "# More.",
        "Say it",
        "2 questions with folded",
    ),
    "a source": ('# - A. Author, "A title", 2020.', "# Much.", "Read next", "lists the primary sources"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_reported_once_at_its_line(name: str) -> None:
    old, new, where, message = FAULTS[name]
    assert COMPLETE.count(old) == 1
    text = COMPLETE.replace(old, new)
    ((line, found),) = _problems(text)
    assert message in found
    if where is not None:
        lines = text.splitlines()
        assert line in (line_of(text, where), line_of(text, where) - 1), lines[line - 1]


def test_code_between_statement_and_exercise_hides_the_hints() -> None:
    text = COMPLETE.replace('# %% exercise="total"', '# %%\nbetween = 1\n\n# %% exercise="total"')
    ((_, message),) = _problems(text)
    assert "Hint 1" in message


def test_the_order_of_the_sections_counts() -> None:
    swapped = COMPLETE.replace("## With a real model", "## X").replace("## Result card", "## With a real model")
    ((_, message),) = _problems(swapped.replace("## X", "## Result card"))
    assert "the sections stand in another order" in message


def test_an_empty_lesson_is_no_lesson() -> None:
    messages = [message for _, message in _problems("")]
    assert any("first cell" in message for message in messages)
    assert "the lesson has no exercise" in messages


def test_the_command_lists_problems_of_every_lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbuildable = '# %% check="one" points=1\nassert one, "One"\n'
    course_of(tmp_path, _1_1_sums=COMPLETE, _1_2_more=COMPLETE + GIVEN_AWAY, _1_3_bad=unbuildable)
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(lint_command)
    assert CliRunner().invoke(app, ["1.1"]).exit_code == 0
    found = CliRunner().invoke(app, [])
    assert found.exit_code == 1
    assert "1_2_more.py:1: the first cell" in found.stderr
    assert "the code 'sum((number + 0 * number for number in numbers))' of the alternative" in found.stderr
    assert '1_3_bad.py:1: check="one" has no exercise' in found.stderr


def test_the_lessons_of_the_path_have_no_problem(course: Course) -> None:
    problems = [str(problem) for source in course.sources() for problem in lint(lesson.load(source))]
    assert problems == []
