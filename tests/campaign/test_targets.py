"""Of the benchmark of targets, what runs without a GPU."""

from itertools import pairwise

import msgspec
import pytest

import targets
from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from campaign_draw import fixed_plan
from slideplan.graph.lanes import LaneKind
from slideplan.measurement import Measurement
from slideplan.plan import Plan
from slideplan.timeline import Span


def plan_of(**knobs: object) -> Plan:
    model = tiny_model()
    return fixed_plan(model, tiny_policy(model, **knobs), tiny_workload(), tiny_machine())


def test_mechanisms_are_switched_off_one_at_a_time() -> None:
    plan = plan_of(kernels="graphed", offload_inner=(2, 3), keep=(4,))
    fused = targets.without("captured graphs", plan, tiny_machine())
    assert fused.policy == msgspec.structs.replace(plan.policy, kernels="fused")
    here = targets.without("activations on the host", plan, tiny_machine())
    assert [unit.inner for unit in here.policy.units] == ["recompute"] * 4 + ["keep", "recompute"]
    assert here.policy.inner_slots == 0
    with pytest.raises(ValueError, match="no inner activations wait on the host"):
        targets.without("activations on the host", here, tiny_machine())
    with pytest.raises(ValueError, match="nothing is captured in this plan"):
        targets.without("captured graphs", fused, tiny_machine())


def test_waits_of_compute_and_what_of_them_nothing_accounts_for() -> None:
    """Every task takes 10 ns and starts when all it depends on is over; one begins 7 ns late."""
    plan = plan_of()
    graph, late = plan.graph, plan.graph.queue(LaneKind.COMPUTE)[3]
    spans: list[Span] = []
    free = dict.fromkeys(graph.lanes, 0)
    for number, task in enumerate(graph.tasks):
        ready = max([free[task.lane], *(spans[d.task].end_ns for d in task.dependencies if d.distance == 0)])
        start = ready + (7 if number == late else 0)
        spans.append(Span(start_ns=start, end_ns=start + 10))
        free[task.lane] = start + 10
    step_ns = max(span.end_ns for span in spans) + 5
    record = msgspec.structs.replace(plan.prediction.record, step_ns=step_ns, spans=tuple(spans))
    measurement = Measurement(
        version="", plan_digest="", machine=plan.machine.identity, versions={}, date="", command="", steady_steps=(0,),
        step_ns=(step_ns,), losses=(1.0,), task_ns=(10,) * len(spans), record=record,
    )  # fmt: skip
    found = targets.compute_gaps(plan, measurement)
    compute = [spans[number] for number in graph.queue(LaneKind.COMPUTE)]
    waits = [after.start_ns - before.end_ns for before, after in pairwise(compute)]
    assert found["idle"] * step_ns == pytest.approx(7)
    assert found["within"] * step_ns == pytest.approx(sum(waits))
    assert found["longest"] * step_ns == pytest.approx(max(waits))
    assert found["at_the_start"] * step_ns == pytest.approx(step_ns - compute[-1].end_ns)
