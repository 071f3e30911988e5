"""What every test shares: the course itself, a private copy of it for tests that act as a learner, and a clean end."""

import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest

from autograde.course import Course
from tests.left_behind import MARK, command_line, marked

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_END = 30
"""How long what was told to end may take."""


def pytest_configure(config: pytest.Config) -> None:
    """Mark what the tests start; the workers of a run inherit the mark of its controller."""
    if not hasattr(config, "workerinput"):
        os.environ[MARK] = uuid.uuid4().hex


def pytest_unconfigure(config: pytest.Config) -> None:
    """Fail the whole run when a process that a test has started is still there."""
    if hasattr(config, "workerinput"):
        return
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := marked(os.environ[MARK])) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        commands = "\n".join(f"{process.pid}: {command_line(process)}" for process in left)
        raise pytest.UsageError(f"these processes outlive the tests:\n{commands}")


@pytest.fixture(scope="session")
def course() -> Course:
    """The course tree under test. Tests only read it."""
    return Course(ROOT)


@pytest.fixture(scope="module")
def course_copy(tmp_path_factory: pytest.TempPathFactory) -> Course:
    """A copy of the tree as a learner would have cloned it: what git tracks or would track, nothing else."""
    root = tmp_path_factory.mktemp("course") / "path"
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            target = root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    return Course(root)
