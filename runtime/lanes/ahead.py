"""Tasks that go on when they are issued: a lane of the drive asks for the next slot before the last piece of one is there."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from runtime.lanes.backend import Backend, Marker
from runtime.lanes.clock import LaneClock
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import Task

# Of a lane at a time. One fills the drive while another ends; more would only wait.
MOST = 2


class Going(Protocol):
    """The work of a task that is issued."""

    def then(self, told: Callable[[BaseException | None], None]) -> None:
        """Tell somebody, once, that it has ended, and with which error: in any thread, or at once."""


@dataclass(eq=False)
class _Issued:
    task: Task
    start: Marker | None  # None: where the one before ends
    fail: Callable[[BaseException], None]
    over: bool = False
    error: BaseException | None = None


class Ahead:
    """Tasks of one lane that are issued and go on. They end in the order in which they were issued, whichever is ready first:
    for all others the lane runs one task after the other.
    """

    def __init__(self, backend: Backend, kind: LaneKind, clock: LaneClock) -> None:
        self._backend = backend
        self._kind = kind
        self._clock = clock
        self._going: deque[_Issued] = deque()
        self._changed = threading.Condition()

    def wait_for_room(self, task: Task) -> None:
        """Wait until a task may be issued: before one that it shares a slot with has ended, it may not."""
        slots = _slots(task)
        with self._changed:
            self._changed.wait_for(
                lambda: len(self._going) < MOST and all(slots.isdisjoint(_slots(issued.task)) for issued in self._going)
            )

    def issued(self, task: Task, start: Marker, going: Going, fail: Callable[[BaseException], None]) -> None:
        """A task goes on; the lane's clock is told when it and those before it are over. fail: told why it is not."""
        with self._changed:
            entry = _Issued(task, None if self._going else start, fail)
            self._going.append(entry)
        going.then(lambda error: self._ended(entry, error))

    def wait(self) -> None:
        """Until nothing goes on any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._going)

    def _ended(self, entry: _Issued, error: BaseException | None) -> None:
        with self._changed:  # protects the order: threads that end pieces come in any
            entry.over, entry.error = True, error
            end = self._backend.mark(self._kind)
            while self._going and self._going[0].over:
                first = self._going[0]
                if first.error is not None:
                    first.fail(first.error)
                else:
                    assert first.start is not None, "the first one has begun"
                    self._clock.advance(first.start, end)
                self._going.popleft()
                if self._going:
                    self._going[0].start = self._going[0].start or end
            self._changed.notify_all()


def _slots(task: Task) -> set[tuple[str, int]]:
    return {(access.pool, access.slot) for access in task.accesses}
