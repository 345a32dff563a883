"""Knobs that describe other systems: lowered by the same passes, so the same properties must hold."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import tiny_model, tiny_policy, tiny_workload
from contents import Contents, run_lanes
from slideplan.graph.clocks import clocks, knows
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import (
    FETCH_BOUNDARY,
    LOAD_WEIGHTS,
    OFFLOAD_BOUNDARY,
    OFFLOAD_GRADIENT,
    UPDATE_HOST,
    Operation,
    TaskKind,
)
from slideplan.graph.tasks import Role, TaskGraph, tier_bytes
from slideplan.graph.validate import validate
from slideplan.lowering.lower import lower
from slideplan.placement import Placement, Tier
from slideplan.policy import OtherSystem, Policy
from strategies import FOOTPRINT, Case, foreign_cases
from wording import says


def graph_of(model=None, workload=None, **knobs) -> TaskGraph:
    model = model or tiny_model()
    return lower(model, tiny_policy(model, **knobs), workload or tiny_workload(), FOOTPRINT)


def by_kind(graph: TaskGraph, kind: TaskKind | Operation) -> list:
    return [task for task in graph.tasks if kind in (task.kind, task.operation)]


def loads_that_wait_for_all_updates(graph: TaskGraph) -> list[bool]:
    """For each load of a step, whether all updates of the step before are known to have ended."""
    updates = [number for number, task in enumerate(graph.tasks) if task.operation == UPDATE_HOST]
    return [
        all(knows(clock, graph, 0, update) for update in updates)
        for step, number, clock in clocks(graph, steps=2)
        if step == 1 and graph.tasks[number].operation == LOAD_WEIGHTS
    ]


@settings(deadline=None)
@given(foreign_cases())
def test_any_mix_of_knobs_lowers_to_a_valid_graph(case: Case):
    validate(case.graph())


@settings(deadline=None)
@given(foreign_cases(), st.integers())
def test_every_task_finds_its_data_whatever_lane_runs_first(case: Case, seed: int):
    graph = case.graph()
    run_lanes(graph, Contents(case.model, case.policy.micro_batches, graph), 3, random.Random(seed).choice)


@settings(deadline=None)
@given(foreign_cases())
def test_every_task_finds_its_data_when_one_lane_runs_as_far_as_it_can(case: Case):
    graph = case.graph()
    for eager in graph.lanes:
        contents = Contents(case.model, case.policy.micro_batches, graph)
        run_lanes(graph, contents, 3, lambda ready, eager=eager: eager if eager in ready else ready[0])


@settings(deadline=None)
@given(foreign_cases())
def test_no_dependency_is_superfluous(case: Case):
    graph = case.graph()
    for number, task in enumerate(graph.tasks):
        for edge in task.dependencies:
            rest = tuple(other for other in task.dependencies if other != edge)
            tasks = list(graph.tasks)
            tasks[number] = msgspec.structs.replace(task, dependencies=rest)
            with pytest.raises(ValueError, match="without waiting for"):
                validate(TaskGraph(pools=graph.pools, tasks=tuple(tasks)))


@settings(deadline=None)
@given(foreign_cases())
def test_with_a_step_barrier_every_load_waits_for_all_updates_of_the_step_before(case: Case):
    graph = case.graph()
    assert all(loads_that_wait_for_all_updates(graph)) or not case.policy.system.step_barrier


@settings(deadline=None)
@given(foreign_cases())
def test_clipping_passes_over_all_gradients_before_the_first_update(case: Case):
    graph = case.graph()
    queue = [graph.tasks[number] for number in graph.queue(LaneKind.HOST_UPDATE)]
    clipped = [task.unit for task in queue if task.kind is TaskKind.CLIP_GRADIENT]
    if case.policy.system.clipping == "none":
        assert not clipped
        return
    assert sorted(clipped) == [*range(case.model.units)]
    assert all(task.kind is TaskKind.CLIP_GRADIENT for task in queue[: len(clipped)])


def test_without_a_barrier_the_first_load_waits_for_its_own_update_only():
    order = (0, 1, 2, 3, 4, 5)
    assert not loads_that_wait_for_all_updates(graph_of(update_order=order))[0]
    assert loads_that_wait_for_all_updates(graph_of(update_order=order, step_barrier=True))[0]


def test_each_load_of_an_fp32_master_casts_into_the_one_staging_buffer():
    graph = graph_of(master="fp32", staging="per_load")
    loads, casts = by_kind(graph, LOAD_WEIGHTS), by_kind(graph, TaskKind.CAST_WEIGHTS)
    assert [task.unit for task in casts] == [task.unit for task in loads]
    assert graph.pool["host.staging"].count == 1
    assert {task.slot(Role.WEIGHTS, Tier.HOST) for task in (*loads, *casts)} == {("host.staging", 0)}
    assert all(cast.lane.kind is LaneKind.HOST_CAST for cast in casts)
    layer = next(task for task in casts if task.unit == 1)
    assert layer.bytes_moved == (4 + 2) * 36992
    update = next(task for task in by_kind(graph, UPDATE_HOST) if task.unit == 1)
    assert update.bytes_moved == (24 + 4) * 36992


@pytest.mark.parametrize(
    ("master", "staging", "bytes_per_element", "update_bytes"),
    [
        ("split", "none", 2 + 2 + 8, 24),
        ("fp32", "per_load", 4 + 8, 24),  # and one staging buffer
        ("fp32", "per_update", 4 + 2 + 8, 24),
        ("bf16", "none", 2 + 8, 20),
        ("bf16", "per_update", 2 + 2 + 8, 20),
    ],
)
def test_bytes_per_element_of_each_weight_format(master: str, staging: str, bytes_per_element: int, update_bytes: int):
    model = tiny_model()
    graph = graph_of(model, master=master, staging=staging)
    elements = 16384 + 4 * 36992 + 16448
    state = sum(pool.total_bytes for pool in graph.pools if pool.tier is Tier.HOST and ".gradient." not in pool.name)
    staged = 2 * 36992 if staging == "per_load" else 0
    assert state - staged == bytes_per_element * elements
    update = next(task for task in by_kind(graph, UPDATE_HOST) if task.unit == 1)
    assert update.bytes_moved == (update_bytes + 4) * 36992


def test_shared_copy_lanes_are_one_fifo_in_issue_order():
    graph = graph_of(copy_lanes="shared", offload_boundaries=True)
    assert not graph.queue(LaneKind.H2D)
    assert not graph.queue(LaneKind.D2H)
    assert {graph.tasks[number].operation for number in graph.queue(LaneKind.COPY)} == {
        LOAD_WEIGHTS, OFFLOAD_GRADIENT, OFFLOAD_BOUNDARY, FETCH_BOUNDARY,
    }  # fmt: skip
    separate = graph_of(offload_boundaries=True)
    assert [task.name for task in graph.tasks] == [task.name for task in separate.tasks]


def uniform(model, **knobs) -> Policy:
    policy = tiny_policy(model, unit_slots="uniform", host_gradient_slots=1, **knobs)
    if not model.tied_embeddings:
        return policy
    units = (*policy.units[:-1], Placement(weights=Tier.GPU))
    return msgspec.structs.replace(policy, units=units)


@pytest.mark.parametrize("tied", [False, True])
def test_uniform_slots_are_of_the_largest_unit_and_serve_every_unit(tied: bool):
    model = tiny_model(vocabulary=4096, tied_embeddings=tied)
    graph = lower(model, uniform(model), tiny_workload(), FOOTPRINT)
    largest = 4096 * 64 + (0 if tied else 64)
    assert graph.pool["gpu.weights.window"].total_bytes == 2 * 2 * largest
    assert graph.pool["gpu.gradient.window"].total_bytes == 2 * 4 * largest
    assert graph.pool["host.gradient.window"].total_bytes == 4 * largest
    loads = Counter(task.unit for task in by_kind(graph, LOAD_WEIGHTS))
    # A tied vocabulary is loaded for its gather and again for the loss; its backward reads no weights.
    assert loads[0] == (2 if tied else 1)
    assert loads[model.head_unit] == 1
    assert "gpu.weights.embedding" not in graph.pool


def test_uniform_slots_with_tied_embeddings_need_a_slot_for_the_final_norm():
    model = tiny_model(tied_embeddings=True)
    policy = tiny_policy(model, unit_slots="uniform")
    with pytest.raises(ValueError, match=r"set policy\.units\[5\]\.weights to gpu"):
        policy.check(model, tiny_workload())


def test_pinned_sizes_round_up_what_copies_touch_and_nothing_else():
    knobs = {"master": "fp32", "staging": "per_load", "offload_boundaries": True}
    exact, rounded = graph_of(**knobs), graph_of(**knobs, pinned_sizes="power_of_two")
    for pool, other in zip(exact.pools, rounded.pools, strict=True):
        pinned = pool.tier is Tier.HOST and pool.name.split(".")[1] in ("staging", "gradient", "boundary")
        if pinned:
            assert pool.slot_bytes <= other.slot_bytes < 2 * pool.slot_bytes
            assert other.slot_bytes.bit_count() == 1
        else:
            assert other == pool
    assert tier_bytes(rounded.pools, Tier.HOST) > tier_bytes(exact.pools, Tier.HOST)


def test_checkpoint_interval_runs_all_but_the_last_layer_of_a_block_again():
    model = tiny_model(layers=5)
    graph = graph_of(model, checkpoint_interval=2, boundary_slots=6)
    again = [task.unit for task in graph.tasks if task.kind is TaskKind.FORWARD and task.name.endswith("/pass2")]
    assert again == [3, 3, 1, 1]
    loads = Counter(task.unit for task in by_kind(graph, LOAD_WEIGHTS) if 0 < task.unit <= 5)
    assert loads == {1: 2, 2: 2, 3: 2, 4: 2, 5: 1}  # a window of two keeps both layers of a block for its backward
    wide = graph_of(tiny_model(layers=6), checkpoint_interval=3, boundary_slots=6)
    assert max(Counter(task.unit for task in by_kind(wide, LOAD_WEIGHTS)).values()) == 3
    assert graph.pool["gpu.boundary"].count == 2 * 4  # embedding, layers 2 and 4, and 5 for the loss


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"master": "fp32"}, "policy.other.master fp32 does not go with staging none"),
        ({"staging": "per_load"}, "policy.other.master split does not go with staging per_load"),
        (
            {"step_barrier": True, "resident_state": (1,)},
            "policy.other (other) needs all state on the host and updated there, that of unit 1 is not",
        ),
        ({"checkpoint_interval": 0}, "policy.other.checkpoint_interval is 0, must be at least 1"),
        ({"checkpoint_interval": 2, "offload_boundaries": True}, "needs all boundary activations on the gpu"),
        ({"checkpoint_interval": 2}, "policy.boundary_slots is 0, must be at least"),
    ],
)
def test_refusals_name_the_knob(knobs: dict, message: str):
    model = tiny_model()
    with pytest.raises(ValueError) as raised:
        tiny_policy(model, **knobs).check(model, tiny_workload())
    assert says(str(raised.value), message)


def test_too_few_gradients_in_waiting_for_clipping_is_named():
    with pytest.raises(ValueError, match=r"policy\.host_gradient_slots is too small"):
        graph_of(clipping="serial", host_gradient_slots=2)


def test_a_policy_of_another_system_says_how_it_works():
    ours = tiny_policy(tiny_model())
    assert ours.other is None
    assert ours.system == OtherSystem(name="slideplan")
    policy = tiny_policy(tiny_model(), name="theirs", master="fp32", staging="per_load", checkpoint_interval=4)
    assert policy.system == OtherSystem(name="theirs", master="fp32", staging="per_load", checkpoint_interval=4)


def test_our_own_policies_leave_no_trace_of_others_in_files():
    encoded = msgspec.json.encode(tiny_policy(tiny_model()))
    assert b"other" not in encoded
    assert b"fifo" not in msgspec.json.encode(graph_of())
    assert b"fifo" in msgspec.json.encode(graph_of(copy_lanes="shared"))
