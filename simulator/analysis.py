"""What bounds a schedule: lanes, shared resources, carried cycles; and the critical path through a steady step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

import networkx as nx

from simulator.costs import TaskCost
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.sharing import Resource
from slideplan.timeline import Span, first_compute

WAIT = "wait"
CYCLE_STEPS = 16  # within which nearly every schedule repeats


def lower_bound(
    graph: TaskGraph, costs: Sequence[TaskCost], capacities: Mapping[Resource, int], handoffs: Handoffs = IMMEDIATE
) -> int:
    """Nanoseconds below which no steady step can be: busiest lane, busiest shared resource, slowest carried cycle.

    Contention only slows tasks down, and a shared resource gives no more than its capacity.
    """
    busiest = max(sum(costs[number].duration_ns for number in queue) for queue in graph.lanes.values())
    cycle = carried_cycle(graph, [cost.duration_ns for cost in costs], handoffs)
    return max(busiest, resource_bound(costs, capacities), cycle)


def resource_bound(costs: Iterable[TaskCost], capacities: Mapping[Resource, int]) -> int:
    """Nanoseconds for which the busiest shared resource is needed at full capacity in a step."""
    work = dict.fromkeys(capacities, 0)  # bytes/s x ns; a demand beyond a capacity counts as that capacity
    for cost in costs:
        for resource, rate in cost.demand.items():
            work[resource] += min(rate, capacities[resource]) * cost.duration_ns
    return resource_time(work, capacities)


def resource_time(work: Mapping[Resource, int], capacities: Mapping[Resource, int]) -> int:
    """Nanoseconds that the busiest resource takes for its work, given in bytes/s x ns.

    Less one part in 10^9: speeds of flows are rounded up to a grid of 2^-40.
    """
    return max((total * (10**9 - 1) // (capacities[resource] * 10**9) for resource, total in work.items()), default=0)


def carried_cycle(graph: TaskGraph, durations_ns: Sequence[int], handoffs: Handoffs = IMMEDIATE) -> int:
    """Nanoseconds per step, rounded down, of a cycle of lane order and dependencies that leads into later steps.

    Steps are unrolled without contention until one is the step before, shifted: the shift is then what
    every step takes from there on, hence the slowest cycle that binds. Without that in CYCLE_STEPS, the
    critical path to the last opener is walked back, and the slowest of the cycles that it closes is taken:
    a proven bound too, if not always the best.
    """
    tasks, lane_of, later_on = graph.tasks, graph.lane_of, handoffs.table(graph.lanes)
    before: list[list[tuple[int, int, int]]] = [
        [(each.task, each.distance, later_on[task.lane][lane_of[each.task]]) for each in task.dependencies] for task in tasks
    ]
    for queue in graph.lanes.values():
        for number, previous in zip(queue, (queue[-1], *queue), strict=False):
            before[number].append((previous, int(number == queue[0]), 0))
    last = [0] * len(before)
    unrolled = [last]
    for _ in range(CYCLE_STEPS):
        ends: list[int] = []
        for duration, edges in zip(durations_ns, before, strict=True):
            start = 0
            for other, distance, later_ns in edges:
                known = last[other] if distance else ends[other]
                start = max(start, known + later_ns)
            ends.append(start + duration)
        shift = ends[0] - last[0]
        if len(unrolled) > 1 and all(now - then == shift for now, then in zip(ends, last, strict=True)):
            return shift
        unrolled.append(ends)
        last = ends
    return _cycle_on_path(unrolled, before, durations_ns, first_compute(graph))


def _cycle_on_path(
    unrolled: list[list[int]], before: list[list[tuple[int, int, int]]], durations_ns: Sequence[int], number: int
) -> int:
    """The slowest cycle that the critical path closes; `unrolled` holds ends per step, zeros before the first."""
    step = len(unrolled) - 1
    passed: dict[int, tuple[int, int]] = {}  # task -> last step on the path, its end there
    slowest = 0
    while step > 0:
        end = unrolled[step][number]
        later_step, later_end = passed.setdefault(number, (step, end))
        if later_step > step:
            slowest = max(slowest, (later_end - end) // (later_step - step))
        start = end - durations_ns[number]
        number, distance, _ = next(
            edge for edge in before[number] if unrolled[step - edge[1]][edge[0]] + edge[2] == start or not start
        )
        step -= distance
    return slowest


def critical_path(graph: TaskGraph, step_ns: int, spans: Sequence[Span]) -> dict[str, int]:
    """Nanoseconds per lane along the longest path through one steady step; they add up to `step_ns`.

    The steady step is repeated, and every task instance that overlaps the time between the starts of
    two consecutive first compute tasks is a node. Edges are dependencies and lane order, each weighted
    with the part of its predecessor's realised time that lies in that time and before the successor
    starts. The path that ends where the next step opens is the reason why the step takes as long as it
    does; time on it that no task fills counts as "wait".
    """
    if step_ns == 0:
        return {}
    instances = _step_graph(graph, step_ns, spans)
    target = (1, first_compute(graph))
    path = nx.dag_longest_path(instances.subgraph(nx.ancestors(instances, target) | {target}), weight="ns")
    found: dict[str, int] = {}
    for before, after in pairwise(path):
        lane = graph.lane_of[before[1]].name
        found[lane] = found.get(lane, 0) + instances.edges[before, after]["ns"]
    wait_ns = step_ns - sum(found.values())
    assert wait_ns >= 0, "a path through the step is no longer than the step"
    return found | {WAIT: wait_ns} if wait_ns else found


def _step_graph(graph: TaskGraph, step_ns: int, spans: Sequence[Span]) -> nx.DiGraph:
    """Instances (step, task) that overlap 0..step_ns, where step 0 is the one that opens at 0."""
    instances = nx.DiGraph()
    instances.add_node((1, first_compute(graph)))
    times = {
        (step, number): (span.start_ns + step * step_ns, span.end_ns + step * step_ns)
        for number, span in enumerate(spans)
        for step in range(-(span.end_ns // step_ns), (step_ns - span.start_ns) // step_ns + 1)
    }
    before_in_lane = {}
    for queue in graph.lanes.values():
        for number, previous in zip(queue, (queue[-1], *queue), strict=False):
            before_in_lane[number] = previous, int(number == queue[0])
    for (step, number), (start, _) in times.items():
        edges = [(dependency.task, dependency.distance) for dependency in graph.tasks[number].dependencies]
        for other, distance in (before_in_lane[number], *edges):
            before = times.get((step - distance, other))
            # Without a strictly steady step, repeating one step may put a start before what it waited for.
            if before is not None and before[0] <= start:
                overlap = min(before[1], start) - max(before[0], 0)
                instances.add_edge((step - distance, other), (step, number), ns=max(0, overlap))
    return instances
