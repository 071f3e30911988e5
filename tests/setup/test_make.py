"""What `make` promises, asked of make itself: nothing is installed twice."""

import os
import subprocess

from autograde.course import Course


def _plan(course: Course, target: str) -> str:
    """The commands that make would run, asked of a make of its own, also where another make runs these tests."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", "--dry-run", target], cwd=course.root, env=alone, check=True, capture_output=True, text=True
    ).stdout


def test_a_bare_machine_installs_before_it_opens_lab(course_copy: Course) -> None:
    plan = _plan(course_copy, "lab")
    assert plan.index("-m venv") < plan.index("pip install") < plan.index("course lab")
    assert "[dev]" not in plan


def test_a_second_lab_installs_nothing(course_copy: Course) -> None:
    venv = course_copy.root / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / ".lab").touch()
    assert _plan(course_copy, "lab").strip() == ".venv/bin/course lab"


def test_new_pins_are_installed(course_copy: Course) -> None:
    venv = course_copy.root / ".venv"
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    (venv / "bin" / "python").touch()
    (venv / ".lab").touch()
    later = (venv / ".lab").stat().st_mtime + 10
    os.utime(course_copy.root / "constraints.txt", (later, later))
    assert "pip install" in _plan(course_copy, "lab")


def test_tests_install_the_development_tools(course_copy: Course) -> None:
    assert "[dev]" in _plan(course_copy, "test")
