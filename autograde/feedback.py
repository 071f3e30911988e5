"""What a learner reads after grading: the sentence that names a mistake, the next hint, no line of a hidden test."""

import html
import re
from collections.abc import Iterable

import nbformat
from nbconvert.exporters.exporter import ResourcesDict
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbformat import NotebookNode
from nbgrader.preprocessors import ClearHiddenTests, GetGrades, NbGraderPreprocessor
from nbgrader.utils import is_grade

from autograde.lesson import BEGIN_HIDDEN, END_HIDDEN, Lesson

_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_HINT = re.compile(r"<details>\s*<summary>\s*Hint[^<]*</summary>(?P<text>.*?)</details>", re.DOTALL | re.IGNORECASE)
_FRAME = re.compile(r"Cell In\[(?P<count>\d+)\], line (?P<line>\d+)")
_CELL_FILE = re.compile(r" \(\d+\.py, line \d+\)")  # how a SyntaxError names the cell it stands in
_LONGEST_MESSAGE = 800
_REMOVED = "[a line of the hidden tests is left out]"


def hints(lesson: Lesson) -> dict[str, tuple[str, ...]]:
    """The hints of each exercise, in order: the folded ones in the prose just before its cell."""
    found: dict[str, tuple[str, ...]] = {}
    prose: list[str] = []
    for cell in lesson.cells:
        if cell.kind == "markdown":
            prose.append(cell.source)
            continue
        if cell.kind == "exercise":
            texts = [match["text"] for source in prose for match in _HINT.finditer(source)]
            found[cell.name] = tuple(_plain(text) for text in texts)
        prose = []
    return found


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text)).split())


def error_of(cell: NotebookNode) -> NotebookNode | None:
    """The first error output of an executed cell."""
    return next((output for output in cell.get("outputs", ()) if output.output_type == "error"), None)


def message(error: NotebookNode, answer: NotebookNode | None = None) -> str:
    """One paragraph that says what went wrong; a failed assertion speaks for itself.

    `answer` is the executed cell with the learner's answer: an error raised there is told with its line.
    """
    value = _ANSI.sub("", str(error.evalue)).strip()
    if len(value) > _LONGEST_MESSAGE:
        value = value[:_LONGEST_MESSAGE] + " …"
    if error.ename == "AssertionError":
        return value or "a test failed without a message: read the check's code"
    if error.ename == "Stopped":
        return f"this cell was stopped: {value}"
    if error.ename == "NotImplementedError":
        return "`raise NotImplementedError` is still reached: replace it with your answer"
    value, where = _CELL_FILE.sub("", value), _line(error, answer)
    return f"{error.ename}: {value}{where}" if value else f"{error.ename}{where}"


def _line(error: NotebookNode, answer: NotebookNode | None) -> str:
    """` (line 3 of your answer)`, when the traceback passes through the learner's cell."""
    if answer is None or answer.get("execution_count") is None:
        return ""
    frames = _FRAME.finditer(_ANSI.sub("", "\n".join(error.traceback)))
    lines = [frame["line"] for frame in frames if int(frame["count"]) == answer.execution_count]
    return f" (line {lines[-1]} of your answer)" if lines else ""


def without_hidden_tests(graded: NotebookNode) -> NotebookNode:
    """A copy of a graded notebook in which nothing shows a line of a hidden test.

    Check cells get their released text back; a traceback keeps the frames that show no hidden line; any other output
    loses the lines that hold one. A line that the learner can see anyway, or of punctuation alone, hides nothing.
    """
    notebook = nbformat.from_dict(graded)
    hidden: set[str] = set()
    for cell in notebook.cells:
        if is_grade(cell):
            hidden |= _hidden_lines(cell.source)
            ClearHiddenTests().preprocess_cell(cell, {}, 0)
    for cell in notebook.cells:
        hidden -= _lines(cell.source)
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            _redact(output, hidden)
    return notebook


class HideHiddenTests(NbGraderPreprocessor):
    """Keeps hidden tests out of nbgrader's feedback pages."""

    def preprocess(self, nb: NotebookNode, resources: ResourcesDict) -> tuple[NotebookNode, ResourcesDict]:
        return without_hidden_tests(nb), resources


FEEDBACK_PREPROCESSORS = [GetGrades, HideHiddenTests, CSSHTMLHeaderPreprocessor]  # nbgrader's own list, with one more


def _lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(re.findall(r"\w", line)) >= 4}


def _hidden_lines(source: str) -> set[str]:
    regions = re.findall(f"{re.escape(BEGIN_HIDDEN)}.*?{re.escape(END_HIDDEN)}", source, re.DOTALL)
    return {line for region in regions for line in _lines(region)}


def _redact(output: NotebookNode, hidden: set[str]) -> None:
    if output.output_type == "stream":
        output.text = _without(output.text, hidden)
    elif output.output_type == "error":
        output.evalue = _without(output.evalue, hidden)
        # IPython gives one string a frame: a frame that shows a hidden line goes as a whole.
        output.traceback = [frame for frame in output.traceback if not _shows(frame, hidden)]
        if not output.traceback or output.ename not in output.traceback[-1]:
            output.traceback.append(f"{output.ename}: {output.evalue}")
    else:
        for kind, value in output.data.items():
            if isinstance(value, str) and not kind.startswith("image/"):
                output.data[kind] = _without(value, hidden)
            elif _shows(str(value), hidden):
                output.data[kind] = _REMOVED


def _without(text: str, hidden: set[str]) -> str:
    return "\n".join(_REMOVED if _shows(line, hidden) else line for line in text.split("\n"))


def _shows(text: str, hidden: Iterable[str]) -> bool:
    plain = html.unescape(_ANSI.sub("", text))
    numbered = {re.sub(r"^(-+>)?\s*\d+\s", "", line.strip()).strip() for line in plain.splitlines()}
    return any(line in numbered or (len(line) >= 12 and line in plain) for line in hidden)
