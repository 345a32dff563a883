"""Lowering, pass 4: dependencies follow from what tasks read and write.

For every slot, in issue order and on into the next step: a reader waits for the last writer, a writer
waits for the readers since. Walking the step twice finds the edges carried from one step into the
next, so "update(i) before the next load(i)" and every write-after-read edge need no rule of their own.
"""

from __future__ import annotations

from collections.abc import Iterable

from slideplan.plan.graph import Dependency, Lane, Task, TaskGraph

_LANES = {lane: place for place, lane in enumerate(Lane)}

# For each lane, how many of its tasks (counted from the first step) are known to have finished.
Clock = list[int]


def derive(tasks: list[Task], graph: TaskGraph) -> tuple[Task, ...]:
    """The tasks with their dependencies, reduced to those that nothing else implies.

    `graph` holds the same tasks without dependencies; it supplies lanes and places in them.
    """
    last_write: dict[tuple[str, int], int] = {}
    readers: dict[tuple[str, int], list[int]] = {}
    counts = {lane: len(queue) for lane, queue in graph.lanes.items()}
    clocks: dict[int, Clock] = {}
    lane_clock: dict[Lane, Clock] = {lane: [0] * len(_LANES) for lane in counts}
    found: list[tuple[Dependency, ...]] = []
    total = len(tasks)
    for instance in range(2 * total):
        step, number = divmod(instance, total)
        task = tasks[number]
        needed: set[int] = set()
        for access in task.accesses:
            slot = (access.pool, access.slot)
            if access.mode != "r":
                needed.update(readers.get(slot, ()))
            if slot in last_write and (access.mode != "w" or not readers.get(slot)):
                needed.add(last_write[slot])
        clock = lane_clock[task.lane]
        kept = []
        # Latest first: what a later task already waited for need not be waited for again.
        for dependency in sorted(needed, reverse=True):
            depended = tasks[dependency % total]
            lane = _LANES[depended.lane]
            position = dependency // total * counts[depended.lane] + graph.lane_position[dependency % total]
            if clock[lane] > position:
                continue
            kept.append(Dependency(task=dependency % total, distance=1 if dependency // total < step else 0))
            merge(clock, clocks[dependency])
        if step:
            found.append(tuple(sorted(kept, key=lambda d: (-d.distance, d.task))))
        clock[_LANES[task.lane]] = step * counts[task.lane] + graph.lane_position[number] + 1
        clocks[instance] = list(clock)
        for access in task.accesses:
            slot = (access.pool, access.slot)
            if access.mode == "r":
                readers.setdefault(slot, []).append(instance)
            else:
                last_write[slot] = instance
                readers[slot] = []
    return tuple(_with(task, dependencies) for task, dependencies in zip(tasks, found, strict=True))


def _with(task: Task, dependencies: tuple[Dependency, ...]) -> Task:
    return Task(
        name=task.name, kind=task.kind, unit=task.unit, micro=task.micro, bytes_moved=task.bytes_moved,
        flops=task.flops, accesses=task.accesses, dependencies=dependencies, fifo=task.fifo,
    )  # fmt: skip


def merge(clock: Clock, other: Clock) -> None:
    """Know what `other` knows too."""
    for lane, finished in enumerate(other):
        clock[lane] = max(clock[lane], finished)


def clocks(graph: TaskGraph, steps: int) -> Iterable[tuple[int, int, Clock]]:
    """Walk the unrolled graph: (step, task, what has finished before the task starts).

    Uses dependencies and lane order only, not accesses.
    """
    counts = {lane: len(queue) for lane, queue in graph.lanes.items()}
    lane_clock: dict[Lane, Clock] = {lane: [0] * len(_LANES) for lane in counts}
    finished: dict[tuple[int, int], Clock] = {}
    for step in range(steps):
        for number, task in enumerate(graph.tasks):
            clock = lane_clock[task.lane]
            for dependency in task.dependencies:
                if step >= dependency.distance:
                    merge(clock, finished[step - dependency.distance, dependency.task])
            yield step, number, list(clock)
            clock[_LANES[task.lane]] = step * counts[task.lane] + graph.lane_position[number] + 1
            finished[step, number] = list(clock)


def knows(clock: Clock, graph: TaskGraph, step: int, number: int) -> bool:
    """Whether the task of that step has finished, as far as the clock tells."""
    lane = graph.tasks[number].lane
    position = step * len(graph.lanes[lane]) + graph.lane_position[number]
    return clock[_LANES[lane]] > position
