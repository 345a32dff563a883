"""The discrete-event engine: lanes are FIFOs, time is in integer nanoseconds, bandwidth is shared.

A loop over instants, made for speed; `reference` says the same with one SimPy process per lane, and tests
hold the two together span for span. A task without demand ends at its start plus its duration, whatever else
happens. Its lane therefore publishes the end at once and works on in a time of its own, ahead of the clock;
it waits for the clock where it draws on shared bandwidth, and at the end of each step.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from simulator.costs import TaskCost
from simulator.fluid import FRACTION_BITS, Draw, Speeds
from slideplan.graph.lanes import Lane
from slideplan.graph.replay import MAX_STEPS, steady_step
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.sharing import Resource
from slideplan.timeline import Span, first_compute

# Under contention ends are rounded up to whole nanoseconds, so steps may repeat to within a few of them
# only. Two steps then count as equal when no span differs by more than this part of the step time.
STEADY_PARTS = 1_000_000

UNKNOWN = -1
LONG_AGO = -(1 << 62)  # when all was done before the first step: edges carried into it bind nothing


class DeadlockError(RuntimeError):
    """Every lane waits and nothing runs. Names, per stuck lane, the task and what it waits for."""


class Entry(NamedTuple):
    """A task as its lane sees it; `draw` is its number among the distinct draws, None without any."""

    number: int
    duration_ns: int
    draw: int | None
    dependencies: tuple[tuple[int, int, int], ...]  # task, distance, nanoseconds from its end until the lane goes on


class Engine(Protocol):
    """A run of a graph, taken step by step."""

    def next_step(self) -> tuple[list[int], list[int]]:
        """Run until the next step is complete; its absolute starts and ends by task number. Raises DeadlockError."""


EngineMaker = Callable[[TaskGraph, Sequence[TaskCost], Mapping[Resource, int], int, Handoffs], Engine]


def entries(graph: TaskGraph, costs: Sequence[TaskCost], handoffs: Handoffs) -> tuple[dict[Lane, list[Entry]], list[Draw]]:
    """Each lane's queue, and the draws that its entries name. Raises ValueError where costs and tasks differ in number."""
    if len(costs) != len(graph.tasks):
        raise ValueError(f"{len(costs)} costs for {len(graph.tasks)} tasks")
    numbers: dict[tuple[tuple[tuple[Resource, int], ...], tuple[tuple[Resource, float], ...]], int] = {}
    draw_of: dict[int, int | None] = {}  # by the cost's id: few costs serve thousands of tasks
    for cost in costs:
        if id(cost) not in draw_of:
            drawn = tuple(sorted((resource, rate) for resource, rate in cost.demand.items() if rate))
            flows = drawn and cost.duration_ns
            shares = tuple(sorted(cost.shares.items()))
            draw_of[id(cost)] = numbers.setdefault((drawn, shares), len(numbers)) if flows else None
    queues: dict[Lane, list[Entry]] = {lane: [] for lane in graph.lanes}
    later_on = handoffs.table(graph.lanes)
    lane_of = graph.lane_of
    for number, (task, cost) in enumerate(zip(graph.tasks, costs, strict=True)):
        later = later_on[lane_of[number]]
        dependencies = tuple([(each.task, each.distance, later[lane_of[each.task]]) for each in task.dependencies])
        queues[lane_of[number]].append(Entry(number, cost.duration_ns, draw_of[id(cost)], dependencies))
    return queues, [Draw(dict(drawn), dict(shares)) for drawn, shares in numbers]


def deadlock(graph: TaskGraph, now_ns: int, waits: Mapping[Lane, tuple[int, int, int]]) -> DeadlockError:
    """`waits`: for each stuck lane its task, what that waits for, and of which step."""
    tasks = graph.tasks
    told = []
    for lane, (task, other, step) in waits.items():
        slots = (f" (slot {edge.slot} of {edge.pool})" for edge in tasks[task].dependencies if edge.task == other)
        told.append(f"{lane}: {tasks[task].name} waits for {tasks[other].name} of step {step}{next(slots, '')}")
    return DeadlockError(f"deadlock after {now_ns} ns; " + "; ".join(sorted(told)))


class _Step:
    """Absolute times of one step's tasks, by number, and which lanes wait to know an end."""

    __slots__ = ("awaited", "ends", "open_lanes", "starts")

    def __init__(self, tasks: int, lanes: int, time: int = UNKNOWN) -> None:
        self.starts = [time] * tasks
        self.ends = [time] * tasks
        self.awaited: dict[int, list[_LaneState]] = {}
        self.open_lanes = lanes


class _LaneState:
    """Where a lane stands; while it runs a flow, `left` and `speed` are in units of 2^-FRACTION_BITS."""

    __slots__ = (
        "before",
        "clock",
        "draw",
        "end_ns",
        "ends",
        "lane",
        "left",
        "number",
        "place",
        "queue",
        "speed",
        "step",
        "this",
        "waits",
    )

    def __init__(self, number: int, lane: Lane, queue: list[Entry], before: _Step, this: _Step) -> None:
        self.number = number
        self.lane = lane
        self.queue = queue
        self.before, self.this, self.ends = before, this, this.ends
        self.step = self.place = self.clock = 0
        self.draw = self.left = self.speed = self.end_ns = 0
        self.waits: tuple[int, int, int] | None = None


class FastEngine:
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
        self._max_steps = steps
        self._speeds = Speeds(draws, capacities)
        before = _Step(len(graph.tasks), 0, time=LONG_AGO)
        self._steps = [_Step(len(graph.tasks), len(queues))]
        self._lanes = [
            _LaneState(number, lane, queue, before, self._steps[0]) for number, (lane, queue) in enumerate(queues.items())
        ]
        self._now = 0
        self._taken = 0
        self._alarms = [(0, place) for place in range(len(self._lanes))]  # a heap of when which lane goes on
        self._flowing: list[_LaneState] = []

    def next_step(self) -> tuple[list[int], list[int]]:
        """Run until the next step is complete; its absolute starts and ends by task number. Raises DeadlockError."""
        while self._steps[self._taken].open_lanes:
            self._next_instant()
        step = self._steps[self._taken]
        self._taken += 1
        return step.starts, step.ends

    def _next_instant(self) -> None:
        """All that happens at the next point in time: flows end, lanes wake and work on, flows begin."""
        alarms, flowing = self._alarms, self._flowing
        times = [state.end_ns for state in flowing]
        if alarms:
            times.append(alarms[0][0])
        if not times:
            raise deadlock(self._graph, self._now, {state.lane: state.waits for state in self._lanes if state.waits})
        now = min(times)
        elapsed = now - self._now
        self._now = now
        ready: list[_LaneState] = []
        going_on = []
        for state in flowing:
            if state.end_ns > now:
                state.left -= state.speed * elapsed
                going_on.append(state)
            else:
                state.ends[state.queue[state.place][0]] = state.clock = now
                self._ended(state, ready)
                ready.append(state)
        while alarms and alarms[0][0] <= now:
            ready.append(self._lanes[heapq.heappop(alarms)[1]])
        went_on = len(going_on)
        while ready:
            self._advance(ready.pop(), ready, going_on)
        self._flowing = going_on
        if len(flowing) == went_on == len(going_on):
            return
        for state, speed in zip(going_on, self._speeds.of(tuple([state.draw for state in going_on])), strict=True):
            state.speed = speed
            state.end_ns = now - (-state.left // speed)  # rounded up

    def _ended(self, state: _LaneState, ready: list[_LaneState]) -> None:
        """The end of the lane's task is known: whoever waits to know it goes on."""
        awaited = state.this.awaited
        if awaited:
            ready += awaited.pop(state.queue[state.place][0], ())
        state.place += 1

    def _advance(self, state: _LaneState, ready: list[_LaneState], flowing: list[_LaneState]) -> None:
        """Work through the lane's tasks until one waits, for an end or for the clock, or joins the flowing."""
        queue, starts, ends, before, now = state.queue, state.this.starts, state.ends, state.before.ends, self._now
        clock = state.clock
        state.waits = None
        while state.place < len(queue):
            number, duration_ns, draw, dependencies = queue[state.place]
            for dependency, distance, later_ns in dependencies:
                end_ns = before[dependency] if distance else ends[dependency]
                if end_ns + later_ns > clock and end_ns != UNKNOWN:
                    clock = end_ns + later_ns
                elif end_ns == UNKNOWN:
                    depended = state.before if distance else state.this
                    depended.awaited.setdefault(dependency, []).append(state)
                    state.waits = number, dependency, state.step - distance
                    state.clock = clock
                    return
            starts[number] = clock
            if draw is None:
                clock += duration_ns
                ends[number] = clock
                self._ended(state, ready)
            elif clock > now:
                break
            else:
                state.draw, state.left = draw, duration_ns << FRACTION_BITS
                flowing.append(state)
                return
        state.clock = clock
        if clock > now:
            heapq.heappush(self._alarms, (clock, state.number))
        else:
            self._close_step(state, ready)

    def _close_step(self, state: _LaneState, ready: list[_LaneState]) -> None:
        """The clock has reached the end of the lane's last task of the step."""
        state.this.open_lanes -= 1
        state.step += 1
        if state.step == self._max_steps:
            return
        if state.step == len(self._steps):
            self._steps.append(_Step(len(self._graph.tasks), len(self._lanes)))
        state.place = 0
        state.before, state.this = state.this, self._steps[state.step]
        state.ends = state.this.ends
        ready.append(state)


def trace(
    graph: TaskGraph,
    costs: Sequence[TaskCost],
    capacities: Mapping[Resource, int],
    steps: int,
    engine: EngineMaker = FastEngine,
    handoffs: Handoffs = IMMEDIATE,
) -> list[list[Span]]:
    """Absolute spans of `steps` consecutive steps that start with every lane free at 0.

    Raises DeadlockError, and ValueError where costs and tasks differ in number.
    """
    run = engine(graph, costs, capacities, steps, handoffs)
    found = (run.next_step() for _ in range(steps))
    return [[Span(start, end) for start, end in zip(starts, ends, strict=True)] for starts, ends in found]


def simulate(
    graph: TaskGraph,
    costs: Sequence[TaskCost],
    capacities: Mapping[Resource, int],
    handoffs: Handoffs = IMMEDIATE,
    engine: EngineMaker = FastEngine,
) -> tuple[int, list[Span]]:
    """Steady step time, and spans of one steady step relative to its first compute task. Nanoseconds.

    As `plan.replay.steady_step` has it; steps are equal exactly, or under contention to a millionth of the
    step time. Raises DeadlockError, and ValueError where costs and tasks differ in number.
    """
    run = engine(graph, costs, capacities, MAX_STEPS, handoffs)
    contended = any(cost.demand for cost in costs)
    return steady_step(run.next_step, first_compute(graph), STEADY_PARTS if contended else None)
