"""Walking an unrolled graph: what a task knows to have finished before it starts, by dependencies and lane order alone."""

from __future__ import annotations

from collections.abc import Iterable

from slideplan.graph.tasks import TaskGraph

# For each lane, by its place in `graph.lanes`, how many of its tasks (counted from the first step) are known to have finished.
Clock = list[int]


def lane_numbers(graph: TaskGraph) -> list[int]:
    """For each task, the place of its lane in `graph.lanes`."""
    places = {lane: place for place, lane in enumerate(graph.lanes)}
    return [places[lane] for lane in graph.lane_of]


def clocks(graph: TaskGraph, steps: int) -> Iterable[tuple[int, int, Clock]]:
    """Walk the unrolled graph: (step, task, what has finished before the task starts).

    Uses dependencies and lane order only, not accesses.
    """
    lanes = lane_numbers(graph)
    counts = [len(queue) for queue in graph.lanes.values()]
    lane_clock: list[Clock] = [[0] * len(counts) for _ in counts]
    finished: dict[tuple[int, int], Clock] = {}
    for step in range(steps):
        for number, task in enumerate(graph.tasks):
            own = lanes[number]
            clock = lane_clock[own]
            for dependency in task.dependencies:
                if step >= dependency.distance:
                    clock[:] = map(max, clock, finished[step - dependency.distance, dependency.task])
            yield step, number, list(clock)
            clock[own] = step * counts[own] + graph.lane_position[number] + 1
            finished[step, number] = list(clock)


def knows(clock: Clock, graph: TaskGraph, step: int, number: int) -> bool:
    """Whether the task of that step has finished, as far as the clock tells."""
    lane = graph.lane_of[number]
    place = list(graph.lanes).index(lane)
    return clock[place] > step * len(graph.lanes[lane]) + graph.lane_position[number]
