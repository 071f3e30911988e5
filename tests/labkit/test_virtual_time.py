"""The clock jumps, what would hang is told so, and nothing is left behind."""

import asyncio
import logging
import threading
import time

import pytest

from labkit import virtual_time


def test_an_hour_passes_at_once_and_the_clock_is_exact() -> None:
    async def main() -> list[float]:
        loop = asyncio.get_running_loop()
        seen = [loop.time()]

        async def note(seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append(loop.time())

        await asyncio.gather(note(3600), note(0.1), note(7))
        return seen

    started = time.monotonic()
    assert virtual_time.run(main) == [0.0, 0.1, 7.0, 3600.0]
    assert time.monotonic() - started < 60


def test_a_timeout_comes_at_its_time() -> None:
    async def main() -> float:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.Event().wait(), 2.5)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main) == pytest.approx(2.5)


async def for_ever() -> None:
    await asyncio.Event().wait()


async def in_circles() -> None:
    while True:
        await asyncio.sleep(0)


async def behind_a_task() -> None:
    task = asyncio.create_task(in_circles())
    await for_ever()
    await task


async def without_giving_way() -> None:
    event = asyncio.Event()
    event.set()
    while True:
        await event.wait()  # returns at once: the loop gets no turn


async def behind_one_that_does_not_give_way() -> None:
    task = asyncio.create_task(without_giving_way())
    task.add_done_callback(lambda done: done.exception())
    await for_ever()


@pytest.mark.parametrize(
    "main", [for_ever, in_circles, behind_a_task, without_giving_way, behind_one_that_does_not_give_way]
)
def test_what_never_ends_is_stuck(main, caplog: pytest.LogCaptureFixture) -> None:  # type: ignore[no-untyped-def]
    before = threading.active_count()
    with caplog.at_level(logging.WARNING), pytest.raises(virtual_time.StuckError):
        virtual_time.run(main)
    assert threading.active_count() == before
    assert not caplog.records


def test_who_waits_for_one_that_goes_in_circles_is_told_so() -> None:
    with pytest.raises(virtual_time.StuckError, match="in circles"):
        virtual_time.run(behind_one_that_does_not_give_way)


def test_who_refuses_to_be_cancelled_is_left() -> None:
    async def stubborn() -> None:
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                continue

    with pytest.raises(virtual_time.StuckError):
        virtual_time.run(stubborn)


def test_an_exception_is_raised_here() -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        raise LookupError("no")

    with pytest.raises(LookupError):
        virtual_time.run(main)


def test_it_runs_inside_a_running_loop() -> None:
    async def inner() -> float:
        await asyncio.sleep(5)
        return asyncio.get_running_loop().time()

    async def outer() -> float:
        return virtual_time.run(inner)

    assert asyncio.run(outer()) == 5.0
