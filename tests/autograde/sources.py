"""A course in a temporary folder, written cell by cell, for the tests that build, run, prove and lint lessons."""

from pathlib import Path

from autograde.course import Course

EXERCISE = '''# %% exercise="total" difficulty=1 minutes=5
def total(numbers):
    """Return the sum of the numbers."""
    ### BEGIN SOLUTION
    return sum(numbers)
    ### END SOLUTION
'''
CHECK = """# %% check="total" points=2
assert total([1, 2]) == 3, "Add every number"
### BEGIN HIDDEN TESTS
assert total([]) == 0, "The sum of nothing is 0"
### END HIDDEN TESTS
"""


def course_of(root: Path, **lessons: str) -> Course:
    """A course whose lessons are the files `solutions/1_demo/<name without its leading _>.py`."""
    (root / "solutions" / "1_demo").mkdir(parents=True, exist_ok=True)
    (root / "notebooks").mkdir(exist_ok=True)
    (root / "pyproject.toml").touch()
    course = Course(root)
    for name, text in lessons.items():
        (course.solutions / "1_demo" / f"{name.lstrip('_')}.py").write_text(text, encoding="utf-8")
    return course


def source_of(course: Course, number: str) -> Path:
    """The source of one lesson."""
    return course.select_one(number)


def line_of(text: str, marker: str) -> int:
    """The 1-based number of the only line that holds `marker`."""
    (found,) = [number for number, line in enumerate(text.splitlines(), 1) if marker in line]
    return found
