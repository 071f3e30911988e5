"""The process between a lesson and a server program: it ends the server when it is told to, or when the lesson dies.

`labkit.servers.process` starts it as `python supervisor.py GRACE LOG PROGRAM ARGUMENT …`. It reports on its stdout, a
line each: `pid N` when the program has started, `error TEXT` when it cannot start, `exit N` when all of it is gone. It
stops the program when there is something to read on its stdin, or the end of it, and when its own parent is no more,
whatever ended that one. On Linux what the program leaves behind is adopted, and ended as well.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

import psutil

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LOOK = 0.2
"""Seconds between two looks at whether program and parent are still there."""


def main(grace: float, log: str, command: list[str]) -> None:
    """Run the command to its end, or to ours."""
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted notebook still leaves its `with` block in order
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the program leaves behind becomes our child, and is ended with it
    try:
        with open(log, "wb") as output:
            program = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),
            )
    except OSError as error:
        _report(f"error {error}")
        return
    _report(f"pid {program.pid}")
    while program.poll() is None and os.getppid() == parent and not _told_to_stop():
        pass
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(grace)
        except subprocess.TimeoutExpired:
            program.kill()
    code = program.wait()
    _end_descendants()
    _report(f"exit {code}")


def _told_to_stop() -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], _LOOK)
    return bool(readable)


def _end_descendants() -> None:
    """Kill all that is left, again until nothing is: a dying process may have forked."""
    while left := psutil.Process().children(recursive=True):
        for one in left:
            try:
                one.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=1)
        time.sleep(0.01)


def _prctl(option: int, value: int) -> None:
    """A setting of Linux that the standard library has no name for; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _report(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # the parent is dead: nobody reads, and the work is done all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2], sys.argv[3:])
