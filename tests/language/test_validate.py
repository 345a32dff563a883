from __future__ import annotations

import msgspec
import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from contents import Contents, run_lanes
from slideplan.graph.tasks import Dependency, TaskGraph
from slideplan.graph.validate import validate
from slideplan.lowering.lower import lower
from slideplan.placement import Tier
from strategies import FOOTPRINT

FIRST = "weights host>gpu/embedding"


def graph_of(*, layers: int = 3, tied: bool = False, **knobs) -> TaskGraph:
    model = tiny_model(layers=layers, tied_embeddings=tied)
    return lower(model, tiny_policy(model, **knobs), tiny_workload(), FOOTPRINT)


def replaced(graph: TaskGraph, number: int, **fields) -> TaskGraph:
    tasks = list(graph.tasks)
    tasks[number] = msgspec.structs.replace(tasks[number], **fields)
    return TaskGraph(pools=graph.pools, tasks=tuple(tasks))


def number_of(graph: TaskGraph, name: str) -> int:
    return [task.name for task in graph.tasks].index(name)


POLICIES = {
    "streaming": {},
    "tied": {"tied": True},
    "first layer first": {"update_order": (0, 1, 2, 3, 4)},
    "one gradient slot": {"gradient_slots": 1, "host_gradient_slots": 1},
    "offloaded boundaries": {"offload_boundaries": True},
    "hybrid": {"layers": 4, "resident_weights": (1,), "resident_state": (3,), "keep": (3,), "tied": True},
    "everything": {
        "layers": 5, "window": 3, "resident_weights": (2,), "resident_state": (0, 5), "keep": (5,), "tied": True,
        "offload_boundaries": True, "update_order": (6, 1, 3, 2, 4), "gradient_dtype": "bf16",
    },
    "all on the GPU": {"resident_state": (0, 1, 2, 3, 4), "keep": (1, 2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("knobs", POLICIES.values(), ids=POLICIES)
def test_every_dependency_is_necessary(knobs: dict):
    graph = graph_of(**knobs)
    validate(graph)
    edges = [(number, edge) for number, task in enumerate(graph.tasks) for edge in task.dependencies]
    assert len(edges) > 3
    for number, edge in edges:
        task = graph.tasks[number]
        rest = tuple(other for other in task.dependencies if other != edge)
        with pytest.raises(ValueError, match=r"^task .*: (reads|overwrites) slot \d+ of .* without waiting for "):
            validate(replaced(graph, number, dependencies=rest))


@pytest.mark.parametrize("knobs", POLICIES.values(), ids=POLICIES)
def test_without_a_dependency_some_order_of_lanes_spoils_data(knobs: dict):
    """The waiting task's lane runs first and the lane it waited for last."""
    graph = graph_of(**knobs)
    model = tiny_model(layers=knobs.get("layers", 3), tied_embeddings=knobs.get("tied", False))
    for number, task in enumerate(graph.tasks):
        for edge in task.dependencies:
            rest = tuple(other for other in task.dependencies if other != edge)
            late = graph.tasks[edge.task].lane
            with pytest.raises(AssertionError, match="finds"):
                run_lanes(
                    replaced(graph, number, dependencies=rest),
                    Contents(model, 2, graph),
                    3,
                    lambda ready, task=task, late=late: min(ready, key=lambda lane: (lane != task.lane) + (lane == late)),
                )


def test_message_names_both_tasks_and_the_slot():
    graph = graph_of()
    number = number_of(graph, "weights host>gpu/embedding")
    with pytest.raises(ValueError) as raised:
        validate(replaced(graph, number, dependencies=()))
    assert str(raised.value) == (
        "task weights host>gpu/embedding: reads slot 0 of host.weights.embedding without waiting for "
        "update host/embedding of the step before"
    )


def test_swapped_order():
    graph = graph_of()
    tasks = list(graph.tasks)
    first, second = number_of(graph, "forward/embedding/mb0"), number_of(graph, "weights host>gpu/embedding")
    tasks[first], tasks[second] = tasks[second], tasks[first]
    with pytest.raises(ValueError, match=r"task forward/embedding/mb0: depends on .* stands after it"):
        validate(TaskGraph(pools=graph.pools, tasks=tuple(tasks)))


def test_forward_edge():
    graph = graph_of()
    with pytest.raises(ValueError, match=rf"task {FIRST}: depends on \S+, which stands after it; stored order"):
        validate(replaced(graph, 0, dependencies=(Dependency(task=5, distance=0),)))


def test_edge_to_itself():
    with pytest.raises(ValueError, match="stands after it"):
        validate(replaced(graph_of(), 2, dependencies=(Dependency(task=2, distance=0),)))


def test_edge_to_a_task_that_does_not_exist():
    with pytest.raises(ValueError, match="depends on task 9999, which does not exist"):
        validate(replaced(graph_of(), 2, dependencies=(Dependency(task=9999, distance=1),)))


def test_slot_out_of_range():
    graph = graph_of()
    access = msgspec.structs.replace(graph.tasks[0].accesses[0], slot=1)
    with pytest.raises(ValueError, match=rf"task {FIRST}: slot 1 of host\.weights\.embedding is outside 0\.\.0\b"):
        validate(replaced(graph, 0, accesses=(access,)))


def test_unknown_pool():
    graph = graph_of()
    access = msgspec.structs.replace(graph.tasks[0].accesses[0], pool="gpu.attic")
    with pytest.raises(ValueError, match=r"task weights host>gpu/embedding: uses pool 'gpu\.attic', which does not exist"):
        validate(replaced(graph, 0, accesses=(access,)))


def test_duplicate_task_name():
    graph = graph_of()
    with pytest.raises(ValueError, match="two tasks are named weights host>gpu/embedding"):
        validate(replaced(graph, 3, name="weights host>gpu/embedding"))


def test_duplicate_pool_name():
    graph = graph_of()
    with pytest.raises(ValueError, match="two pools share a name"):
        validate(TaskGraph(pools=(*graph.pools, graph.pools[0]), tasks=graph.tasks))


def test_two_layers_in_one_slot():
    """A load into the slot of the unit that is being computed: ordered by nothing."""
    graph = graph_of(layers=4)
    number = number_of(graph, "weights host>gpu/layer001")
    slot = graph.tasks[number_of(graph, "weights host>gpu/layer000")].accesses[1]
    accesses = (graph.tasks[number].accesses[0], slot)
    with pytest.raises(ValueError, match=r"of gpu\.weights\.window without waiting for"):
        validate(replaced(graph, number, accesses=accesses))


def test_capacity_is_checked_per_tier_and_the_lack_is_stated():
    graph = graph_of()
    need = sum(pool.total_bytes for pool in graph.pools if pool.tier is Tier.GPU)
    validate(graph, {Tier.GPU: need})
    with pytest.raises(ValueError, match=r"of gpu memory, .* are there: lacks 1\.0 KiB"):
        validate(graph, {Tier.HOST: 1 << 40, Tier.GPU: need - 1024})
