"""The engine as a SimPy model, one process per lane: what `engine` must agree with, span for span.

Slower and simpler: each lane is a process that reads like the rule it follows. Tests and `planner simulate --verify` run it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from simpy import Environment, Event
from simpy.core import EmptySchedule

from simulator.costs import TaskCost
from simulator.engine import LONG_AGO, UNKNOWN, Entry, deadlock, entries
from simulator.fluid import FluidPool
from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.sharing import Resource


class _Step(NamedTuple):
    """Absolute times of one step's tasks, by number."""

    starts: list[int]
    ends: list[int]
    awaited: dict[int, list[Event]]  # task -> events of lanes that wait to know its end

    @classmethod
    def of(cls, times: list[int]) -> _Step:
        """A step with these times as starts and as ends."""
        return cls(times.copy(), times.copy(), {})


class SimPyEngine:
    """A run of at most `steps` steps."""

    def __init__(
        self,
        graph: TaskGraph,
        costs: Sequence[TaskCost],
        capacities: Mapping[Resource, int],
        steps: int,
        handoffs: Handoffs = IMMEDIATE,
    ) -> None:
        queues, draws = entries(graph, costs, handoffs)
        self._graph = graph
        self._env = Environment(initial_time=0)
        self._steps: list[_Step] = []
        self._open_lanes: list[int] = []  # per step
        self._completed = 0
        self._taken = 0
        self._waits: dict[Lane, tuple[int, int, int]] = {}  # lane -> task, what it waits for, in which step
        self._pool = FluidPool(self._env, draws, capacities)
        for lane, queue in queues.items():
            self._env.process(self._lane(lane, queue, steps))

    def next_step(self) -> tuple[list[int], list[int]]:
        """Run until the next step is complete; its absolute starts and ends by task number. Raises DeadlockError."""
        try:
            while self._completed == self._taken:
                self._env.step()
        except EmptySchedule:
            # The waits that nothing will end: a lane that ran would have left an event in the schedule.
            stuck = {lane: wait for lane, wait in self._waits.items() if self._steps[wait[2]].ends[wait[1]] == UNKNOWN}
            raise deadlock(self._graph, int(self._env.now), stuck) from None
        step = self._steps[self._taken]
        self._taken += 1
        return step.starts, step.ends

    def _lane(self, lane: Lane, queue: list[Entry], steps: int) -> Generator[Event, None, None]:
        env, pool = self._env, self._pool
        clock = 0
        before = _Step.of([LONG_AGO] * len(self._graph.tasks))
        for step in range(steps):
            if step == len(self._steps):
                self._open_step()
            this = self._steps[step]
            by_distance = this, before
            for number, duration_ns, draw, dependencies in queue:
                for dependency, distance, later_ns in dependencies:
                    depended = by_distance[distance]
                    if depended.ends[dependency] == UNKNOWN:
                        self._waits[lane] = number, dependency, step - distance
                        yield self._end_known(depended, dependency)
                    clock = max(clock, depended.ends[dependency] + later_ns)
                this.starts[number] = clock
                if draw is None:
                    clock += duration_ns
                else:
                    if clock > env.now:
                        yield env.timeout(clock - env.now)
                    yield pool.start(duration_ns, draw)
                    clock = int(env.now)
                this.ends[number] = clock
                for event in this.awaited.pop(number, ()):
                    event.succeed()
            if clock > env.now:
                yield env.timeout(clock - env.now)
            self._open_lanes[step] -= 1
            self._completed += self._open_lanes[step] == 0
            before = this

    def _open_step(self) -> None:
        tasks = len(self._graph.tasks)
        self._steps.append(_Step.of([UNKNOWN] * tasks))
        self._open_lanes.append(len(self._graph.lanes))

    def _end_known(self, step: _Step, number: int) -> Event:
        event = self._env.event()
        step.awaited.setdefault(number, []).append(event)
        return event
