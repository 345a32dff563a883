"""What tasks do, on which lanes, and how both are called."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph import operations
from slideplan.graph.lanes import Lane, LaneKind, order_of
from slideplan.graph.operations import COMPUTE_KINDS, Operation, TaskKind, compute, copy, host_pass, update
from slideplan.graph.replay import replay
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.graph.validate import validate
from slideplan.lowering.lower import lower
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.timeline import first_compute, step_record
from strategies import FOOTPRINT

GPU, HOST, SSD = Tier
WEIGHTS = (TensorClass.WEIGHTS,)


# -- operations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((TaskKind.COPY, SSD, GPU, WEIGHTS), "operation copy: no lane does it from ssd to gpu"),
        ((TaskKind.COPY, GPU, SSD, WEIGHTS), "operation copy: no lane does it from gpu to ssd"),
        ((TaskKind.COPY, HOST, HOST, WEIGHTS), "operation copy: no lane does it from host to host"),
        ((TaskKind.FORWARD, HOST, HOST), "operation forward: no lane does it from host to host"),
        ((TaskKind.LOSS, HOST, GPU), "operation loss: no lane does it from host to gpu"),
        ((TaskKind.UPDATE, SSD, SSD), "operation update: no lane does it from ssd to ssd"),
        ((TaskKind.UPDATE, HOST, GPU), "operation update: no lane does it from host to gpu"),
        ((TaskKind.CLIP_GRADIENT, GPU, GPU), "operation clip_gradient: no lane does it from gpu to gpu"),
        ((TaskKind.COPY, HOST, GPU), "operation copy: copies name the tensors that they move, nothing else does"),
        ((TaskKind.UPDATE, GPU, GPU, STATE), "operation update: copies name the tensors that they move"),
        ((TaskKind.FORWARD, GPU, GPU, WEIGHTS), "operation forward: copies name the tensors that they move"),
    ],
)
def test_operations_that_no_lane_does_are_refused(fields: tuple[Any, ...], message: str):
    with pytest.raises(ValueError, match=f"^{message}"):
        Operation(*fields)
    with pytest.raises(msgspec.ValidationError, match=message):  # of a file
        msgspec.json.decode(msgspec.json.encode(fields), type=Operation)


@pytest.mark.parametrize(
    ("operation", "name", "lane"),
    [
        (operations.FORWARD, "forward", LaneKind.COMPUTE),
        (operations.FORWARD_KEEP, "forward_keep", LaneKind.COMPUTE),
        (operations.LOSS, "loss", LaneKind.COMPUTE),
        (operations.BACKWARD, "backward", LaneKind.COMPUTE),
        (operations.BACKWARD_RECOMPUTE, "backward_recompute", LaneKind.COMPUTE),
        (operations.UPDATE_HOST, "update host", LaneKind.HOST_UPDATE),
        (operations.UPDATE_GPU, "update gpu", LaneKind.GPU_UPDATE),
        (operations.LOAD_WEIGHTS, "weights host>gpu", LaneKind.H2D),
        (operations.OFFLOAD_GRADIENT, "gradient gpu>host", LaneKind.D2H),
        (operations.OFFLOAD_BOUNDARY, "boundary gpu>host", LaneKind.D2H),
        (operations.FETCH_BOUNDARY, "boundary host>gpu", LaneKind.H2D),
        (operations.OFFLOAD_FEED_FORWARD, "feed_forward gpu>host", LaneKind.D2H),
        (operations.FETCH_FEED_FORWARD, "feed_forward host>gpu", LaneKind.H2D),
        (operations.LOAD_STATE, "state host>gpu", LaneKind.H2D),
        (operations.OFFLOAD_STATE, "state gpu>host", LaneKind.D2H),
        (operations.CAST_WEIGHTS, "cast_weights", LaneKind.HOST_CAST),
        (operations.CLIP_GRADIENT, "clip_gradient", LaneKind.HOST_UPDATE),
        (operations.REFRESH_WEIGHTS, "refresh_weights", LaneKind.HOST_UPDATE),
        (copy(SSD, HOST, TensorClass.MOMENTS), "moments ssd>host", LaneKind.SSD_READ),
        (copy(HOST, SSD, TensorClass.MOMENTS, TensorClass.WEIGHTS), "moments+weights host>ssd", LaneKind.SSD_WRITE),
    ],
)
def test_operations_have_a_name_and_a_lane(operation: Operation, name: str, lane: LaneKind):
    assert (str(operation), operation.lane) == (name, lane)
    assert msgspec.json.decode(msgspec.json.encode(operation), type=Operation) == operation


def test_every_verb_makes_an_operation_and_no_two_share_a_name():
    named = [value for value in vars(operations).values() if isinstance(value, Operation)]
    assert {operation.kind for operation in named} == set(TaskKind)
    assert len({str(operation) for operation in named}) == len(set(named)) == len(named)
    assert {operation for operation in named if operation.kind in COMPUTE_KINDS} == set(map(compute, COMPUTE_KINDS))
    assert host_pass(TaskKind.CLIP_GRADIENT) == operations.CLIP_GRADIENT
    assert update(HOST) == operations.UPDATE_HOST


# -- lanes -------------------------------------------------------------------------------------


def test_lanes_are_called_by_their_kind_and_those_of_other_devices_by_its_number_too():
    assert Lane(LaneKind.H2D) == Lane(LaneKind.H2D, 0)
    assert [Lane(LaneKind.H2D, device).name for device in (0, 1, 11)] == ["h2d", "h2d@1", "h2d@11"]
    assert str(Lane(LaneKind.GPU_UPDATE, 2)) == "gpu_update@2"
    every = [Lane(kind, device) for kind in LaneKind for device in range(3)]
    assert len({lane.name for lane in every}) == len(every)


def test_lanes_are_listed_by_device_and_then_as_they_are_declared():
    every = [Lane(kind, device) for kind in reversed(LaneKind) for device in (1, 0)]
    assert sorted(every, key=order_of) == [Lane(kind, device) for device in (0, 1) for kind in LaneKind]


def twice(graph: TaskGraph) -> TaskGraph:
    """The graph on two devices at once, with slots of their own."""

    def on_second(task: Task) -> Task:
        return msgspec.structs.replace(
            task,
            name=f"{task.name}@1",
            device=1,
            accesses=tuple(msgspec.structs.replace(access, pool=f"{access.pool}@1") for access in task.accesses),
            dependencies=tuple(
                msgspec.structs.replace(each, task=each.task + len(graph.tasks), pool=f"{each.pool}@1")
                for each in task.dependencies
            ),
        )

    pools = tuple(msgspec.structs.replace(pool, name=f"{pool.name}@1") for pool in graph.pools)
    return TaskGraph(pools=graph.pools + pools, tasks=graph.tasks + tuple(map(on_second, graph.tasks)))


def test_a_second_device_has_lanes_of_its_own():
    model = tiny_model()
    graph = lower(model, tiny_policy(model, offload_boundaries=True, resident_state=(2,)), tiny_workload(), FOOTPRINT)
    both = twice(graph)
    validate(both)
    total = len(graph.tasks)
    assert list(both.lanes) == [Lane(lane.kind, device) for device in (0, 1) for lane in graph.lanes]
    for lane, queue in graph.lanes.items():
        assert both.queue(lane.kind) == queue
        assert both.queue(lane.kind, 1) == tuple(number + total for number in queue)
    assert both.queue(LaneKind.COMPUTE, 2) == ()
    assert both.lane_position == graph.lane_position * 2

    durations = [1 + number % 7 for number in range(total)]
    step_ns, spans = replay(graph, durations)
    both_ns, both_spans = replay(both, durations * 2)
    assert (both_ns, both_spans) == (step_ns, spans * 2)
    lanes = step_record(both, tiny_workload(), both_ns, both_spans, {}).lanes
    assert list(lanes) == [lane.name for lane in graph.lanes] + [f"{lane.name}@1" for lane in graph.lanes]
    assert all(lanes[f"{lane.name}@1"] == lanes[lane.name] for lane in graph.lanes)
    assert first_compute(both) == first_compute(graph)


def test_a_task_keeps_its_device_in_files():
    model = tiny_model()
    both = twice(lower(model, tiny_policy(model), tiny_workload(), FOOTPRINT))
    assert msgspec.json.decode(msgspec.json.encode(both), type=TaskGraph) == both
