"""A lesson that is killed while its server runs leaves no process, and so no open port."""

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from autograde.course import Course, number
from tests.left_behind import MARK, command_line, marked

SERVING = [
    source
    for source in Course(Path(__file__).resolve().parents[2]).sources()
    if re.search(r"servers\.process\(|labkit\.servers import .*\bprocess\b", source.read_text())
]
SECONDS = 300
"""After which a test that waits in vain fails."""


def supervisors(mark: str) -> list[psutil.Process]:
    return [process for process in marked(mark) if "supervisor.py" in command_line(process)]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_that_has_ended_has_no_command_line() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as command:
        process = psutil.Process(command.pid)
        assert "input()" in command_line(process)
        command.communicate()
    assert command_line(process) == ""


def test_there_is_a_lesson_to_kill() -> None:
    assert SERVING


@pytest.mark.parametrize("killed", ["kernel", "command"])
@pytest.mark.parametrize("source", SERVING[:1], ids=lambda source: source.stem)
def test_a_lesson_killed_midway_leaves_nothing(course_copy: Course, source: Path, killed: str) -> None:
    mark = uuid.uuid4().hex
    with subprocess.Popen(
        [Path(sys.executable).with_name("course"), "run", number(source), "--quick"],
        cwd=course_copy.root,
        env={**os.environ, MARK: mark},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as command:
        until(lambda: supervisors(mark) or command.poll() is not None)
        assert command.poll() is None, "the lesson ended before its server was seen"
        kernel = supervisors(mark)[0].ppid()
        assert len(marked(mark)) >= 4  # the command, the kernel, the supervisor, the server
        os.kill(kernel if killed == "kernel" else command.pid, signal.SIGKILL)
        command.wait()
    until(lambda: not marked(mark))
