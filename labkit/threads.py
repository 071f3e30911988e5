"""A call in a thread of its own, for what can't run beside a notebook's event loop."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raise what it raises; its thread ends with it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
