"""Run a task graph on given durations: FIFO lanes, dependencies, no contention.

Without contention a lane schedule is a longest-path recurrence: a task starts when the task before it
in its lane has ended, and all its dependencies have and were handed over. Stored order is topological, so
one pass suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.timeline import Span, first_compute

MAX_STEPS = 64


def unroll(graph: TaskGraph, durations_ns: Sequence[int], steps: int, handoffs: Handoffs = IMMEDIATE) -> list[list[Span]]:
    """Absolute spans of `steps` consecutive steps that start with every lane free at 0."""
    lane_free = dict.fromkeys(graph.lanes, 0)
    later_on = handoffs.table(graph.lanes)
    previous: list[int] = []
    found: list[list[Span]] = []
    for _ in range(steps):
        spans, ends = _next_step(graph, durations_ns, lane_free, previous, later_on)
        found.append(spans)
        previous = ends
    return found


def _next_step(
    graph: TaskGraph,
    durations_ns: Sequence[int],
    lane_free: dict[Lane, int],
    previous_ends: list[int],
    later_on: dict[Lane, dict[Lane, int]],
) -> tuple[list[Span], list[int]]:
    spans: list[Span] = []
    ends: list[int] = []
    lane_of = graph.lane_of
    for task, lane, duration in zip(graph.tasks, lane_of, durations_ns, strict=True):
        start = lane_free[lane]
        for dependency in task.dependencies:
            later = later_on[lane][lane_of[dependency.task]]
            if dependency.distance == 0:
                start = max(start, ends[dependency.task] + later)
            elif previous_ends:
                start = max(start, previous_ends[dependency.task] + later)
        lane_free[lane] = start + duration
        ends.append(start + duration)
        spans.append(Span(start_ns=start, end_ns=start + duration))
    return spans, ends


def replay(graph: TaskGraph, durations_ns: Sequence[int], handoffs: Handoffs = IMMEDIATE) -> tuple[int, list[Span]]:
    """Steady step time and spans of one steady step, relative to its first compute task (see `steady_step`).

    Spans are the whole state of the recurrence: what repeats once repeats for good.
    """
    lane_free = dict.fromkeys(graph.lanes, 0)
    later_on = handoffs.table(graph.lanes)
    previous: list[int] = []

    def next_step() -> tuple[list[int], list[int]]:
        nonlocal previous
        spans, previous = _next_step(graph, durations_ns, lane_free, previous, later_on)
        return [span.start_ns for span in spans], previous

    return steady_step(next_step, first_compute(graph))


def steady_step(
    next_step: Callable[[], tuple[list[int], list[int]]], opener: int, tolerance_parts: int | None = None
) -> tuple[int, list[Span]]:
    """Steady step time, and spans of one steady step relative to the start of task `opener`. Nanoseconds.

    `next_step` gives the absolute starts and ends of one step after another. Steps are taken until one
    has the same relative times as an earlier one (exactly, or to one of `tolerance_parts` of the step
    time); the step time is the mean over that cycle, mostly of one step. Where MAX_STEPS show no cycle,
    it is the mean over their second half.
    """
    origins: list[int] = []
    seen: list[list[int]] = []
    for step in range(MAX_STEPS):
        starts, ends = next_step()
        origin = starts[opener]
        relative = [time - origin for time in starts + ends]
        tolerance_ns = (origin - origins[-1]) // tolerance_parts if step and tolerance_parts else 0
        for earlier in reversed(range(step)):
            if _equal(relative, seen[earlier], tolerance_ns):
                return (origin - origins[earlier]) // (step - earlier), _relative_spans(starts, ends, origin)
        origins.append(origin)
        seen.append(relative)
    half = MAX_STEPS // 2
    return (origins[-1] - origins[half]) // (MAX_STEPS - 1 - half), _relative_spans(starts, ends, origin)


def _equal(left: list[int], right: list[int], tolerance_ns: int) -> bool:
    if tolerance_ns == 0:
        return left == right
    return all(abs(a - b) <= tolerance_ns for a, b in zip(left, right, strict=True))


def _relative_spans(starts: list[int], ends: list[int], origin: int) -> list[Span]:
    return [Span(start_ns=start - origin, end_ns=end - origin) for start, end in zip(starts, ends, strict=True)]
