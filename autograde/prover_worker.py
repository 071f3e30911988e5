"""The process that `course prove` starts: runs one lesson once, and forks itself for every other answer.

It reads a plan (see `autograde.prove.plan`) and writes one JSON object a line to stdout; whatever the lesson itself
prints there is dropped. A forked answer shares the parent's memory copy on write, so it starts with everything the
lesson has computed so far, runs in the exercise's place and ends without touching the parent.

Nothing here may start a thread before it forks: OpenMP's pool, for one, does not survive a fork. `prove` therefore
starts this process with one thread a library.
"""

import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn, TextIO

from IPython.core.interactiveshell import ExecutionResult, InteractiveShell
from traitlets.config import Config

Json = dict[str, Any]
_MESSAGE_CHARACTERS = 2000
_CLOCK_FACTOR = 4


class _Shell(InteractiveShell):
    """An IPython shell without a terminal: magics, `display` and last expressions work, tracebacks are not drawn."""

    def showtraceback(self, *args: object, **kwargs: object) -> None:
        pass

    def showsyntaxerror(self, *args: object, **kwargs: object) -> None:
        pass

    def enable_gui(self, gui: object = None) -> None:
        pass


def main(plan_path: str) -> None:
    """Run the plan at `plan_path` to its end, with its folder for scratch files."""
    plan = json.loads(Path(plan_path).read_text(encoding="utf-8"))
    report = _take_stdout()
    shell = _start_shell()
    answers = _Answers(shell, plan, Path(plan_path).parent, report)
    for place, step in enumerate(plan["steps"]):
        report({"event": "cell", "number": place + 1, "of": len(plan["steps"]), "line": step["line"]})
        for variant in step["variants"]:
            answers.start(variant, place)
        outcome = _run(shell, step["source"])
        if step["check"]:
            report({"event": "check", "id": step["check"], **outcome})
        elif not outcome["passed"]:
            report({"event": "failed cell", "line": step["line"], **outcome})
    answers.finish()
    report({"event": "end"})
    sys.stderr.flush()
    os._exit(0)  # threads and exit handlers of the lesson's libraries have nothing more to do here


class _Answers:
    """The forked answers: at most `plan["jobs"]` at once, each ended by its own alarm clock."""

    def __init__(self, shell: InteractiveShell, plan: Json, scratch: Path, report: "_Report") -> None:
        self.shell, self.plan, self.scratch, self.report = shell, plan, scratch, report
        self.running: dict[int, tuple[Json, Path, float]] = {}

    def start(self, variant: Json, place: int) -> None:
        while len(self.running) >= self.plan["jobs"]:
            self._wait()
        diary = self.scratch / f"{variant['id']}.jsonl"
        gc.collect()
        gc.freeze()  # else the child's first collection would copy every page it looks at
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._live(variant, place, diary)
        gc.unfreeze()
        self.running[pid] = (variant, diary, time.monotonic())

    def finish(self) -> None:
        while self.running:
            self._wait()

    def _wait(self) -> None:
        """Wait for one answer to end; only for our own, since the lesson may wait for children of its own."""
        while True:
            for pid in self.running:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    return self._finished(pid, os.waitstatus_to_exitcode(status))
            time.sleep(0.01)

    def _finished(self, pid: int, code: int) -> None:
        variant, diary, started = self.running.pop(pid)
        lines = diary.read_text(encoding="utf-8").split("\n") if diary.exists() else [""]
        notes = [json.loads(line) for line in lines[:-1]]  # a killed process may leave half a line at the end
        complete = bool(notes) and "complete" in notes[-1]
        self.report(
            {
                "event": "answer",
                "id": variant["id"],
                "ended": "" if complete else _ending(code),
                "seconds": time.monotonic() - started,
                "cell": notes[0] if notes else None,
                "checks": [note for note in notes if "id" in note],
            }
        )

    def _live(self, variant: Json, place: int, diary: Path) -> NoReturn:
        """The child: the answer in the exercise's place, then every cell up to the exercise's last check."""
        try:
            _set_alarms(self.plan["answer_seconds"])
            # A file, not a pipe: a process that the answer leaves behind cannot keep the parent waiting for its end.
            with diary.open("w", encoding="utf-8") as notes:
                _note(notes, _run(self.shell, variant["source"]))
                for step in self.plan["steps"][place + 1 : variant["last"] + 1]:
                    outcome = _run(self.shell, step["source"])  # a demo that a wrong answer breaks is passed over
                    if step["check"] in variant["checks"]:
                        _note(notes, {"id": step["check"], **outcome})
                _note(notes, {"complete": True})
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(70)


class _Report:
    """Writes events to the process's real stdout."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def __call__(self, event: Json) -> None:
        _note(self.stream, event)


def _note(stream: TextIO, data: Json) -> None:
    stream.write(json.dumps(data) + "\n")
    stream.flush()


def _take_stdout() -> _Report:
    """Keep stdout for events; from here on what the lesson prints, also from C code, goes nowhere."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return _Report(events)


def _start_shell() -> InteractiveShell:
    config = Config()
    config.HistoryManager.enabled = False  # its writer is a thread, and no history is wanted
    config.DisplayFormatter.active_types = ["text/plain"]  # drawing figures is `course run`'s work
    shell: InteractiveShell = _Shell.instance(config=config)
    return shell


def _run(shell: InteractiveShell, source: str) -> Json:
    """Run one cell: whether it passed, its exception, what it wrote to stderr, whether it ended in a value."""
    with tempfile.TemporaryFile() as captured:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            result = shell.run_cell(source, store_history=False)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
        captured.seek(0)
        stderr = captured.read(_MESSAGE_CHARACTERS).decode(errors="replace")
    error = result.error_before_exec or result.error_in_exec
    return {
        "passed": error is None,
        "error": type(error).__name__ if error is not None else "",
        "message": _message(error)[:_MESSAGE_CHARACTERS] if error is not None else "",
        "stderr": stderr,
        "value": _shows_value(result),
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as broken:  # the learner's own exception class may be at fault
        return f"(its message cannot be made: {type(broken).__name__})"


def _shows_value(result: ExecutionResult) -> bool:
    return result.result is not None


def _set_alarms(seconds: float) -> None:
    """Have the system kill this process after `seconds` of processor time, which a busy machine does not change.

    The clock ends what waits without working, such as for a lock, later.
    """
    for timer, alarm, limit in (
        (signal.ITIMER_PROF, signal.SIGPROF, seconds),
        (signal.ITIMER_REAL, signal.SIGALRM, _CLOCK_FACTOR * seconds),
    ):
        signal.signal(alarm, signal.SIG_DFL)
        signal.setitimer(timer, limit)


def _ending(code: int) -> str:
    if code in (-signal.SIGALRM, -signal.SIGPROF):
        return "timed out"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended its process with exit code {code}"


if __name__ == "__main__":
    main(sys.argv[1])
