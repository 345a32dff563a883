"""How lanes wait for each other: one counter per lane, for a lane is a FIFO."""

from __future__ import annotations

import threading

from runtime.lanes.backend import Marker


class RunError(RuntimeError):
    """A run cannot go on."""


class LaneError(RunError):
    """A task failed. Names lane, step, task and unit; the cause is chained."""


class Stopped(Exception):  # noqa: N818 - control flow, not an error
    """Another lane failed; this one ends."""


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
        self._signal = signal
        signal.watch(self)

    def advance(self, start: Marker, end: Marker) -> None:
        """The lane's next task is issued."""
        with self._changed:
            self._markers[self._issued] = start, end
            self._issued += 1
            self._changed.notify_all()

    def wait(self, position: int) -> tuple[Marker, Marker]:
        """Markers of the lane's task at this position, once it is issued. Raises Stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._issued > position or self._signal.error is not None)
            if self._issued <= position:
                raise Stopped
            return self._markers[position]

    def forget(self, below: int) -> None:
        """Drop markers of positions below this one: nobody will wait for them again."""
        with self._changed:
            for position in [p for p in self._markers if p < below]:
                del self._markers[position]

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
