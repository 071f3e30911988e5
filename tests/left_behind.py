"""Which processes belong to a run of tests: they inherit a mark in their environment, whoever their parent is now."""

import os
from collections.abc import Iterable

import psutil

MARK = "COURSE_TEST_RUN"


def marked(value: str, *, but: Iterable[int] = ()) -> list[psutil.Process]:
    """The living processes that carry this mark, without this one, its ancestors and those of the given ids."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents()), *but}
    found = []
    for process in psutil.process_iter():
        if process.pid in own:
            continue
        try:
            if process.environ().get(MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended, or belongs to somebody else
            continue
    return found


def command_line(process: psutil.Process) -> str:
    """What started a process; nothing if it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
