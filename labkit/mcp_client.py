"""Tools of an MCP server, called from ordinary code: a real client and session, for as long as a `with` block.

The SDK's client is asynchronous. Its event loop runs in a thread of its own that ends with the block, and with it the
server's process, if there is one; so this works in a notebook, whose own loop is busy, as in a script.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.server import MCPServer


class ToolFailedError(RuntimeError):
    """The server says that a call failed; the message is the server's."""


class ServerError(RuntimeError):
    """The server did not start or broke off; the message holds what it wrote to stderr."""


class Session:
    """An open session with a server."""

    def __init__(self, portal: BlockingPortal, client: Client) -> None:
        self._portal, self._client = portal, client

    def tools(self) -> dict[str, Any]:
        """The server's tools by name, with `description` and `input_schema` (a JSON schema)."""
        return {tool.name: tool for tool in self._portal.call(self._client.list_tools).tools}

    def call(self, tool: str, /, **arguments: object) -> str:
        """The text that a tool returns. Raises `ToolFailedError` with the server's message when the call failed."""
        result = self._portal.call(self._client.call_tool, tool, arguments)
        text = "\n".join(part.text for part in result.content if part.type == "text")
        if result.is_error:
            raise ToolFailedError(text)
        return text


@contextmanager
def connected(server: MCPServer | StdioServerParameters, *, seconds: float = 60) -> Iterator[Session]:
    """A session with a server object in this process, or with a program that is started and speaks over its stdin.

    A server that does not answer within `seconds` raises an error instead of waiting for ever. Raises `ServerError`
    when there is no session, with what the program wrote to stderr.
    """
    broken: BaseException | None = None
    with tempfile.TemporaryFile("w+") as said:  # a notebook's own stderr is no file that a program could write to
        target = server if isinstance(server, MCPServer) else stdio_client(server, errlog=said)
        try:
            with start_blocking_portal() as portal:
                client = Client(target, read_timeout_seconds=seconds)
                with portal.wrap_async_context_manager(client):
                    try:
                        yield Session(portal, client)
                    except BaseException as error:  # raised below as it is; the session would wrap it into a group
                        broken = error
        except Exception as error:
            said.seek(0)
            raise ServerError(f"no session with the server: {said.read().strip() or error}") from error
    if broken is not None:
        raise broken
