"""Hints in order, messages without tracebacks, and pages that show no line of a hidden test."""

import html
import re
from pathlib import Path

import nbformat
import pytest

from autograde import build, feedback
from autograde.grade import grade_notebook
from autograde.lesson import Lesson
from tests.autograde import grading

HIDDEN = ["secret_number = 7.25", "assert double(secret_number) == 14.5", "BEGIN HIDDEN TESTS"]


@pytest.fixture
def lesson(tmp_path: Path) -> Lesson:
    return grading.small(tmp_path)


def error(name: str, value: str, *frames: str) -> nbformat.NotebookNode:
    return nbformat.v4.new_output("error", ename=name, evalue=value, traceback=list(frames))


def test_the_hints_of_an_exercise_are_those_just_before_it(lesson: Lesson) -> None:
    assert feedback.hints(lesson) == {"double": ("What is `x + x`?", "Multiply by 2 & return it."), "half": ()}


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (error("AssertionError", "Keep the sign"), "Keep the sign"),
        (error("AssertionError", ""), "a test failed without a message: read the check's code"),
        (error("NotImplementedError", ""), "`raise NotImplementedError` is still reached: replace it with your answer"),
        (error("Stopped", "it ended the kernel"), "this cell was stopped: it ended the kernel"),
        (error("KeyError", "'x'"), "KeyError: 'x'"),
        (error("SyntaxError", "invalid syntax (3146.py, line 4)"), "SyntaxError: invalid syntax"),
        (error("ValueError", "\x1b[31mred\x1b[0m"), "ValueError: red"),
        (error("ValueError", "v" * 5000), "ValueError: " + "v" * 800 + " …"),
    ],
)
def test_messages(output: nbformat.NotebookNode, told: str) -> None:
    assert feedback.message(output) == told


def test_an_error_in_the_answer_is_told_with_its_line() -> None:
    answer = nbformat.v4.new_code_cell("", execution_count=5)
    frames = ["\x1b[36mCell\x1b[39m \x1b[32mIn[7]\x1b[39m, line 1\n…", "Cell In[5], line 3, in double(x)\n…"]
    assert feedback.message(error("KeyError", "1", *frames), answer) == "KeyError: 1 (line 3 of your answer)"
    assert feedback.message(error("KeyError", "1", frames[0]), answer) == "KeyError: 1"


def test_no_hidden_line_is_in_any_output(lesson: Lesson) -> None:
    source = build.source_notebook(lesson)
    frame = "Cell In[4], line 4\n      3 secret_number = 7.25\n----> 4 assert double(secret_number) == 14.5, 'no'"
    grading.cell_of(source, "check-double").outputs = [
        nbformat.v4.new_output("stream", text="mine\n  secret_number = 7.25\n"),
        nbformat.v4.new_output(
            "display_data", data={"text/html": "<pre>secret_number = 7.25</pre>", "text/plain": "ok"}
        ),
        nbformat.v4.new_output("display_data", data={"application/json": {"a": "secret_number = 7.25"}}),
        error("AssertionError", "no", "header", "Cell In[2], line 1\nmine", frame, "AssertionError: no"),
    ]
    cleaned = feedback.without_hidden_tests(source)
    text = nbformat.writes(cleaned)
    assert not [line for line in HIDDEN if line in text]
    stream, rich, data, failure = grading.cell_of(cleaned, "check-double").outputs
    assert stream.text == "mine\n[a line of the hidden tests is left out]\n"
    assert rich.data["text/plain"] == "ok"
    assert "left out" in data.data["application/json"]
    assert failure.traceback == ["header", "Cell In[2], line 1\nmine", "AssertionError: no"]
    assert "secret_number" in nbformat.writes(source), "the graded notebook itself must not change"


def test_the_page_shows_the_grade_and_no_hidden_line(lesson: Lesson) -> None:
    peeking = "def double(x):\n    print(In[-1])\n    return int(2 * x)"
    grade = grade_notebook(lesson, grading.answered(lesson, double=peeking), limits=grading.SHORT, html=True)
    text = html.unescape(re.sub("<[^>]*>", "", grade.html))
    assert (grade.points, "Your double works for whole numbers only" in text) == (5, True)
    assert "Score: 5.0 / 6.0" in text
    assert "Twice three is six" in text, "the visible tests stay"
    shown = " ".join(text.split())
    assert not [line for line in HIDDEN if line in shown]
    assert "html" not in grade.to_dict()
