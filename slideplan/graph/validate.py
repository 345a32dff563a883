"""Checks a task graph without trusting how it was made: structure, order, slot safety, capacity."""

from __future__ import annotations

from slideplan.graph.clocks import clocks, knows
from slideplan.graph.tasks import TaskGraph, tier_bytes
from slideplan.placement import Tier
from slideplan.quantities import format_bytes


def validate(graph: TaskGraph, capacity_bytes: dict[Tier, int] | None = None) -> None:
    """Raise ValueError naming the first task, slot or tier at fault.

    `capacity_bytes`: what each tier offers to slots; a tier that is not named is not checked.
    """
    _structure(graph)
    _slot_safety(graph)
    for tier, capacity in (capacity_bytes or {}).items():
        need = tier_bytes(graph.pools, tier)
        if need > capacity:
            raise ValueError(
                f"task graph needs {format_bytes(need)} of {tier} memory, {format_bytes(capacity)} are there: "
                f"lacks {format_bytes(need - capacity)}"
            )


def _structure(graph: TaskGraph) -> None:
    if len(graph.pool) != len(graph.pools):
        raise ValueError("task graph: two pools share a name")
    names: set[str] = set()
    for number, task in enumerate(graph.tasks):
        if task.name in names:
            raise ValueError(f"task graph: two tasks are named {task.name}")
        names.add(task.name)
        for access in task.accesses:
            pool = graph.pool.get(access.pool)
            if pool is None:
                raise ValueError(f"task {task.name}: uses pool {access.pool!r}, which does not exist")
            if not 0 <= access.slot < pool.count:
                raise ValueError(f"task {task.name}: slot {access.slot} of {pool.name} is outside 0..{pool.count - 1}")
        for dependency in task.dependencies:
            if not 0 <= dependency.task < len(graph.tasks):
                raise ValueError(f"task {task.name}: depends on task {dependency.task}, which does not exist")
            # An edge to a later task of the same step could never be satisfied in stored order: a
            # stream would not wait at all, since the event it waits for has not been recorded yet.
            if dependency.distance == 0 and dependency.task >= number:
                raise ValueError(
                    f"task {task.name}: depends on {graph.tasks[dependency.task].name}, which stands after it; "
                    "stored order must be topological"
                )


def _slot_safety(graph: TaskGraph) -> None:
    """Every conflicting pair of accesses to a slot must be ordered by edges and lane order.

    Two steps are enough. A slot that is written at all is written in every step, so accesses that follow each other
    lie in one step or in neighbouring ones. Edges and lane order lead from a step to itself or to the next one, and
    never back: whatever orders two accesses of steps n and n + 1 lies within these steps, and is there in steps 0 and 1.
    """
    last_write: dict[tuple[str, int], tuple[int, int]] = {}
    readers: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for step, number, clock in clocks(graph, steps=2):
        task = graph.tasks[number]
        for access in task.accesses:
            slot = (access.pool, access.slot)
            conflicts = list(readers.get(slot, ())) if access.mode != "r" else []
            if slot in last_write:
                conflicts.append(last_write[slot])
            for other_step, other in conflicts:
                if not knows(clock, graph, other_step, other):
                    verb = "reads" if access.mode == "r" else "overwrites"
                    when = "of the step before" if other_step < step else "before it"
                    raise ValueError(
                        f"task {task.name}: {verb} slot {access.slot} of {access.pool} without waiting for "
                        f"{graph.tasks[other].name} {when}"
                    )
        for access in task.accesses:
            slot = (access.pool, access.slot)
            if access.mode == "r":
                readers.setdefault(slot, []).append((step, number))
            else:
                last_write[slot] = (step, number)
                readers[slot] = []
