"""A server's tools are listed and called in this process and in another, and nothing is left afterwards."""

import io
import sys
import threading
from pathlib import Path

import psutil
import pytest
from mcp import StdioServerParameters
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

from labkit.mcp_client import ServerError, ToolFailedError, connected

PROGRAM = """
from mcp.server import MCPServer

server = MCPServer("words", log_level="CRITICAL")


@server.tool()
def shout(word: str) -> str:
    "A word in capitals."
    return word.upper()


server.run()
"""


def words() -> MCPServer:
    server = MCPServer("words", log_level="CRITICAL")

    @server.tool()
    def shout(word: str) -> str:
        """A word in capitals."""
        if not word.isalpha():
            raise ToolError(f"{word!r} is no word")
        return word.upper()

    return server


def left_running(before: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that began since and do not end by themselves; one that was told to end may need a moment."""
    since = [thread for thread in threading.enumerate() if thread not in before]
    for thread in since:
        thread.join(timeout=10)
    return [thread for thread in since if thread.is_alive()]


def test_a_server_in_this_process_lists_and_runs_its_tools() -> None:
    before = set(threading.enumerate())
    with connected(words()) as session:
        tool = session.tools()["shout"]
        assert tool.description == "A word in capitals."
        assert tool.input_schema["required"] == ["word"]
        assert session.call("shout", word="yes") == "YES"
        with pytest.raises(ToolFailedError, match="'4' is no word"):
            session.call("shout", word="4")
        with pytest.raises(ToolFailedError, match="Field required"):
            session.call("shout")
    assert left_running(before) == []


def test_a_server_in_another_process_is_gone_afterwards(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(PROGRAM)
    before = set(psutil.Process().children())
    with connected(StdioServerParameters(command=sys.executable, args=[str(tmp_path / "server.py")])) as session:
        assert session.call("shout", word="yes") == "YES"
        started = set(psutil.Process().children()) - before
        assert started
    assert psutil.wait_procs(started, timeout=10)[1] == []


def test_an_error_in_the_block_comes_out_as_it_is() -> None:
    before = set(threading.enumerate())
    with pytest.raises(KeyError, match="mine"), connected(words()):
        raise KeyError("mine")
    assert left_running(before) == []


def test_a_program_that_does_not_start_says_why() -> None:
    broken = StdioServerParameters(command=sys.executable, args=["-c", "raise SystemExit('no such luck')"])
    with pytest.raises(ServerError, match="no such luck"), connected(broken, seconds=20):
        pass
    with pytest.raises(ServerError), connected(StdioServerParameters(command="/no/such/program", args=[])):
        pass


def test_a_program_needs_no_stderr_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # as in a notebook
    with connected(StdioServerParameters(command=sys.executable, args=[str(tmp_path / "server.py")])) as session:
        assert session.call("shout", word="yes") == "YES"
