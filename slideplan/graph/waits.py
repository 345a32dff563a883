"""Where a lane of a steady step stands still, and for what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import Dependency, TaskGraph
from slideplan.timeline import Span


class Wait(NamedTuple):
    """A gap before a task. `reason`: the dependency that ended last; None where the task waited for none."""

    task: int
    duration_ns: int
    reason: Dependency | None


def longest_wait(graph: TaskGraph, spans: Sequence[Span], step_ns: int, lane: Lane) -> Wait | None:
    """The longest gap between two tasks of a lane, steps following each other; None where it never stands still."""
    queue = graph.lanes[lane]
    longest: Wait | None = None
    for place, number in enumerate(queue):
        before = queue[place - 1]
        free_ns = spans[before].end_ns - (step_ns if place == 0 else 0)
        gap_ns = spans[number].start_ns - free_ns
        if gap_ns > 0 and (longest is None or gap_ns > longest.duration_ns):
            ends = {each: spans[each.task].end_ns - each.distance * step_ns for each in graph.tasks[number].dependencies}
            longest = Wait(number, gap_ns, max(ends, key=ends.__getitem__, default=None))
    return longest
