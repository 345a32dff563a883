"""How lanes wait for each other: one counter per lane, for a lane is a FIFO."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from runtime.lanes.backend import Backend, Marker
from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import Task, TaskGraph


class RunError(RuntimeError):
    """A run cannot go on."""


class LaneError(RunError):
    """A task failed. Names lane, step, task and unit; the cause is chained."""


class Hung(LaneError):  # noqa: N818 - its base says that it is an error
    """No lane has moved for too long, or the drive has taken nothing of a save. Names what is stuck; what failed before, if
    anything did, is chained.

    What is stuck may still use its memory, so none may be given back, nor the device be waited for:
    after its message the command ends by `slideplan.entry.leave`.
    """


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """Another lane failed; this one ends."""


@dataclass(frozen=True, slots=True)
class Walk:
    """A graph walked step after step. A lane's tasks are numbered through all steps: their positions.

    first_step: what the first one is called by handlers and in messages.
    """

    graph: TaskGraph
    first_step: int

    def position(self, number: int, step: int) -> int:
        """Of a task of a step, in its lane."""
        return step * len(self.graph.lanes[self.graph.lane_of[number]]) + self.graph.lane_position[number]

    def task(self, lane: Lane, position: int) -> tuple[int, int]:
        """Step and number of the lane's task at this position."""
        queue = self.graph.lanes[lane]
        step, place = divmod(position, len(queue))
        return step, queue[place]

    def where(self, lane: Lane, step: int, task: Task | None) -> str:
        """How messages name it; None: no task has begun yet."""
        return f"lane {lane}, step {self.first_step + step}" + (f", task {task.name}, unit {task.unit}" if task else "")


class StopSignal:
    """Set once, by the first lane that fails; wakes everybody who waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clocks: list[LaneClock] = []
        self.error: BaseException | None = None

    def watch(self, clock: LaneClock) -> None:
        self._clocks.append(clock)

    def stop(self, error: BaseException) -> None:
        """Stop all lanes; the first error is the one that is reported."""
        with self._lock:
            if self.error is None:
                self.error = error
        for clock in self._clocks:
            clock.wake()


class LaneClock:
    """How far a lane has come: how many tasks it has issued since the first step, and their markers.

    On a stream "issued" means that the events stand in the stream, so that another stream can wait for
    them; on a host lane it means done.
    """

    def __init__(self, signal: StopSignal) -> None:
        self._changed = threading.Condition()
        self._markers: dict[int, tuple[Marker, Marker]] = {}
        self._issued = 0
        self._over = 0
        self._signal = signal
        signal.watch(self)

    def advance(self, start: Marker, end: Marker) -> None:
        """The lane's next task is issued."""
        with self._changed:
            self._markers[self._issued] = start, end
            self._issued += 1
            self._changed.notify_all()

    def wait(self, position: int, timeout_s: float | None = None) -> tuple[Marker, Marker]:
        """Markers of the lane's task at this position, once it is issued. Raises Stopped, or TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._issued > position or self._signal.error is not None, timeout_s):
                raise TimeoutError
            if self._issued <= position:
                raise Stopped
            return self._markers[position]

    @property
    def issued(self) -> int:
        """How many tasks."""
        return self._issued

    def over(self, backend: Backend) -> int:
        """How many tasks the device is through with, and with all if it has failed: why, says whoever waits for one.

        Never blocks. For the thread that may forget, and no other.
        """
        while True:
            with self._changed:
                if self._over == self._issued:
                    return self._over
                end = self._markers[self._over][1]
            try:
                if not backend.passed(end):
                    return self._over
            except Exception:
                pass
            self._over += 1

    def forget(self, below: int) -> None:
        """Drop markers of positions below this one: they are over, and nobody will wait for them again."""
        with self._changed:
            self._over = max(self._over, below)
            for position in [p for p in self._markers if p < below]:
                del self._markers[position]

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
