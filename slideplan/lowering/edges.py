"""Lowering, pass 5: dependencies follow from what tasks read and write.

For every slot, in issue order and on into the next step: a reader waits for the last writer, a writer
waits for the readers since. Walking the step twice finds the edges carried from one step into the
next, so "update(i) before the next load(i)" and every write-after-read edge need no rule of their own.
"""

from __future__ import annotations

import msgspec

from slideplan.graph.clocks import Clock, lane_numbers
from slideplan.graph.tasks import Dependency, Hazard, Task, TaskGraph


def derive(graph: TaskGraph) -> tuple[Task, ...]:
    """The graph's tasks with their dependencies, reduced to those that nothing else implies.

    Each dependency names the first of its task's slots that asks for it. Dependencies that the graph has are not looked at.
    """
    # Lanes and slots as numbers: this runs for every policy that a search looks at closely.
    tasks = graph.tasks
    total = len(tasks)
    lane_of = lane_numbers(graph)
    position = graph.lane_position
    counts = [len(queue) for queue in graph.lanes.values()]
    slots: dict[tuple[str, int], int] = {}
    accesses = [[(slots.setdefault((a.pool, a.slot), len(slots)), a.mode) for a in task.accesses] for task in tasks]
    names = list(slots)
    last_write: list[int | None] = [None] * len(slots)
    readers: list[list[int]] = [[] for _ in slots]
    clocks: list[Clock] = []
    lane_clock: list[Clock] = [[0] * len(counts) for _ in counts]
    found: list[tuple[Dependency, ...]] = []
    for instance in range(2 * total):
        step, number = divmod(instance, total)
        needed: dict[int, tuple[int, Hazard]] = {}
        for slot, mode in accesses[number]:
            if mode != "r":
                for reader in readers[slot]:
                    needed.setdefault(reader, (slot, "overwrites_read"))
            writer = last_write[slot]
            if writer is not None and (mode != "w" or not readers[slot]):
                needed.setdefault(writer, (slot, "overwrites_written" if mode == "w" else "reads"))
        own = lane_of[number]
        clock = lane_clock[own]
        kept = []
        # Latest first: what a later task already waited for need not be waited for again.
        for dependency in sorted(needed, reverse=True):
            depended_step, depended = divmod(dependency, total)
            lane = lane_of[depended]
            if clock[lane] > depended_step * counts[lane] + position[depended]:
                continue
            slot, hazard = needed[dependency]
            kept.append(Dependency(depended, 1 if depended_step < step else 0, *names[slot], hazard))
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
    return tuple([msgspec.structs.replace(task, dependencies=edges) for task, edges in zip(tasks, found, strict=True)])
