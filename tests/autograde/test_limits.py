"""Commands under limits: how they end, what they use, and that nothing of them is left."""

import os
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from autograde.limits import Limits, run_limited, side_by_side

AMPLE = Limits(seconds=60, mebibytes=2000)


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_an_orderly_end_gives_lines_code_and_stderr() -> None:
    lines: list[str] = []
    code = "import sys; print('one'); print('two'); print('oh', file=sys.stderr); sys.exit(4)"
    outcome = run_limited(_python(code), AMPLE, on_line=lines.append)
    assert lines == ["one", "two"]
    assert (outcome.ended, outcome.code, outcome.stderr_tail) == ("exit", 4, "oh\n")
    assert not outcome.ok
    assert outcome.reason(AMPLE) == "ended with exit code 4"
    assert run_limited(_python("pass"), AMPLE).ok


def test_the_folder_and_the_environment_are_those_given(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import os; print(os.getcwd()); print(os.environ['COURSE_WORD'])"
    run_limited(_python(code), AMPLE, cwd=tmp_path, env={**os.environ, "COURSE_WORD": "bench"}, on_line=lines.append)
    assert lines == [str(tmp_path), "bench"]


def test_a_command_that_hangs_ends_at_its_time() -> None:
    limits = Limits(seconds=1, mebibytes=2000)
    outcome = run_limited(_python("while True: pass"), limits)
    assert (outcome.ended, outcome.code) == ("time", None)
    assert outcome.reason(limits) == "stopped after 1 s, its time limit"


def test_a_command_that_eats_memory_ends_at_its_limit() -> None:
    limits = Limits(seconds=60, mebibytes=300)
    code = """
        import time
        eaten = []
        while True:
            eaten.append(bytearray(b"x" * 20_000_000))
            time.sleep(0.01)
    """
    outcome = run_limited(_python(code), limits)
    assert outcome.ended == "memory"
    assert outcome.peak_mebibytes > 300
    assert "over its limit of 300 MiB" in outcome.reason(limits)


def test_the_memory_of_children_counts() -> None:
    code = """
        import subprocess, sys
        child = "import time; eaten = bytearray(b'x' * 200_000_000); time.sleep(60)"
        subprocess.run([sys.executable, "-c", child])
    """
    assert run_limited(_python(code), Limits(seconds=60, mebibytes=150)).ended == "memory"


def test_pages_that_forked_children_share_count_once() -> None:
    code = """
        import os, time
        shared = bytearray(b"x" * 200_000_000)
        children = [os.fork() for _ in range(3)]
        time.sleep(1)
    """
    assert run_limited(_python(code), Limits(seconds=60, mebibytes=400)).ok


def test_a_killed_command_says_by_what() -> None:
    outcome = run_limited(_python("import os; os.kill(os.getpid(), 9)"), AMPLE)
    assert outcome.reason(AMPLE) == "killed by signal 9"


def test_children_in_sessions_of_their_own_are_killed_too(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = f"""
        import pathlib, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        pathlib.Path({str(note)!r}).write_text(str(child.pid))
        time.sleep(3)
    """
    assert run_limited(_python(code), AMPLE).ok
    assert not _runs(int(note.read_text()))


def test_only_the_end_of_a_long_stderr_is_kept() -> None:
    code = "import sys; sys.stderr.write('x' * 1_000_000 + 'end')"
    tail = run_limited(_python(code), AMPLE).stderr_tail
    assert tail.endswith("xend")
    assert len(tail) <= 20_000


def test_an_error_of_the_reader_is_raised_and_does_not_block_the_command() -> None:
    def fail(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match=r"^0$"):
        run_limited(_python("[print(i) for i in range(100_000)]"), AMPLE, on_line=fail)


def test_side_by_side_keeps_the_order() -> None:
    assert side_by_side(lambda number: number * number, range(5), jobs=3) == [0, 1, 4, 9, 16]


def test_an_interrupt_kills_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    def work(number: int) -> None:
        if number == 1:
            while not (tmp_path / "0").exists():
                time.sleep(0.05)
            raise KeyboardInterrupt
        code = f"import pathlib, time; pathlib.Path({str(tmp_path)!r}, '{number}').touch(); time.sleep(600)"
        run_limited(_python(code), AMPLE)

    with pytest.raises(KeyboardInterrupt):
        side_by_side(work, range(4), jobs=2)
    assert not any((tmp_path / str(number)).exists() for number in (2, 3))
    assert not [child for child in psutil.Process().children(recursive=True) if _sleeps(child)]


def _sleeps(process: psutil.Process) -> bool:
    try:
        return "sleep(600)" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
