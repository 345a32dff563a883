"""Which tasks run once before all are captured."""

from builders import tiny_model, tiny_policy, tiny_workload
from runtime.compute.handlers import one_of_each_sort
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.lowering.lower import lower


def test_one_unit_of_each_sort_with_all_its_tasks() -> None:
    model = tiny_model(layers=8)
    policy = tiny_policy(
        model, kernels="fused", keep=(7, 8), offload_inner=(4, 6), resident_state=(1,), offload_boundaries=True
    )
    graph = lower(model, policy, tiny_workload(), Footprint(inner_bytes=1 << 20, workspace_bytes=0))
    compute = [task for task in graph.tasks if task.lane.kind is LaneKind.COMPUTE and task.unit > 0]
    chosen = one_of_each_sort(compute)
    assert chosen == [task for task in compute if task in chosen], "in their order"
    # Layers that recompute, offload or keep, and the head.
    assert {task.unit for task in chosen} == {1, 4, 7, 9}
    assert len(chosen) == 2 * (3 * 2 + 1)
    kinds = {(task.kind, task.accumulates, len(task.accesses)) for task in compute}
    assert kinds == {(task.kind, task.accumulates, len(task.accesses)) for task in chosen}
