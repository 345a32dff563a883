"""Run a task graph on given durations: FIFO lanes, dependencies, no contention.

Without contention a lane schedule is a longest-path recurrence: a task starts when the task before it
in its lane and all its dependencies have ended. Stored order is topological, so one pass suffices.
"""

from __future__ import annotations

from collections.abc import Sequence

from slideplan.plan.graph import Lane, TaskGraph
from slideplan.plan.timeline import Span, first_compute

MAX_STEPS = 64


def unroll(graph: TaskGraph, durations_ns: Sequence[int], steps: int) -> list[list[Span]]:
    """Absolute spans of `steps` consecutive steps that start with every lane free at 0."""
    lane_free = dict.fromkeys(graph.lanes, 0)
    previous: list[int] = []
    found: list[list[Span]] = []
    for _ in range(steps):
        spans, ends = _next_step(graph, durations_ns, lane_free, previous)
        found.append(spans)
        previous = ends
    return found


def _next_step(
    graph: TaskGraph, durations_ns: Sequence[int], lane_free: dict[Lane, int], previous_ends: list[int]
) -> tuple[list[Span], list[int]]:
    spans: list[Span] = []
    ends: list[int] = []
    for task, duration in zip(graph.tasks, durations_ns, strict=True):
        start = lane_free[task.lane]
        for dependency in task.dependencies:
            if dependency.distance == 0:
                start = max(start, ends[dependency.task])
            elif previous_ends:
                start = max(start, previous_ends[dependency.task])
        lane_free[task.lane] = start + duration
        ends.append(start + duration)
        spans.append(Span(start_ns=start, end_ns=start + duration))
    return spans, ends


def replay(graph: TaskGraph, durations_ns: Sequence[int]) -> tuple[int, list[Span]]:
    """Steady step time and spans of one steady step, relative to its first compute task.

    Steps are unrolled until one has the same relative spans as an earlier one. Spans are the whole
    state of the recurrence, so what lies between repeats for good: the step time is the mean over
    that cycle, mostly of one step. Where MAX_STEPS show no cycle, it is the mean over their second half.
    """
    opener = first_compute(graph)
    lane_free = dict.fromkeys(graph.lanes, 0)
    previous: list[int] = []
    origins: list[int] = []
    seen: dict[tuple[Span, ...], int] = {}
    relative: tuple[Span, ...] = ()
    for step in range(MAX_STEPS):
        spans, previous = _next_step(graph, durations_ns, lane_free, previous)
        origin = spans[opener].start_ns
        origins.append(origin)
        relative = tuple(Span(start_ns=span.start_ns - origin, end_ns=span.end_ns - origin) for span in spans)
        if relative in seen:
            return (origin - origins[seen[relative]]) // (step - seen[relative]), list(relative)
        seen[relative] = step
    half = MAX_STEPS // 2
    return (origins[-1] - origins[half]) // (MAX_STEPS - 1 - half), list(relative)
