"""The discrete-event engine: one SimPy process per lane, FIFO, on an integer nanosecond clock.

A task without demand ends at its start plus its duration, whatever else happens. Its lane therefore
publishes the end at once and works on in a time of its own, ahead of the environment's clock; it waits
for the clock where it draws on shared bandwidth, and at the end of each step.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

from simpy import Environment, Event
from simpy.core import EmptySchedule

from slideplan.plan.graph import Lane, TaskGraph
from slideplan.plan.sharing import Resource
from slideplan.plan.timeline import Span, first_compute
from slideplan.simulator.costs import TaskCost
from slideplan.simulator.fluid import Draw, FluidPool

MAX_STEPS = 64

# Under contention ends are rounded up to whole nanoseconds, so steps may repeat to within a few of them
# only. Two steps then count as equal when no span differs by more than this part of the step time.
STEADY_PARTS = 1_000_000

_UNKNOWN = -1


class DeadlockError(RuntimeError):
    """Every lane waits and nothing runs. Names, per stuck lane, the task and what it waits for."""


class _Entry(NamedTuple):
    """A task as its lane sees it; `draw` is its number in the pool's list, None without any."""

    number: int
    duration_ns: int
    draw: int | None
    dependencies: tuple[tuple[int, int], ...]  # task, distance


class _Step(NamedTuple):
    """Absolute times of one step's tasks, by number."""

    starts: list[int]
    ends: list[int]
    awaited: dict[int, list[Event]]  # task -> events of lanes that wait to know its end

    @classmethod
    def of(cls, times: list[int]) -> _Step:
        """A step with these times as starts and as ends."""
        return cls(times.copy(), times.copy(), {})


class _Engine:
    """A run of at most `steps` steps, taken one by one."""

    def __init__(self, graph: TaskGraph, costs: Sequence[TaskCost], capacities: Mapping[Resource, int], steps: int) -> None:
        if len(costs) != len(graph.tasks):
            raise ValueError(f"{len(costs)} costs for {len(graph.tasks)} tasks")
        self._graph = graph
        self._env = Environment(initial_time=0)
        self._steps: list[_Step] = []
        self._open_lanes: list[int] = []  # per step
        self._completed = 0
        self._taken = 0
        self._waits: dict[Lane, tuple[int, int, int]] = {}  # lane -> task, what it waits for, in which step
        draws, draw_of = _distinct_draws(costs)
        entries = [
            _Entry(number, cost.duration_ns, draw_of[id(cost)], tuple((d.task, d.distance) for d in task.dependencies))
            for number, (task, cost) in enumerate(zip(graph.tasks, costs, strict=True))
        ]
        self.contended = bool(draws)
        self._pool = FluidPool(self._env, draws, capacities)
        for lane, queue in graph.lanes.items():
            self._env.process(self._lane(lane, [entries[number] for number in queue], steps))

    def next_step(self) -> tuple[list[int], list[int]]:
        """Run until the next step is complete; its absolute starts and ends. Raises DeadlockError."""
        try:
            while self._completed == self._taken:
                self._env.step()
        except EmptySchedule:
            raise DeadlockError(self._stuck()) from None
        step = self._steps[self._taken]
        self._taken += 1
        return step.starts, step.ends

    def _lane(self, lane: Lane, queue: list[_Entry], steps: int) -> Generator[Event, None, None]:
        env, pool = self._env, self._pool
        clock = 0
        # Before the first step all is done: edges carried into it bind nothing.
        before = _Step.of([0] * len(self._graph.tasks))
        for step in range(steps):
            if step == len(self._steps):
                self._open_step()
            this = self._steps[step]
            by_distance = this, before
            for number, duration_ns, draw, dependencies in queue:
                for dependency, distance in dependencies:
                    depended = by_distance[distance]
                    if depended.ends[dependency] == _UNKNOWN:
                        self._waits[lane] = number, dependency, step - distance
                        yield self._end_known(depended, dependency)
                    clock = max(clock, depended.ends[dependency])
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
        self._steps.append(_Step.of([_UNKNOWN] * tasks))
        self._open_lanes.append(len(self._graph.lanes))

    def _end_known(self, step: _Step, number: int) -> Event:
        event = self._env.event()
        step.awaited.setdefault(number, []).append(event)
        return event

    def _stuck(self) -> str:
        """The waits that nothing will end: a lane that ran would have left an event in the schedule."""
        tasks = self._graph.tasks
        waits = [
            f"{lane}: {tasks[number].name} waits for {tasks[dependency].name} of step {step}"
            for lane, (number, dependency, step) in self._waits.items()
            if self._steps[step].ends[dependency] == _UNKNOWN
        ]
        return f"deadlock after {self._env.now} ns; " + "; ".join(sorted(waits))


def _distinct_draws(costs: Sequence[TaskCost]) -> tuple[list[Draw], dict[int, int | None]]:
    """Draws that differ, and for each cost object, by its id, the number of its own; None without any."""
    numbers: dict[tuple[frozenset[tuple[Resource, int]], float], int] = {}
    draw_of: dict[int, int | None] = {}
    for cost in costs:
        if id(cost) not in draw_of:
            drawn = frozenset((resource, rate) for resource, rate in cost.demand.items() if rate)
            flows = drawn and cost.duration_ns
            draw_of[id(cost)] = numbers.setdefault((drawn, cost.weight), len(numbers)) if flows else None
    return [Draw(dict(drawn), weight) for drawn, weight in numbers], draw_of


def trace(graph: TaskGraph, costs: Sequence[TaskCost], capacities: Mapping[Resource, int], steps: int) -> list[list[Span]]:
    """Absolute spans of `steps` consecutive steps that start with every lane free at 0.

    Raises DeadlockError, and ValueError where costs and tasks differ in number.
    """
    engine = _Engine(graph, costs, capacities, steps)
    return [_spans(*engine.next_step(), 0) for _ in range(steps)]


def simulate(graph: TaskGraph, costs: Sequence[TaskCost], capacities: Mapping[Resource, int]) -> tuple[int, list[Span]]:
    """Steady step time, and spans of one steady step relative to its first compute task. Nanoseconds.

    Steps are unrolled until one has the same relative spans as an earlier one (exactly, or under
    contention to a millionth of the step time); the step time is the mean over that cycle, mostly of
    one step. Where MAX_STEPS show no cycle, it is the mean over their second half, as in `plan.replay`.
    Raises DeadlockError, and ValueError where costs and tasks differ in number.
    """
    engine = _Engine(graph, costs, capacities, MAX_STEPS)
    opener = first_compute(graph)
    origins: list[int] = []
    seen: list[list[int]] = []
    for step in range(MAX_STEPS):
        starts, ends = engine.next_step()
        origin = starts[opener]
        relative = [time - origin for time in starts + ends]
        tolerance_ns = (origin - origins[-1]) // STEADY_PARTS if step and engine.contended else 0
        for earlier in reversed(range(step)):
            if _equal(relative, seen[earlier], tolerance_ns):
                return (origin - origins[earlier]) // (step - earlier), _spans(starts, ends, origin)
        origins.append(origin)
        seen.append(relative)
    half = MAX_STEPS // 2
    return (origins[-1] - origins[half]) // (MAX_STEPS - 1 - half), _spans(starts, ends, origin)


def _equal(left: list[int], right: list[int], tolerance_ns: int) -> bool:
    if tolerance_ns == 0:
        return left == right
    return all(abs(a - b) <= tolerance_ns for a, b in zip(left, right, strict=True))


def _spans(starts: list[int], ends: list[int], origin: int) -> list[Span]:
    return [Span(start_ns=start - origin, end_ns=end - origin) for start, end in zip(starts, ends, strict=True)]
