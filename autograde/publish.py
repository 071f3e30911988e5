"""The whole tree: every lesson source → its notebook, the start page, and the README's table; or only a comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat

from autograde import build, home, lesson, results
from autograde.course import START_PAGE, Course
from autograde.errors import CourseError, LearnerWorkError


@dataclass(frozen=True)
class BuildReport:
    """What a build changed (or, when it only checked, would change), and what it refused to touch and why."""

    changed: tuple[Path, ...]
    unchanged: int
    refused: tuple[str, ...]


def build_all(course: Course, check: bool = False) -> BuildReport:
    """Build everything that is generated; with `check`, write nothing.

    A source that cannot be built, or a notebook with a learner's work, is refused and the others go on. Built notebooks
    whose source is gone are deleted when nobody worked in them.
    """
    changed: list[Path] = []
    refused: list[str] = []
    unchanged = 0
    for path, make in _pages(course).items():
        try:
            text = make()
            stale = _differs(path, text) if check else _write(path, text)
        except CourseError as error:
            if str(error) not in refused:  # a faulty source is in the way of the start page and the README too
                refused.append(str(error))
            continue
        changed += [path] if stale else []
        unchanged += not stale
    for orphan in _orphans(course):
        try:
            if not check:
                _delete(orphan)
            changed.append(orphan)
        except CourseError as error:
            refused.append(str(error))
    return BuildReport(tuple(changed), unchanged, tuple(refused))


def _pages(course: Course) -> dict[Path, Callable[[], str]]:
    """Every generated file and what makes its text."""

    def notebook(source: Path) -> str:
        return build.to_text(build.learner_notebook(lesson.load(source), results.read(course.result_file(source))))

    pages: dict[Path, Callable[[], str]] = {
        course.notebook(source): partial(notebook, source) for source in course.sources()
    }
    if (course.solutions / f"{START_PAGE}.py").exists():
        pages[course.notebooks / f"{START_PAGE}.ipynb"] = lambda: build.to_text(home.start_page(course))
    readme = course.root / "README.md"
    if readme.exists():
        pages[readme] = lambda: home.readme(readme.read_text(encoding="utf-8"), course)
    return pages


def _write(path: Path, text: str) -> bool:
    """Write `text` where it is new; return whether it was."""
    if path.suffix == ".ipynb":
        return build.write(nbformat.reads(text, as_version=4), path)
    stale = _differs(path, text)
    if stale:
        path.write_text(text, encoding="utf-8")
    return stale


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text(encoding="utf-8") != text


def _orphans(course: Course) -> list[Path]:
    """Notebooks that a build made (they say of which lesson) and no source makes now."""
    wanted = {course.notebook(source) for source in course.sources()}
    found = []
    for path in sorted(course.notebooks.glob("*/*.ipynb")):
        if path not in wanted:
            try:
                notebook = nbformat.read(path, as_version=4)
            except (nbformat.reader.NotJSONError, nbformat.ValidationError):
                continue  # no build made this
            if "course" in notebook.metadata:
                found.append(path)
    return found


def _delete(path: Path) -> None:
    if build.holds_work(nbformat.read(path, as_version=4)):
        raise LearnerWorkError(f"{path} has no lesson any more, but holds a learner's work: move it out of notebooks/")
    path.unlink()
