"""The proof finds what it is for: weak checks, free points, unnamed mistakes, refused answers, broken solutions."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from autograde.commands.prove import prove
from autograde.limits import Limits
from autograde.prove import Answer, LessonProof, prove_lesson
from tests.autograde.sources import CHECK, EXERCISE, course_of, line_of, source_of

GOOD = f"""# %% [markdown]
# # 1.1 Sums

# %%
import os
import warnings

offset = [0]

{EXERCISE}
# %%
assert total([2, 2]) == 4, "a demo that a wrong answer breaks"
%time offset[0] += 1

{CHECK}
# %% check="total" points=1
assert offset == [1], "every answer starts from the same state"
assert total([5]) == 5, "One number is its own sum"

# %% mistake="takes the first" of="total" says="Add every number"
def total(numbers):
    return numbers[0]

# %% mistake="starts at one" of="total" says="Add every number"
def total(numbers):
    offset[0] = 1
    return sum(numbers, start=1)

# %% alternative="a loop" of="total"
def total(numbers):
    result = 0
    for number in numbers:
        result += number
    return result
"""

WEAK = f"""# %% [markdown]
# # 1.2 Weak

{EXERCISE}
{CHECK}
# %% mistake="unnoticed" of="total" says="Add every number"
def total(numbers):
    return float(sum(numbers))

# %% mistake="other words" of="total" says="Nobody says this"
def total(numbers):
    return 7

# %% mistake="crashes" of="total" says="Nobody says this either"
def total(numbers):
    return numbers + 1

# %% mistake="is no Python" of="total" says="nor this"
def total(numbers)
    return 7

# %% mistake="names an exception" of="total" says="list indices must be"
def total(numbers):
    return numbers["all"]

# %% mistake="hangs" of="total" says="Add every number"
def total(numbers):
    while True:
        pass

# %% mistake="leaves quietly" of="total" says="Add every number"
import os
def total(numbers):
    os._exit(0)

# %% mistake="is killed" of="total" says="Add every number"
import os
def total(numbers):
    os.kill(os.getpid(), 9)

# %% alternative="is refused" of="total"
def total(numbers):
    return sum(numbers, start="")

# %% exercise="given" difficulty=1 minutes=5
### BEGIN SOLUTION
given = 1
### END SOLUTION

# %% check="given" points=1
assert True, "passes on an empty notebook"

# %% check="given" points=4
assert given == 1, "does not"

# %%
raise RuntimeError("a demo fails")

# %% exercise="wrong" difficulty=1 minutes=5
### BEGIN SOLUTION
wrong = 1
### END SOLUTION

# %% check="wrong" points=1
assert wrong == 2, "the solution itself fails"

# %% check="wrong" points=1
import sys
print("a warning", file=sys.stderr)
assert wrong == 1, "or writes to stderr"

# %% check="wrong" points=1
assert wrong == 1, "or ends in a value"
wrong
"""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> LessonProof:
    course = course_of(tmp_path_factory.mktemp("good"), _1_1_sums=GOOD)
    return prove_lesson(source_of(course, "1.1"))


@pytest.fixture(scope="module")
def weak(tmp_path_factory: pytest.TempPathFactory) -> LessonProof:
    course = course_of(tmp_path_factory.mktemp("weak"), _1_2_weak=WEAK)
    return prove_lesson(source_of(course, "1.2"), answer_seconds=3, jobs=4)


def _answer(proof: LessonProof, name: str) -> Answer:
    (found,) = [answer for answer in proof.answers if answer.name == name]
    return found


def test_a_sound_lesson_is_proven(good: LessonProof) -> None:
    assert good.problems == ()
    summary = good.to_dict()
    expected = {"ok": True, "exercises": 1, "checks": 2, "points": 3, "solution_points": 3, "empty_points": 0}
    assert {key: summary[key] for key in expected} == expected
    assert summary["mistakes"] == {"total": 2, "ok": 2}
    assert summary["alternatives"] == {"total": 1, "ok": 1}


def test_the_json_is_data_alone(good: LessonProof) -> None:
    assert json.loads(json.dumps(good.to_dict()))["answers"][0]["checks"][0] == {
        "id": "check-total",
        "passed": True,
        "error": "",
        "message": "",
    }


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("unnoticed", "is not caught: every check passes"),
        (
            "other words",
            "is caught, but no message says 'Nobody says this': check-total: AssertionError: Add every number",
        ),
        ("crashes", "crashes, where a check must say 'Nobody says this either': check-total: TypeError: "),
        ("is no Python", "crashes, where a check must say 'nor this': the cell itself raises SyntaxError: "),
        ("hangs", "timed out instead of failing a check"),
        ("leaves quietly", "ended its process with exit code 0 instead of failing a check"),
        ("is killed", "was killed by SIGKILL instead of failing a check"),
        ("is refused", "is refused: check-total: TypeError: sum() can't sum strings"),
    ],
)
def test_an_unsound_answer_is_reported_at_its_line(weak: LessonProof, name: str, fault: str) -> None:
    assert _answer(weak, name).fault.startswith(fault)
    line = line_of(WEAK, f'="{name}"')
    assert any(problem.line == line and fault in problem.message for problem in weak.problems)


def test_an_exception_whose_message_is_the_one_said_is_caught(weak: LessonProof) -> None:
    assert _answer(weak, "names an exception").ok


def test_points_for_an_empty_cell_are_reported(weak: LessonProof) -> None:
    empty = {answer.exercise: answer for answer in weak.of_kind("empty")}
    assert empty["given"].points == 1
    assert "earns points that nobody worked for: check-given (1 points)" in empty["given"].fault
    assert empty["total"].ok
    assert weak.earned("empty") == 1


def test_a_failing_solution_and_both_traps_of_nbgrader_are_reported(weak: LessonProof) -> None:
    assert weak.earned("solution") == weak.points - 3
    messages = {problem.message for problem in weak.problems}
    first = 'check="wrong": '
    assert f"{first}the solution fails it: AssertionError: the solution itself fails" in messages
    assert f"{first}it writes to stderr, and nbgrader gives no points then: 'a warning'" in messages
    assert any(message.startswith(f"{first}it ends in an expression's value") for message in messages)


def test_a_demo_that_fails_with_the_solution_is_reported(weak: LessonProof) -> None:
    line = line_of(WEAK, "a demo fails") - 1
    assert any(
        problem.line == line and problem.message.endswith("RuntimeError: a demo fails") for problem in weak.problems
    )


def test_a_lesson_that_breaks_off_is_reported_once(tmp_path: Path) -> None:
    text = GOOD.replace("offset = [0]", "os._exit(3)")
    proof = prove_lesson(source_of(course_of(tmp_path, _1_1_sums=text), "1.1"))
    (problem,) = proof.problems
    assert problem.line == line_of(text, "import os") - 1
    assert problem.message == "the proof broke off at this cell: ended with exit code 3"
    assert proof.earned("solution") == 0


def test_a_lesson_that_hangs_ends_at_its_limit(tmp_path: Path) -> None:
    text = GOOD.replace("offset = [0]", "while True: pass")
    proof = prove_lesson(source_of(course_of(tmp_path, _1_1_sums=text), "1.1"), limits=Limits(3, 2000))
    (problem,) = proof.problems
    assert problem.message == "the proof broke off at this cell: stopped after 3 s, its time limit"


def test_the_command_prints_a_table_and_fails_when_anything_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course_of(tmp_path, _1_1_sums=GOOD, _1_2_sums=GOOD.replace("# # 1.1", "# # 1.2").replace('says="Add', 'says="add'))
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    app.command()(prove)
    runner = CliRunner()
    proven = runner.invoke(app, ["1.1"])
    assert proven.exit_code == 0, proven.output
    assert "100 %" in proven.output
    both = runner.invoke(app, ["--json"])
    assert both.exit_code == 1
    assert [proof["ok"] for proof in json.loads(both.stdout)] == [True, False]
