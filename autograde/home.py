"""The pages made from all lessons together: the start page's map of the path, and the table in README.md."""

import re
from dataclasses import dataclass

from nbformat import NotebookNode

from autograde import build, lesson, results
from autograde.course import START_PAGE, Course
from autograde.errors import CourseError
from autograde.lesson import Lesson

MODULES = {
    "1_foundations": "Foundations",
    "2_peft": "Finetuning with PEFT",
    "3_rag": "Retrieval-augmented generation",
    "4_llmops": "MLOps and LLMOps",
    "5_debugging": "Debugging",
    "6_performance": "Performance",
    "7_portfolio": "Portfolio",
}
_MAP = "{{path:map}}"
_BEGIN, _END = "<!-- path:begin (made by `course build`) -->", "<!-- path:end -->"
_MEASURE = re.compile(r"\*\*You will measure\.?\*\*\s*(?P<what>.+?)(?=\n\s*\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    """One row of the path: a lesson and the sentence that says what its learner measures."""

    lesson: Lesson
    measures: str

    @property
    def exercises(self) -> int:
        return len(self.lesson.exercises)

    @property
    def minutes(self) -> int:
        return sum(cell.minutes for cell in self.lesson.exercises)


def entries(course: Course) -> list[Entry]:
    """Every lesson of the path with its measured headline."""
    rows = []
    for source in course.sources():
        parsed = lesson.load(source)
        match = _MEASURE.search(parsed.cells[0].source if parsed.cells else "")
        measured = results.read(course.result_file(source))
        unmeasured: list[str] = []
        what = results.fill(" ".join(match["what"].split()) if match else "", measured, unmeasured.append)
        if unmeasured:
            raise CourseError(
                f"{source}: {', '.join(unmeasured)} was not measured: `course run {parsed.number} --save`"
            )
        rows.append(Entry(parsed, what))
    return rows


def table(rows: list[Entry], folder: str) -> str:
    """The path as one Markdown table a module; links lead into `folder` (relative to the page)."""
    parts = []
    for module in sorted({row.lesson.module for row in rows}, key=lambda name: int(name.split("_")[0])):
        parts += [
            f"**{module.split('_')[0]}. {MODULES.get(module, module)}**\n",
            "| lesson | exercises | points | you measure |",
            "|---|---:|---:|---|",
        ]
        for row in (row for row in rows if row.lesson.module == module):
            link = f"{folder}{module}/{row.lesson.stem}.ipynb"
            parts.append(
                f"| [{row.lesson.number} {row.lesson.title}]({link}) | {row.exercises} in {row.minutes} min "
                f"| {row.lesson.points} | {row.measures} |"
            )
        parts.append("")
    return "\n".join(parts).strip()


def start_page(course: Course) -> NotebookNode:
    """The learner's first notebook: `solutions/start_here.py` with the map of the path in its place."""
    path = course.solutions / f"{START_PAGE}.py"
    text = path.read_text(encoding="utf-8")
    if text.count(_MAP) != 1:
        raise CourseError(f"{path}: the start page must hold {_MAP} once; the map of the path goes there")
    rows = table(entries(course), "").replace("\n", "\n# ")
    return build.learner_notebook(lesson.parse(text.replace(_MAP, rows), path), results.LessonResults())


def readme(text: str, course: Course) -> str:
    """README.md with its table of the path made anew between its two markers."""
    if text.count(_BEGIN) != 1 or text.count(_END) != 1 or text.index(_BEGIN) > text.index(_END):
        raise CourseError(f"README.md must hold '{_BEGIN}' and then '{_END}', once each; the path's table goes between")
    before, rest = text.split(_BEGIN)
    after = rest.split(_END)[1]
    return f"{before}{_BEGIN}\n\n{table(entries(course), 'notebooks/')}\n\n{_END}{after}"
