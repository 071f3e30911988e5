"""Servers for as long as a `with` block: a program in a process of its own, or an ASGI application of this notebook.

All of them listen on the loopback. None outlives its block: a program runs under `labkit.supervisor`, which ends it,
and whatever it has started, even when this interpreter is killed.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import uvicorn

_SUPERVISOR = Path(__file__).with_name("supervisor.py")
_LOG_SHOWN = 2_000
"""Characters of a server's log in an error."""


class ServerError(RuntimeError):
    """A server did not start, or did not stop; the message holds what it wrote."""


def free_port() -> int:
    """A port of the loopback that nobody listens on now. Another process may take it first; then start again."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


class Process:
    """A program that runs under a supervisor."""

    def __init__(self, supervisor: "subprocess.Popen[str]", log: Path, pid: int) -> None:
        self._supervisor, self._log = supervisor, log
        self.pid = pid
        """The program's process id."""
        self.returncode: int | None = None
        """None while it runs; minus the signal's number when a signal ended it."""
        self._written: str | None = None

    def log(self) -> str:
        """What it has written to stdout and stderr so far."""
        if self._written is not None:
            return self._written
        return self._log.read_text(encoding="utf-8", errors="replace")

    def stop(self) -> int:
        """Ask it to end (SIGTERM), wait, and return its exit code. A second call returns the same."""
        if self.returncode is None:
            assert self._supervisor.stdin is not None
            # A word, since the end of the pipe is not seen while a fork of this process holds it open.
            with contextlib.suppress(BrokenPipeError):  # it has ended by itself
                os.write(self._supervisor.stdin.fileno(), b"stop\n")
            return self.wait()
        return self.returncode

    def wait(self) -> int:
        """Wait until it has ended by itself, and return its exit code."""
        if self.returncode is None:
            assert self._supervisor.stdout is not None
            self.returncode = int(self._supervisor.stdout.readline().removeprefix("exit "))
            self._supervisor.wait()
            self._written = self.log()
        return self.returncode


@contextmanager
def process(
    command: Sequence[str | Path],
    *,
    ready: str | Callable[[], bool],
    seconds: float = 60,
    grace: float = 10,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
) -> Iterator[Process]:
    """Start a server program, wait until it answers, and end it with the block, with all that it has started.

    `ready` is a URL that then answers with a status below 400, or a function that returns whether it is ready. `env` is
    added to this process's environment. "python" as the program is this interpreter. When the block ends the program
    gets SIGTERM and, after `grace` seconds, SIGKILL.

    Raises `ServerError`, with what the program wrote, when it cannot start, ends early, or is not ready in `seconds`.
    """
    with tempfile.TemporaryDirectory(prefix="server-") as folder:
        log = Path(folder) / "log"
        program = sys.executable if command[0] == "python" else str(command[0])
        supervisor = subprocess.Popen(
            [sys.executable, str(_SUPERVISOR), str(grace), str(log), program, *map(str, command[1:])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        with supervisor.stdin, supervisor.stdout:
            word, _, rest = supervisor.stdout.readline().strip().partition(" ")
            if word != "pid":
                supervisor.wait()
                raise ServerError(f"{program} cannot be started: {rest or 'the supervisor ended'}")
            running = Process(supervisor, log, int(rest))
            try:
                _wait_until(ready, seconds, running)
                yield running
            finally:
                running.stop()


class Application:
    """An ASGI application that is being served."""

    def __init__(self, url: str, records: list[str]) -> None:
        self.url = url
        """Where it listens, such as http://127.0.0.1:40123."""
        self._records = records

    def log(self) -> str:
        """What the server has logged so far: warnings and errors, with the traceback of a request that failed."""
        return "\n".join(self._records)


@contextmanager
def serving(app: object, *, seconds: float = 30) -> Iterator[Application]:
    """Serve an ASGI application (FastAPI, Starlette) of this interpreter by uvicorn on a free port of the loopback.

    The server runs in a thread that ends with the block, after the requests that are under way. What an application
    logs through uvicorn is kept for `log()` and does not reach stderr.

    Raises `ServerError` when the application does not start or does not stop in `seconds`.
    """
    records: list[str] = []
    logger = logging.getLogger("uvicorn.error")
    handler = _Kept(records)
    kept = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    listening = socket.socket()
    try:
        listening.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=int(seconds))  # type: ignore[arg-type]
        server = uvicorn.Server(config)
        thread = threading.Thread(target=_run, args=(server, listening, records), daemon=True)
        thread.start()
        deadline = time.monotonic() + seconds
        while not server.started and thread.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        try:
            if not server.started:
                raise ServerError("the application did not start: " + "\n".join(records)[-_LOG_SHOWN:])
            yield Application(f"http://127.0.0.1:{listening.getsockname()[1]}", records)
        finally:
            server.should_exit = True
            thread.join(2 * seconds)
        if thread.is_alive():
            raise ServerError(f"the application did not stop within {2 * seconds:g} seconds")
    finally:
        listening.close()
        logger.removeHandler(handler)
        logger.propagate, level = kept
        logger.setLevel(level)


class _Kept(logging.Handler):
    def __init__(self, records: list[str]) -> None:
        super().__init__()
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(self.format(record))


def _run(server: uvicorn.Server, listening: socket.socket, records: list[str]) -> None:
    try:
        server.run(sockets=[listening])
    except SystemExit as end:  # so uvicorn says that the application refused to start
        records.append(f"uvicorn ended with exit code {end.code}")


def _wait_until(ready: str | Callable[[], bool], seconds: float, running: Process) -> None:
    deadline = time.monotonic() + seconds
    while not (_answers(ready) if isinstance(ready, str) else ready()):
        if running._supervisor.poll() is not None:
            raise ServerError(f"the server ended with exit code {running.wait()}: {running.log()[-_LOG_SHOWN:]}")
        if time.monotonic() > deadline:
            raise ServerError(f"the server was not ready after {seconds:g} s: {running.log()[-_LOG_SHOWN:]}")
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).status_code < 400
    except httpx.HTTPError:
        return False
