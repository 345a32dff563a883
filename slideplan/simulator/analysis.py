"""What bounds a schedule: the busiest lane, and the critical path through a steady step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import networkx as nx

from slideplan.plan.graph import TaskGraph
from slideplan.plan.timeline import Span, first_compute
from slideplan.simulator.costs import TaskCost

WAIT = "wait"


def lower_bound(graph: TaskGraph, costs: Sequence[TaskCost]) -> int:
    """Nanoseconds that the busiest lane works in a step if nothing slows it: no schedule is faster."""
    return max(sum(costs[number].duration_ns for number in queue) for queue in graph.lanes.values())


def critical_path(graph: TaskGraph, step_ns: int, spans: Sequence[Span]) -> dict[str, int]:
    """Nanoseconds per lane along the longest path through one steady step; they add up to `step_ns`.

    The steady step is repeated, and every task instance that overlaps the time between the starts of
    two consecutive first compute tasks is a node. Edges are dependencies and lane order, each weighted
    with the part of its predecessor's realised time that lies in the window and before the successor
    starts. The path that ends where the next step opens is the reason why the step takes as long as it
    does; time on it that no task fills counts as "wait".
    """
    if step_ns == 0:
        return {}
    window = _window_graph(graph, step_ns, spans)
    target = (1, first_compute(graph))
    path = nx.dag_longest_path(window.subgraph(nx.ancestors(window, target) | {target}), weight="ns")
    found: dict[str, int] = {}
    for before, after in pairwise(path):
        lane = str(graph.tasks[before[1]].lane)
        found[lane] = found.get(lane, 0) + window.edges[before, after]["ns"]
    wait_ns = step_ns - sum(found.values())
    assert wait_ns >= 0, "a path through the window is no longer than the window"
    return found | {WAIT: wait_ns} if wait_ns else found


def _window_graph(graph: TaskGraph, step_ns: int, spans: Sequence[Span]) -> nx.DiGraph:
    """Instances (step, task) that overlap 0..step_ns, where step 0 is the one that opens at 0."""
    window = nx.DiGraph()
    window.add_node((1, first_compute(graph)))
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
                window.add_edge((step - distance, other), (step, number), ns=max(0, overlap))
    return window
