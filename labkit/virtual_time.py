"""asyncio on a clock that jumps: a program that waits for minutes runs in milliseconds, and always in the same order.

When nothing is ready to run, the loop does not wait for the next timer: it sets its clock to it. What a program
measures with `loop.time()` is then exact, and a program that would wait for ever is told so.
"""

import asyncio
import selectors
import sys
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any, TypeVar

from labkit.threads import in_thread

T = TypeVar("T")

TURNS = 200_000
"""Turns of the loop without any progress of the clock after which a program counts as stuck."""

CALLS = 5_000_000
"""Calls and returns within one turn after which it does, too; 32 tokens of `generate` make 200,000."""

_CIRCLES = "a task goes round in circles without waiting for anything"


class StuckError(RuntimeError):
    """Every task waits for something that will not happen, or one never waits for anything."""


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run an async function to its end on a clock that starts at 0, and return what it returns.

    It runs in a thread of its own, since a notebook's loop is running already. Threads and
    sockets have no place in a simulated time: the program may wait for timers and for its own tasks only.

    Raises `StuckError` when it would never end.
    """
    return in_thread(lambda: _run(main))


class _Clock(selectors.SelectSelector):
    """A selector that moves the time on instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self._turns = 0
        self._calls = 0
        self._stuck = "every task waits for something that will never happen"

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError(self._stuck)
        self._calls = 0
        self._turns = 0 if timeout > 0 else self._turns + 1
        if self._turns > TURNS:
            raise StuckError(_CIRCLES)
        self.now += max(timeout, 0.0)
        return []

    def count_call(self, frame: FrameType, event: str, argument: object) -> None:
        """A profile function that stops a task which never gives the loop its turn."""
        self._calls += 1
        if self._calls > CALLS:
            self._stuck = _CIRCLES  # the error may end in that task, and the rest of the program wait for it
            raise StuckError(_CIRCLES)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: _Clock) -> None:
        self._clock = clock
        super().__init__(clock)

    def time(self) -> float:
        return self._clock.now


def _run(main: Callable[[], Awaitable[T]]) -> T:
    clock = _Clock()
    loop = _Loop(clock)
    asyncio.set_event_loop(loop)
    sys.setprofile(clock.count_call)  # of this thread only, which ends with the program
    try:
        return loop.run_until_complete(main())
    finally:
        sys.setprofile(None)
        try:
            _end(loop)
        finally:
            asyncio.set_event_loop(None)
            loop.close()


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left, so that nothing complains when it is collected."""
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    try:
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
    except StuckError:
        for task in left:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
