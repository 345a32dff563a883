"""Lowering, pass 5: dependencies follow from what tasks read and write.

For every slot, in issue order and on into the next step: a reader waits for the last writer, a writer
waits for the readers since. Walking the step twice finds the edges carried from one step into the
next, so "update(i) before the next load(i)" and every write-after-read edge need no rule of their own.
"""

from __future__ import annotations

from slideplan.graph.clocks import LANE_NUMBERS, Clock
from slideplan.graph.tasks import Dependency, Task, TaskGraph


def derive(tasks: list[Task], graph: TaskGraph) -> tuple[Task, ...]:
    """The tasks with their dependencies, reduced to those that nothing else implies.

    `graph` holds the same tasks without dependencies; it supplies lanes and places in them.
    """
    # Lanes and slots as numbers: this runs for every policy that a search looks at closely.
    total = len(tasks)
    lane_of = [LANE_NUMBERS[task.lane] for task in tasks]
    position = graph.lane_position
    counts = [lane_of.count(lane) for lane in range(len(LANE_NUMBERS))]
    slots: dict[tuple[str, int], int] = {}
    accesses = [[(slots.setdefault((a.pool, a.slot), len(slots)), a.mode) for a in task.accesses] for task in tasks]
    last_write: list[int | None] = [None] * len(slots)
    readers: list[list[int]] = [[] for _ in slots]
    clocks: list[Clock] = []
    lane_clock: list[Clock] = [[0] * len(LANE_NUMBERS) for _ in LANE_NUMBERS]
    found: list[tuple[Dependency, ...]] = []
    for instance in range(2 * total):
        step, number = divmod(instance, total)
        needed: set[int] = set()
        for slot, mode in accesses[number]:
            if mode != "r":
                needed.update(readers[slot])
            writer = last_write[slot]
            if writer is not None and (mode != "w" or not readers[slot]):
                needed.add(writer)
        own = lane_of[number]
        clock = lane_clock[own]
        kept = []
        # Latest first: what a later task already waited for need not be waited for again.
        for dependency in sorted(needed, reverse=True):
            depended_step, depended = divmod(dependency, total)
            lane = lane_of[depended]
            if clock[lane] > depended_step * counts[lane] + position[depended]:
                continue
            kept.append(Dependency(task=depended, distance=1 if depended_step < step else 0))
            clock = list(map(max, clock, clocks[dependency]))
        if step:
            found.append(tuple(sorted(kept, key=lambda d: (-d.distance, d.task))))
        clock[own] = step * counts[own] + position[number] + 1
        lane_clock[own] = clock
        clocks.append(list(clock))
        for slot, mode in accesses[number]:
            if mode == "r":
                readers[slot].append(instance)
            else:
                last_write[slot] = instance
                readers[slot] = []
    return tuple(_with(task, dependencies) for task, dependencies in zip(tasks, found, strict=True))


def _with(task: Task, dependencies: tuple[Dependency, ...]) -> Task:
    return Task(
        name=task.name, kind=task.kind, unit=task.unit, micro=task.micro, bytes_moved=task.bytes_moved,
        flops=task.flops, accesses=task.accesses, dependencies=dependencies, fifo=task.fifo, chunk=task.chunk,
    )  # fmt: skip
