"""Threads beside the main one: lanes, and those that ask the drive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

# One that is in no call of the system needs milliseconds to end.
GRACE_NS = 1_000_000_000


class Helper(threading.Thread):
    """A thread that the process does not wait for at its end: the drive or the device may hold it up for ever.

    It is waited for by `wait`. `join` and `is_alive` take a thread for ended once a signal has interrupted them (as of Python
    3.11).
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self.idle = False  # it waits for work, and for neither drive nor device
        self._work = work
        self._over = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        finally:
            self._over.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait so long at most, None: as long as it takes. Whether it has ended, or was never started."""
        if self.ident is None:  # an interrupt came first
            return True
        if not self._over.wait(seconds):
            return False
        self.join()  # it is at its end
        return True


def helpers(name: str, count: int, work: Callable[[], None]) -> list[Helper]:
    """So many that do the same work."""
    return [Helper(f"{name}-{number}", work) for number in range(count)]


def held_up() -> bool:
    """Whether a helper has not ended, though nobody waits for it any more. One that is idle holds nothing."""
    return any(isinstance(thread, Helper) and not thread.idle for thread in threading.enumerate())


def idle(wait: Callable[[], T]) -> T:
    """What a helper gets that waits for work until there is some."""
    thread = threading.current_thread()
    assert isinstance(thread, Helper), "helpers alone wait for work"
    thread.idle = True
    try:
        return wait()
    finally:
        thread.idle = False


def grace_ends_ns() -> int:
    """Until when, by `perf_counter_ns`, those may take that are told now to end."""
    return time.perf_counter_ns() + GRACE_NS


def ended(threads: Iterable[Helper], by_ns: int) -> bool:
    """Wait for helpers that were told to end, until then at most. Whether all have ended."""
    return all(thread.wait(max(0, by_ns - time.perf_counter_ns()) / 1e9) for thread in threads)
