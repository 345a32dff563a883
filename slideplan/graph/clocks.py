"""Walking an unrolled graph: what a task knows to have finished before it starts, by dependencies and lane order alone."""

from __future__ import annotations

from collections.abc import Iterable

from slideplan.graph.tasks import Lane, TaskGraph

LANE_NUMBERS = {lane: place for place, lane in enumerate(Lane)}

# For each lane, how many of its tasks (counted from the first step) are known to have finished.
Clock = list[int]


def merge(clock: Clock, other: Clock) -> None:
    """Know what `other` knows too."""
    for lane, finished in enumerate(other):
        clock[lane] = max(clock[lane], finished)


def clocks(graph: TaskGraph, steps: int) -> Iterable[tuple[int, int, Clock]]:
    """Walk the unrolled graph: (step, task, what has finished before the task starts).

    Uses dependencies and lane order only, not accesses.
    """
    counts = {lane: len(queue) for lane, queue in graph.lanes.items()}
    lane_clock: dict[Lane, Clock] = {lane: [0] * len(LANE_NUMBERS) for lane in counts}
    finished: dict[tuple[int, int], Clock] = {}
    for step in range(steps):
        for number, task in enumerate(graph.tasks):
            clock = lane_clock[task.lane]
            for dependency in task.dependencies:
                if step >= dependency.distance:
                    merge(clock, finished[step - dependency.distance, dependency.task])
            yield step, number, list(clock)
            clock[LANE_NUMBERS[task.lane]] = step * counts[task.lane] + graph.lane_position[number] + 1
            finished[step, number] = list(clock)


def knows(clock: Clock, graph: TaskGraph, step: int, number: int) -> bool:
    """Whether the task of that step has finished, as far as the clock tells."""
    lane = graph.tasks[number].lane
    position = step * len(graph.lanes[lane]) + graph.lane_position[number]
    return clock[LANE_NUMBERS[lane]] > position
