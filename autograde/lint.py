"""What a lesson must hold beyond what builds (`docs/authoring.md`): its sections, hints, mistakes and check messages.

Every rule is a function of a parsed lesson that yields problems; the rules run nothing.
"""

import ast
import re
from collections.abc import Iterator

from autograde.errors import Problem
from autograde.lesson import Cell, Lesson

HINTS, MISTAKES, ALTERNATIVES, QUESTIONS = 3, 3, 1, 3
SECTIONS = (
    "Why it matters at work",
    "With a real model",
    "Result card",
    "Say it in an interview",
    "Read next",
)
_DETAILS = re.compile(r"<details>\s*<summary>(?P<summary>.*?)</summary>(?P<body>.*?)</details>", re.DOTALL)


def lint(lesson: Lesson) -> list[Problem]:
    """Every problem of the lesson, in the order of its lines."""
    rules = (_opening, _sections, _parameters, _exercises, _checks)
    found = [Problem(lesson.path, line, message) for rule in rules for line, message in rule(lesson)]
    return sorted(found, key=lambda problem: problem.line)


def _opening(lesson: Lesson) -> Iterator[tuple[int, str]]:
    """The first cell: title, aim, what is measured, what is needed, minutes and run time."""
    first = lesson.cells[0] if lesson.cells else None
    if first is None or first.kind != "markdown" or not first.source.startswith(f"# {lesson.number} "):
        yield 1, f"the first cell must be prose that starts with the title '# {lesson.number} …'"
        return
    paragraphs = [part.strip() for part in first.source.split("\n\n")]
    if len(paragraphs) < 2 or paragraphs[1].startswith(("**", "#")) or not paragraphs[1].endswith("."):
        yield first.line, "after the title stands one sentence that says what the learner will be able to do"
    wanted = {
        "You will measure": (r"\{\{", "with the measured number as a {{placeholder}}"),
        "You need": (r"\w", "with the lessons or knowledge that come before"),
        "Time": (r"\d+ minutes.*\{\{run:seconds\}\}", "with 'N minutes' and the run time {{run:seconds}}"),
    }
    for name, (pattern, how) in wanted.items():
        own = [part for part in paragraphs if part.startswith(f"**{name}")]
        if not own or not re.search(pattern, own[0].removeprefix(f"**{name}"), re.DOTALL):
            yield first.line, f"the opening lacks a paragraph '**{name}.** …' {how}"


def _sections(lesson: Lesson) -> Iterator[tuple[int, str]]:
    """The headings that every lesson has, in their order, and what must stand under two of them."""
    found: dict[str, tuple[int, str]] = {}
    current = ""
    for cell in lesson.of_kind("markdown"):
        for part in re.split(r"^(?=## )", cell.source, flags=re.MULTILINE):
            if part.startswith("## "):
                current = part.splitlines()[0][3:].strip()
                found.setdefault(current, (cell.line, ""))
            if current:
                line, text = found[current]
                found[current] = (line, f"{text}\n{part}")
    for name in SECTIONS:
        if name not in found:
            yield 1, f"the section '## {name}' is missing"
    order = [name for name in found if name in SECTIONS]
    if order != [name for name in SECTIONS if name in found]:
        yield found[order[0]][0], f"the sections stand in another order than: {', '.join(SECTIONS)}"
    if "Say it in an interview" in found:
        line, text = found["Say it in an interview"]
        answers = [match for match in _DETAILS.finditer(text) if match["body"].strip()]
        if len(answers) < QUESTIONS:
            yield line, f"{len(answers)} questions with folded answers under 'Say it in an interview', not {QUESTIONS}"
    if "Read next" in found:
        line, text = found["Read next"]
        if not re.search(r"^\s*[-*] ", text, re.MULTILINE):
            yield line, "'Read next' lists the primary sources, one '- ' a line"


def _parameters(lesson: Lesson) -> Iterator[tuple[int, str]]:
    tagged = [cell for cell in lesson.of_kind("code") if "parameters" in cell.tags]
    if len(tagged) != 1:
        yield 1, f'a lesson has one cell with tags=["parameters"]; this one has {len(tagged)}'
    elif lesson.quick() == lesson:
        yield tagged[0].line, "no parameter names a small value, as in 'steps = 160  # quick: 3'"


def _exercises(lesson: Lesson) -> Iterator[tuple[int, str]]:
    if not lesson.exercises:
        yield 1, "the lesson has no exercise"
    for cell in lesson.exercises:
        name = f'exercise="{cell.name}"'
        if not 1 <= cell.difficulty <= 5:
            yield cell.line, f"{name}: difficulty is 1 to 5, not {cell.difficulty}"
        hints = {
            match["summary"].strip() for match in _DETAILS.finditer(_statement(lesson, cell)) if match["body"].strip()
        }
        if missing := [f"Hint {i}" for i in range(1, HINTS + 1) if f"Hint {i}" not in hints]:
            yield cell.line, f"{name}: no '<details><summary>{missing[0]}</summary>…</details>' in the text before it"
        for kind, least in (("mistake", MISTAKES), ("alternative", ALTERNATIVES)):
            count = sum(other.kind == kind and other.of == cell.name for other in lesson.cells)
            if count < least:
                yield cell.line, f"{name}: {count} {kind} cells, at least {least} are needed"


def _checks(lesson: Lesson) -> Iterator[tuple[int, str]]:
    for cell in lesson.of_kind("check"):
        name = f'check="{cell.name}"'
        try:
            tree = ast.parse(cell.source)
        except SyntaxError as error:
            yield cell.line + (error.lineno or 0), f"{name} is no plain Python: {error.msg}"
            continue
        asserts = [node for node in ast.walk(tree) if isinstance(node, ast.Assert)]
        if not any(isinstance(node, ast.Assert | ast.Raise) for node in ast.walk(tree)):
            yield cell.line, f"{name} asserts nothing"
        for node in asserts:
            if node.msg is None:
                yield (
                    cell.line + node.lineno,
                    f"{name}: an assert without a message that names the mistake and the way out",
                )
        last = tree.body[-1] if tree.body else None
        # A call may well return None, and whether it does is seen when it runs: `course prove` looks at that.
        if isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call):
            yield cell.line + last.lineno, f"{name} ends in an expression, whose value nbgrader may read as a grade"


def _statement(lesson: Lesson, exercise: Cell) -> str:
    """The prose just before an exercise: back to the code cell before it."""
    prose: list[str] = []
    for cell in lesson.cells[: lesson.cells.index(exercise)]:
        prose = [*prose, cell.source] if cell.kind == "markdown" else []
    return "\n\n".join(prose)
