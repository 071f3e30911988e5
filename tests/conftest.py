"""What every test shares: the course itself, and a private copy of it for tests that act as a learner."""

import shutil
import subprocess
from pathlib import Path

import pytest

from autograde.course import Course

ROOT = Path(__file__).resolve().parent.parent


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
