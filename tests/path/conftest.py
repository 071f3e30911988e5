"""The committed path, run and proven once for all tests that look at the outcome."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from autograde.course import Course

Json = dict[str, Any]


def without_network(command: list[str | Path]) -> list[str | Path]:
    """The command in a network namespace of its own, where every socket but the loopback is refused."""
    bubblewrap = shutil.which("bwrap")
    assert bubblewrap, "the offline tests need bubblewrap: `apt-get install bubblewrap`"
    return [bubblewrap, "--dev-bind", "/", "/", "--unshare-net", "--die-with-parent", *command]


def course_command(course: Course, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`course …` in the tree, without a network and with the Hub switched off."""
    return subprocess.run(
        without_network([Path(sys.executable).with_name("course"), *arguments]),
        cwd=course.root,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def runs(course: Course) -> list[Json]:
    """`course run` over the whole path."""
    done = course_command(course, "run", "--json")
    assert done.stdout, done.stderr
    report: list[Json] = json.loads(done.stdout)
    return report


@pytest.fixture(scope="session")
def proofs(course: Course) -> list[Json]:
    """`course prove` over the whole path."""
    done = course_command(course, "prove", "--json")
    assert done.stdout, done.stderr
    report: list[Json] = json.loads(done.stdout)
    return report
