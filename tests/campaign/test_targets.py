"""Of the benchmark of targets, what runs without a GPU."""

from itertools import pairwise

import msgspec
import pytest

import targets
from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from campaign_draw import fixed_plan
from planner.catalogue.machines import with_budget
from planner.search.candidate import KEPT, RECOMPUTED
from slideplan.graph.lanes import LaneKind
from slideplan.measurement import Measurement
from slideplan.placement import Tier
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
    assert [(unit.inner, unit.feed_forward) for unit in here.policy.units] == [RECOMPUTED] * 4 + [KEPT, RECOMPUTED]
    assert here.policy.inner_slots == 0
    with pytest.raises(ValueError, match="no inner activations wait on the host"):
        targets.without("activations on the host", here, tiny_machine())
    with pytest.raises(ValueError, match="nothing is captured in this plan"):
        targets.without("captured graphs", fused, tiny_machine())


def test_kept_activations_and_our_kernels_are_switched_off() -> None:
    plan = plan_of(kernels="fused", offload_inner=(2, 3), keep=(4,))
    none = targets.without("kept activations", plan, tiny_machine())
    assert [(unit.inner, unit.feed_forward) for unit in none.policy.units] == [RECOMPUTED] * 6
    assert none.policy.inner_slots == 0
    eager = targets.without("fused kernels", plan, tiny_machine())
    assert (eager.policy.kernels, eager.policy.inner_slots) == ("eager", 0)
    # All that were kept still fit, whole; nothing waits on the host, which eager kernels cannot.
    assert [(unit.inner, unit.feed_forward) for unit in eager.policy.units] == [RECOMPUTED] * 2 + [KEPT] * 3 + [RECOMPUTED]


def test_with_eager_kernels_the_last_layers_keep_what_fits() -> None:
    plan = plan_of(kernels="fused", offload_inner=(2, 3), keep=(4,))
    eager = targets.without("fused kernels", plan, tiny_machine())
    taken = eager.ledger.tiers[Tier.GPU].used_bytes
    tight = with_budget(tiny_machine(), taken, None)  # less the reserve
    fewer = targets.without("fused kernels", plan, tight)
    kept = [unit for unit, placed in enumerate(fewer.policy.units) if placed.keeps]
    assert kept in ([3, 4], [4], [])
    assert fewer.ledger.fits


def test_state_that_passed_through_is_updated_by_the_host_in_order_of_need() -> None:
    plan = plan_of(stream_state=(2, 3), resident_state=(1,))
    host = targets.without("state passing through", plan, tiny_machine())
    assert not any(unit.passing for unit in host.policy.units)
    assert [unit.update for unit in host.policy.units] == [Tier.HOST, Tier.GPU, *[Tier.HOST] * 4]
    assert [unit.weights for unit in host.policy.units] == [unit.weights for unit in plan.policy.units]
    assert (host.policy.state_slots, host.policy.state_chunks) == (0, 0)
    assert host.policy.update_order == (0, 2, 3, 4, 5)
    assert host.policy.host_gradient_slots == 3
    with pytest.raises(ValueError, match="no state passes through the GPU in this plan"):
        targets.without("state passing through", host, tiny_machine())
    # Where gradients that wait for it do not fit, they are updated as they arrive.
    waiting = sum(pool.total_bytes for pool in host.graph.pools if pool.name == "host.gradient.layer")
    used = host.ledger.tiers[Tier.HOST].used_bytes
    tight = with_budget(tiny_machine(), None, (used - waiting // 6) * 100 // 97)
    arrival = targets.without("state passing through", plan, tight)
    assert arrival.policy.update_order == (5, 4, 3, 2, 0)
    assert arrival.policy.host_gradient_slots == 2


def test_updates_across_the_step_and_residency_are_switched_off() -> None:
    plan = plan_of(update_order=(0, 1, 2, 3, 4, 5))
    arrival = targets.without("updates across the step", plan, tiny_machine())
    assert arrival.policy == msgspec.structs.replace(plan.policy, update_order=(5, 4, 3, 2, 1, 0))
    host = targets.without("residency", plan_of(resident_state=(1, 2)), tiny_machine())
    assert all(unit.weights is unit.moments is unit.update is Tier.HOST for unit in host.policy.units)


def test_every_mechanism_is_known_and_no_other() -> None:
    plan = plan_of(kernels="graphed", offload_inner=(2,), stream_state=(3,))
    for mechanism in targets.MECHANISMS:
        assert targets.without(mechanism, plan, tiny_machine()).policy != plan.policy or mechanism == "updates across the step"
    with pytest.raises(ValueError, match="no mechanism 'magic'"):
        targets.without("magic", plan, tiny_machine())


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
