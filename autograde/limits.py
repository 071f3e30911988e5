"""Runs one command under a time and a memory limit, and leaves no process of it behind."""

import contextlib
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import psutil

_POLL_SECONDS = 0.2
_TAIL_BYTES = 20_000
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Limits:
    """Wall-clock seconds and resident MiB that a command and all its children may use together."""

    seconds: float
    mebibytes: float


@dataclass(frozen=True)
class Outcome:
    """How a limited command ended. `ended` is "exit" when it ended by itself, whatever its code."""

    ended: Literal["exit", "time", "memory"]
    code: int | None
    seconds: float
    peak_mebibytes: float
    stderr_tail: str

    @property
    def ok(self) -> bool:
        return self.ended == "exit" and self.code == 0

    def reason(self, limits: Limits) -> str:
        """One line that says why the command failed."""
        if self.ended == "time":
            return f"stopped after {limits.seconds:.0f} s, its time limit"
        if self.ended == "memory":
            return f"stopped at {self.peak_mebibytes:.0f} MiB, over its limit of {limits.mebibytes:.0f} MiB"
        if self.code is not None and self.code < 0:
            return f"killed by signal {-self.code}"
        return f"ended with exit code {self.code}"


def run_limited(
    command: Sequence[str | Path],
    limits: Limits,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] | None = None,
) -> Outcome:
    """Run `command` to its end or to a limit, then kill every process it started.

    Each line it writes to stdout is handed to `on_line` as it comes. Memory is the proportional set size of the whole
    process tree, so pages that forked children share count once. An error of `on_line` is raised again
    when the command has ended.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        broken: list[Exception] = []
        reader = threading.Thread(target=_drain, args=(process, on_line, broken), daemon=True)
        reader.start()
        family = _Family(process.pid)
        ended: Literal["exit", "time", "memory"] = "exit"
        peak = 0.0
        try:
            while process.poll() is None:
                peak = max(peak, family.measure(limits.mebibytes))
                if peak > limits.mebibytes:
                    ended = "memory"
                    break
                if time.monotonic() - started > limits.seconds:
                    ended = "time"
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            _kill(process, family)
        reader.join(timeout=5)
        stderr.seek(0, 2)
        stderr.seek(max(0, stderr.tell() - _TAIL_BYTES))
        tail = stderr.read().decode(errors="replace")
    if broken:
        raise broken[0]
    code = process.returncode if ended == "exit" else None
    return Outcome(ended, code, time.monotonic() - started, peak, tail)


def side_by_side(work: Callable[[_Item], _Made], items: Iterable[_Item], jobs: int) -> list[_Made]:
    """`work` on every item, `jobs` at a time, for work that waits for commands; results in the items' order.

    When it is interrupted (Ctrl-C), or one `work` raises, every process that was started is killed and nothing more
    begins.
    """
    stopped = threading.Event()

    def unless_stopped(item: _Item) -> _Made:
        if stopped.is_set():
            raise CancelledError
        try:
            return work(item)
        except BaseException:
            stopped.set()  # here and not in the waiting thread, before this one takes up its next item
            raise

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(unless_stopped, item) for item in items]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
            return [future.result() for future in futures if future.done()]
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures):  # one may have been about to start its command
                for child in psutil.Process().children(recursive=True):
                    _end(child)
                time.sleep(_POLL_SECONDS)
            raise


def _drain(process: "subprocess.Popen[str]", on_line: Callable[[str], None] | None, broken: list[Exception]) -> None:
    """Read to the end whatever `on_line` does, or the command would block on a full pipe; its error is kept."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            if on_line is not None and not broken:
                try:
                    on_line(line.rstrip("\n"))
                except Exception as error:  # raised again in the caller's thread
                    broken.append(error)


class _Family:
    """A process and everything seen below it, dead or alive, and the memory that the living hold together."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.members: dict[int, psutil.Process] = {}
        self._highest = 0.0
        self._polls = 0

    def look(self) -> list[psutil.Process]:
        """The living members; new ones are remembered."""
        try:
            root = psutil.Process(self.pid)
            tree = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        self.members.update({member.pid: member for member in tree})
        return tree

    def measure(self, limit: float) -> float:
        """The proportional set size of the living in MiB; 0 when this poll could leave it out.

        Measuring it walks every page, about 15 ms of the kernel's time per 500 MiB, which at each poll would slow the
        command down. The resident size, which is free and never less, says when it cannot matter: as long as it stays
        below the limit and below its own highest, all but every tenth poll is left out.
        """
        living = self.look()
        resident = sum(_resident(member) for member in living) / 2**20
        self._polls += 1
        if resident <= min(limit, 1.02 * self._highest) and self._polls % 10:
            return 0.0
        self._highest = max(self._highest, resident)
        return sum(_proportional(member) for member in living) / 2**20


def _proportional(member: psutil.Process) -> float:
    try:
        memory = member.memory_full_info()
    except psutil.NoSuchProcess:
        return 0.0  # it ended between the listing and the measuring
    except psutil.AccessDenied:  # as some systems do for a process in a sandbox; its resident size is public
        return _resident(member)
    return float(getattr(memory, "pss", memory.uss))


def _resident(member: psutil.Process) -> float:
    try:
        return float(member.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0.0


def _kill(process: "subprocess.Popen[str]", family: _Family) -> None:
    """Kill the command and all seen below it: kernels start sessions of their own, which a group kill would miss."""
    if process.poll() is None:
        family.look()
    for member in family.members.values():
        _end(member)
    psutil.wait_procs([member for member in family.members.values() if member.pid != process.pid], timeout=5)
    process.wait()


def _end(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()
