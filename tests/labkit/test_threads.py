"""What a call in a thread returns or raises comes back, and the thread is gone."""

import asyncio
import threading

import pytest

from labkit.threads import in_thread


def test_a_result_comes_back_from_another_thread() -> None:
    before = threading.active_count()
    assert in_thread(threading.get_ident) != threading.get_ident()
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", [LookupError, TimeoutError, asyncio.CancelledError, SystemExit])
def test_an_exception_is_raised_here(kind: type[BaseException]) -> None:
    def fails() -> None:
        raise kind("no")

    before = threading.active_count()
    with pytest.raises(kind):
        in_thread(fails)
    assert threading.active_count() == before


def test_an_event_loop_runs_beside_one_that_is_running() -> None:
    async def inner() -> int:
        await asyncio.sleep(0)
        return 7

    async def outer() -> int:
        return in_thread(lambda: asyncio.run(inner()))

    assert asyncio.run(outer()) == 7
