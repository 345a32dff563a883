"""Whether lanes still move. A run that hangs ends, and says what is stuck."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from runtime.lanes.backend import Backend
from runtime.lanes.clock import Hung, LaneClock, Walk
from runtime.lanes.helpers import Helper
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.tasks import Dependency
from slideplan.quantities import format_ns

LOOK_NS = 1_000_000_000
# The first steps compile kernels. One task may compile several, on cores that others use: minutes, in which no lane moves.
LEAST_PATIENCE_NS = 600 * 1_000_000_000
# Lanes that the drive may hold up.
DRIVE_LANES = (LaneKind.SSD_READ, LaneKind.SSD_WRITE)
# No task takes longer than its step. A busy machine slows a step down by some times, but never by so many.
PATIENCE_STEPS = 10


def patience_ns(step_ns: int) -> int:
    """How long no lane may move where a step is predicted to take so long."""
    return max(LEAST_PATIENCE_NS, PATIENCE_STEPS * step_ns)


class Answers(Protocol):
    """How often a drive has answered, and for which files it was asked and has not."""

    @property
    def answers(self) -> int: ...

    @property
    def unanswered(self) -> list[str]: ...


class Looks:
    """Time as far as somebody looks: this process may have been stopped meanwhile, and what it waits for with it."""

    def __init__(self) -> None:
        self._looked_ns = time.perf_counter_ns()

    def since_ns(self) -> int:
        """What counts of the time since the last look. 0: that was less than LOOK_NS ago, and this is none."""
        now_ns = time.perf_counter_ns()
        since_ns = now_ns - self._looked_ns
        if since_ns < LOOK_NS:
            return 0
        self._looked_ns = now_ns
        return min(since_ns, 2 * LOOK_NS)


class Watchdog:
    """Looks at the lanes' clocks, by one thread at a time: a lane moves when a task is issued or over.

    planned_ns: how long each task of the graph is predicted to take, if messages are to say so.
    drive:      moves lanes, too, each time it answers; None: there is none
    """

    def __init__(
        self,
        walk: Walk,
        backend: Backend,
        clocks: Mapping[Lane, LaneClock],
        threads: Mapping[Lane, Helper],
        patience_ns: int,
        planned_ns: Sequence[int] | None,
        drive: Answers | None = None,
    ) -> None:
        self._walk = walk
        self._backend = backend
        self._clocks = clocks
        self._threads = threads
        self._patience_ns = patience_ns
        self._planned_ns = planned_ns
        self._drive = drive
        self._answers = 0
        self._looks = Looks()
        self._issued = dict.fromkeys(clocks, 0)
        self._over = dict.fromkeys(clocks, 0)
        self._still_ns = dict.fromkeys(clocks, 0)

    def look(self) -> None:
        """Raise Hung where no lane has moved for too long. To be called often; looks once in LOOK_NS."""
        since_ns = self._looks.since_ns()
        if since_ns == 0:
            return
        answered = self._drive is not None and self._answers != self._drive.answers
        if self._drive is not None:
            self._answers = self._drive.answers
        for lane, clock in self._clocks.items():
            before = self._issued[lane], self._over[lane]
            self._issued[lane], self._over[lane] = clock.issued, clock.over(self._backend)
            still = before == (self._issued[lane], self._over[lane]) and not answered
            self._still_ns[lane] = self._still_ns[lane] + since_ns if still else 0
        if min(self._still_ns.values()) > self._patience_ns:
            raise Hung(self._stuck())

    def _stuck(self) -> str:
        """The first tasks that are not over, of lanes that have not ended: those that wait for no other, if there are any."""
        awaited = {
            lane: list(self._awaited(lane))
            for lane, thread in self._threads.items()
            if not thread.wait(0) or self._over[lane] < self._issued[lane]
        }
        stuck = [self._still(lane) for lane, dependencies in awaited.items() if not dependencies]
        return "; ".join(stuck or [self._waiting(lane, dependencies[0]) for lane, dependencies in awaited.items()])

    def _awaited(self, lane: Lane) -> Iterator[Dependency]:
        """What the lane's first task that is not over still has to wait for."""
        graph = self._walk.graph
        step, number = self._walk.task(lane, self._over[lane])
        for dependency in graph.tasks[number].dependencies:
            before = step - dependency.distance
            if before >= 0 and self._over[graph.lane_of[dependency.task]] <= self._walk.position(dependency.task, before):
                yield dependency

    def _where(self, lane: Lane) -> str:
        step, number = self._walk.task(lane, self._over[lane])
        return self._walk.where(lane, step, self._walk.graph.tasks[number])

    def _still(self, lane: Lane) -> str:
        _, number = self._walk.task(lane, self._over[lane])
        planned = "" if self._planned_ns is None else f" (planned: {format_ns(self._planned_ns[number])})"
        asked = "" if self._drive is None or lane.kind not in DRIVE_LANES else ", ".join(self._drive.unanswered)
        unanswered = f"; the drive does not answer, asked for {asked}" if asked else ""
        return f"{self._where(lane)}: has not moved for {format_ns(self._still_ns[lane])}{planned}{unanswered}"

    def _waiting(self, lane: Lane, dependency: Dependency) -> str:
        other = self._walk.graph.tasks[dependency.task]
        before = " of the step before" if dependency.distance else ""
        return f"{self._where(lane)}: waits for {other.name}{before} on lane {other.lane}"
