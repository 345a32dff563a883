"""What `validate` finds by vector clocks over two steps, and what reachability says of every pair over four."""

from __future__ import annotations

from itertools import combinations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST
from slideplan.graph.tasks import Access, Dependency, Role, SlotPool, Task, TaskGraph
from slideplan.graph.validate import validate
from slideplan.lowering.edges import derive
from slideplan.placement import TensorClass, Tier

POOL = SlotPool(name="pool", tier=Tier.GPU, tensor_class=TensorClass.WEIGHTS, slot_bytes=1, count=3)


@st.composite
def graphs(draw: st.DrawFn) -> TaskGraph:
    """Tasks on up to four lanes that use three slots, with the edges that they need but for some, and some others."""
    tasks = []
    for number in range(draw(st.integers(2, 7))):
        used = draw(st.dictionaries(st.integers(0, POOL.count - 1), st.sampled_from(["r", "w", "rw"]), min_size=1, max_size=2))
        tasks.append(
            Task(
                name=f"t{number}", operation=draw(st.sampled_from([FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST])),
                unit=0, micro=None, bytes_moved=0, flops=0,
                accesses=tuple(Access(Role.WEIGHTS, Tier.GPU, POOL.name, slot, mode) for slot, mode in used.items()),
            )
        )  # fmt: skip
    tasks = list(derive(TaskGraph(pools=(POOL,), tasks=tuple(tasks))))
    for _ in range(draw(st.integers(0, 2))):
        number = draw(st.integers(0, len(tasks) - 1))
        kept = list(tasks[number].dependencies)
        if kept:
            kept.remove(draw(st.sampled_from(kept)))
        if draw(st.booleans()):
            other = draw(st.integers(0, len(tasks) - 1))
            kept.append(Dependency(task=other, distance=1 if other >= number or draw(st.booleans()) else 0))
        tasks[number] = msgspec.structs.replace(tasks[number], dependencies=tuple(kept))
    return TaskGraph(pools=(POOL,), tasks=tuple(tasks))


def races(graph: TaskGraph, steps: int) -> bool:
    """Whether two accesses to a slot, not both reads, are ordered by nothing: neither dependencies nor lanes."""
    before: dict[tuple[int, int], set[tuple[int, int]]] = {}
    last_in_lane: dict[object, tuple[int, int]] = {}
    users: dict[int, list[tuple[tuple[int, int], str]]] = {}
    for step in range(steps):
        for number, task in enumerate(graph.tasks):
            node = step, number
            waits = [(step - each.distance, each.task) for each in task.dependencies if step >= each.distance]
            if task.lane in last_in_lane:
                waits.append(last_in_lane[task.lane])
            before[node] = set(waits).union(*(before[other] for other in waits))
            last_in_lane[task.lane] = node
            for access in task.accesses:
                users.setdefault(access.slot, []).append((node, access.mode))
    return any(
        earlier not in before[later]
        for each in users.values()
        for (earlier, one), (later, other) in combinations(each, 2)
        if (one, other) != ("r", "r") and earlier != later
    )


@given(graphs())
def test_a_graph_is_refused_where_any_of_four_steps_has_a_race_and_only_there(graph: TaskGraph) -> None:
    if not races(graph, 4):
        validate(graph)
        return
    with pytest.raises(ValueError, match="without waiting for"):
        validate(graph)


def test_a_race_that_shows_between_two_steps_alone() -> None:
    """The load of the next step overwrites what forward reads; within the step everything is in order."""

    def graph(*carried: Dependency) -> TaskGraph:
        reads, writes = (Access(Role.WEIGHTS, Tier.GPU, POOL.name, 0, mode) for mode in ("r", "w"))
        rest = {"unit": 0, "micro": None, "bytes_moved": 0, "flops": 0}
        load = Task(name="load", operation=LOAD_WEIGHTS, accesses=(writes,), dependencies=carried, **rest)
        forward = Task(name="forward", operation=FORWARD, accesses=(reads,), dependencies=(Dependency(0, 0),), **rest)
        return TaskGraph(pools=(POOL,), tasks=(load, forward))

    validate(graph(Dependency(task=1, distance=1)))
    with pytest.raises(ValueError) as refused:
        validate(graph())
    assert str(refused.value) == "task load: overwrites slot 0 of pool without waiting for forward of the step before"
