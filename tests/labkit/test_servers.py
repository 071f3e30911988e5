"""No server, and nothing that a server has started, outlives its block or its interpreter."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from fastapi import FastAPI

from labkit import servers

SERVER = """
import subprocess, sys, signal, time
from http.server import HTTPServer, SimpleHTTPRequestHandler
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
HTTPServer(("127.0.0.1", int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()
"""


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is sure to come; the bound only ends a test that fails."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_closed(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


def child_of(log: str) -> int:
    return int(log.split("child ")[1].split()[0])


@pytest.mark.parametrize(("manner", "code"), [("polite", 7), ("stubborn", -signal.SIGKILL)])
def test_a_program_and_what_it_started_end_with_the_block(tmp_path: Path, manner: str, code: int) -> None:
    port = servers.free_port()
    with servers.process(
        ["python", "-c", SERVER, str(port), manner], ready=f"http://127.0.0.1:{port}", grace=0.3, cwd=tmp_path
    ) as running:
        child = child_of(running.log())
        assert not is_gone(running.pid)
        assert not is_gone(child)
        assert running.returncode is None
    assert running.returncode == code
    assert running.stop() == code
    assert is_gone(running.pid)
    assert is_gone(child)
    assert is_closed(port)


def test_an_error_in_the_block_ends_the_program_too(tmp_path: Path) -> None:
    port = servers.free_port()
    seen: list[int] = []

    def fail() -> None:
        with servers.process(
            ["python", "-c", SERVER, str(port)], ready=f"http://127.0.0.1:{port}", cwd=tmp_path
        ) as running:
            seen.extend((running.pid, child_of(running.log())))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert len(seen) == 2
    assert all(map(is_gone, seen))


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
def test_a_program_ends_when_its_lesson_is_killed(tmp_path: Path, sent: signal.Signals) -> None:
    """Also in the midst of a check that forked: the fork keeps the supervisor's pipe open."""
    port = servers.free_port()
    lesson = textwrap.dedent(
        f"""
        import os, signal, time
        from labkit import servers
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with servers.process(["python", "-c", {SERVER!r}, "{port}"], ready="http://127.0.0.1:{port}") as running:
            fork = os.fork()
            if fork:
                print(running.pid, running.log().split("child ")[1].split()[0], fork, flush=True)
            time.sleep(600)
        """
    )
    with subprocess.Popen(
        [sys.executable, "-c", lesson], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(servers.__file__).parents[1])},
    ) as running:  # fmt: skip
        assert running.stdout is not None
        program, child, fork = map(int, running.stdout.readline().split())
        assert not is_gone(program)
        running.send_signal(sent)
        running.wait()
        until(lambda: is_gone(program) and is_gone(child) and is_closed(port))
        os.kill(fork, signal.SIGKILL)


def test_a_program_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(servers.ServerError, match="No such file"), servers.process(["no-such-program"], ready="x"):
        pass
    with (
        pytest.raises(servers.ServerError, match=r"exit code 3: the disk is full"),
        servers.process(
            ["python", "-c", "import sys; print('the disk is full'); sys.exit(3)"], ready="http://127.0.0.1:9"
        ),
    ):
        pass
    with (
        pytest.raises(servers.ServerError, match=r"not ready after 0\.2 s: thinking"),
        servers.process(
            ["python", "-c", "print('thinking', flush=True); import time; time.sleep(600)"],
            ready=lambda: False,
            seconds=0.2,
        ),
    ):
        pass


def test_a_program_that_ends_by_itself_can_be_waited_for() -> None:
    with servers.process(["python", "-c", "input()"], ready=lambda: True) as running:
        assert running.wait() == 1  # its stdin is empty
        assert running.stop() == 1
    assert "EOFError" in running.log()


def test_a_program_that_was_killed_from_outside_is_no_error_of_the_block() -> None:
    with servers.process(["python", "-c", "import time; time.sleep(600)"], ready=lambda: True) as running:
        os.kill(running.pid, signal.SIGKILL)
        until(lambda: is_gone(running.pid))
        until(lambda: running._supervisor.poll() is not None)
    assert running.returncode == -signal.SIGKILL


def test_an_application_is_served_and_stops_with_the_block() -> None:
    app = FastAPI()

    @app.get("/double/{number}")
    def double(number: int) -> int:
        return 2 * number

    @app.get("/broken")
    def broken() -> None:
        raise KeyError("the drawer is empty")

    with servers.serving(app) as served:
        assert httpx.get(f"{served.url}/double/21").json() == 42
        assert httpx.get(f"{served.url}/broken").status_code == 500
        until(lambda: "the drawer is empty" in served.log())  # logged after the reply was sent
    assert is_closed(int(served.url.rpartition(":")[2]))


def test_an_application_that_does_not_start_says_why() -> None:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        raise OSError("the model is missing")
        yield

    with pytest.raises(servers.ServerError, match="the model is missing"), servers.serving(FastAPI(lifespan=lifespan)):
        pass


def test_an_error_beside_an_application_passes_and_stops_it() -> None:
    urls: list[str] = []

    def fail() -> None:
        with servers.serving(FastAPI()) as served:
            urls.append(served.url)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert is_closed(int(urls[0].rpartition(":")[2]))
