from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from builders import tiny_model, tiny_policy, tiny_workload
from contents import Contents, run_lanes
from slideplan.graph.clocks import clocks, knows
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import (
    LOAD_STATE,
    LOAD_WEIGHTS,
    OFFLOAD_GRADIENT,
    OFFLOAD_STATE,
    READ_MOMENTS,
    READ_STATE,
    UPDATE_GPU,
    UPDATE_HOST,
    WRITE_MOMENTS,
    WRITE_STATE,
    Operation,
    TaskKind,
    copy,
)
from slideplan.graph.tasks import Role, TaskGraph
from slideplan.graph.validate import validate
from slideplan.lowering.lower import lower
from slideplan.placement import TensorClass, Tier
from strategies import FOOTPRINT, Case, cases


def graph_of(model=None, workload=None, **knobs) -> TaskGraph:
    model = model or tiny_model()
    return lower(model, tiny_policy(model, **knobs), workload or tiny_workload(), FOOTPRINT)


def by_kind(graph: TaskGraph, kind: TaskKind | Operation) -> list:
    return [task for task in graph.tasks if kind in (task.kind, task.operation)]


@given(cases())
def test_any_legal_policy_lowers_to_a_valid_graph(case: Case):
    validate(case.graph())


@given(cases(), st.integers())
def test_every_task_finds_its_data_whatever_lane_runs_first(case: Case, seed: int):
    graph = case.graph()
    choose = random.Random(seed).choice
    run_lanes(graph, Contents(case.model, case.policy.micro_batches, graph), 3, choose)


@given(cases())
def test_every_task_finds_its_data_when_one_lane_runs_as_far_as_it_can(case: Case):
    graph = case.graph()
    for eager in graph.lanes:
        contents = Contents(case.model, case.policy.micro_batches, graph)
        run_lanes(graph, contents, 3, lambda ready, eager=eager: eager if eager in ready else ready[0])


# Of lean state, which has no remainder.
LOAD_MOMENTS = copy(Tier.HOST, Tier.GPU, TensorClass.MOMENTS)
OFFLOAD_MOMENTS = copy(Tier.GPU, Tier.HOST, TensorClass.MOMENTS)


@given(cases())
def test_each_unit_is_computed_and_updated_once_per_step(case: Case):
    graph, model, policy = case.graph(), case.model, case.policy
    micros = list(range(policy.micro_batches))
    forward = [(t.unit, t.micro) for t in graph.tasks if t.kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP, TaskKind.LOSS)]
    backward = [
        (t.unit, t.micro) for t in graph.tasks if t.kind in (TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE, TaskKind.LOSS)
    ]
    assert forward == [(unit, micro) for unit in range(model.units) for micro in micros]
    assert backward == [(unit, micro) for unit in reversed(range(model.units)) for micro in micros]
    orders = {
        UPDATE_HOST: (policy.update_order, (READ_STATE, READ_MOMENTS), (WRITE_STATE, WRITE_MOMENTS)),
        UPDATE_GPU: (range(model.units)[::-1], (LOAD_STATE, LOAD_MOMENTS), (OFFLOAD_STATE, OFFLOAD_MOMENTS)),
    }
    for operation, (order, arrivals, departures) in orders.items():
        updated = [unit for unit in order if policy.units[unit].update is operation.target]
        passing = {unit: range(policy.chunks(model, unit)) for unit in updated if policy.passing(unit)}
        found = [(task.unit, task.chunk) for task in by_kind(graph, operation)]
        assert found == [(unit, chunk) for unit in updated for chunk in passing.get(unit, (UNSET,))]
        chunks = [(unit, chunk) for unit, each in passing.items() for chunk in each]
        for moves in (arrivals, departures):
            moved = [task for task in graph.tasks if task.operation in moves and task.unit in passing]
            assert [(task.unit, task.chunk) for task in moved] == chunks
        from_drive = [(unit, chunk) for unit, chunk in chunks if policy.units[unit].moments is Tier.SSD]
        for moves in ((READ_STATE, READ_MOMENTS), (WRITE_STATE, WRITE_MOMENTS)):
            moved = [task for task in graph.tasks if task.operation in moves and task.unit in passing]
            assert [(task.unit, task.chunk) for task in moved] == from_drive


@given(cases())
def test_a_load_waits_for_the_update_of_the_step_before(case: Case):
    graph = case.graph()
    updates = {task.unit: number for number, task in enumerate(graph.tasks) if task.operation == UPDATE_HOST}
    for step, number, clock in clocks(graph, steps=2):
        task = graph.tasks[number]
        if step == 1 and task.operation == LOAD_WEIGHTS:
            assert knows(clock, graph, 0, updates[task.unit])


@given(cases())
def test_at_most_one_dependency_per_other_lane(case: Case):
    graph = case.graph()
    for task in graph.tasks:
        lanes = Counter(graph.tasks[dependency.task].lane for dependency in task.dependencies)
        assert task.lane not in lanes
        assert all(count == 1 for count in lanes.values())


@pytest.mark.parametrize("layers", [1, 2, 4, 6])
@pytest.mark.parametrize("window", [2, 3, 4, 6, 7])
def test_turn_around_keeps_the_last_layers_in_the_window(layers: int, window: int):
    graph = graph_of(tiny_model(layers=layers), window=window, prefetch_depth=1)
    loads = Counter(task.unit for task in by_kind(graph, LOAD_WEIGHTS) if 0 < task.unit <= layers)
    assert loads == {unit: 1 if unit > layers - window else 2 for unit in range(1, layers + 1)}


def test_resident_weights_of_host_state_load_once_and_keep_their_slot():
    graph = graph_of(resident_weights=(1, 2))
    loads = [task for task in by_kind(graph, LOAD_WEIGHTS) if task.unit in (1, 2)]
    assert [task.unit for task in loads] == [1, 2]
    assert {task.slot(Role.WEIGHTS) for task in loads} == {("gpu.weights.layer", 0), ("gpu.weights.layer", 1)}
    assert graph.pool["gpu.weights.window"].count == 2


def test_loads_are_issued_prefetch_depth_visits_ahead():
    for depth in (1, 2, 3):
        graph = graph_of(tiny_model(layers=6), window=4, prefetch_depth=depth)
        names = [task.name for task in graph.tasks]
        load = names.index("weights host>gpu/layer005")
        following = next(task for task in graph.tasks[load:] if task.lane.kind is LaneKind.COMPUTE)
        assert following.unit == 6 - depth
        assert following.micro == 0


def test_state_on_the_gpu_leaves_no_host_tasks():
    graph = graph_of(resident_state=tuple(range(6)))
    assert {lane.kind for lane in graph.lanes} == {LaneKind.COMPUTE, LaneKind.GPU_UPDATE}
    assert all(pool.tier is Tier.GPU for pool in graph.pools)


def test_gradients_are_overwritten_by_the_first_micro_batch_and_summed_by_the_others():
    for tied in (False, True):
        graph = graph_of(tiny_model(tied_embeddings=tied), tiny_workload(global_batch=6), micro_batches=3)
        modes = {
            (task.unit, task.micro, access.role): access.mode
            for task in graph.tasks
            if task.lane.kind is LaneKind.COMPUTE
            for access in task.accesses
            if access.role in (Role.GRADIENT, Role.TIED_GRADIENT)
        }
        for (unit, micro, role), mode in modes.items():
            # The tied head opens the embedding's gradient, the embedding's own backward adds to it.
            adds = micro > 0 or (tied and unit == 0 and role is Role.GRADIENT)
            assert mode == ("rw" if adds else "w"), (unit, micro, role)
        assert (5, 0, Role.TIED_GRADIENT) in modes if tied else (5, 0, Role.TIED_GRADIENT) not in modes


@pytest.mark.parametrize(("dtype", "element_bytes"), [("bf16", 2), ("fp32", 4)])
def test_gradient_dtype_sets_bytes_of_slots_and_transfers(dtype: str, element_bytes: int):
    model = tiny_model()
    graph = graph_of(model, gradient_dtype=dtype)
    for pool in graph.pools:
        if pool.tensor_class is TensorClass.GRADIENT:
            elements = {"embedding": 16384, "layer": 36992, "head": 16448}[pool.name.split(".")[-1]]
            assert pool.slot_bytes == element_bytes * elements
    layer = next(task for task in by_kind(graph, OFFLOAD_GRADIENT) if task.unit == 1)
    assert layer.bytes_moved == element_bytes * 36992
    update = next(task for task in by_kind(graph, UPDATE_HOST) if task.unit == 1)
    assert update.bytes_moved == (24 + element_bytes) * 36992


def test_recompute_adds_a_forward_to_the_flops():
    model = tiny_model()
    flops = {
        task.kind: task.flops
        for task in graph_of(model, keep=(2,)).tasks
        if task.lane.kind is LaneKind.COMPUTE and task.unit in (1, 2)
    }
    assert flops[TaskKind.FORWARD] == flops[TaskKind.FORWARD_KEEP]
    assert flops[TaskKind.BACKWARD_RECOMPUTE] == flops[TaskKind.BACKWARD] + flops[TaskKind.FORWARD]


def test_too_few_host_gradient_slots_for_the_update_order_is_named():
    with pytest.raises(ValueError, match=r"policy\.host_gradient_slots is too small .* host\.gradient\.layer"):
        graph_of(update_order=(0, 1, 2, 3, 4, 5), host_gradient_slots=2)
