from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from builders import tiny_machine, tiny_model, tiny_policy, tiny_save, tiny_workload
from slideplan import __version__, codec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.replay import replay
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.measurement import Measurement, compare, expected_step_ns
from slideplan.placement import Tier
from slideplan.plan import MachineReference, Plan, Prediction, SearchRecord
from slideplan.timeline import StepRecord, step_record
from slideplan.trace import write_trace
from strategies import FOOTPRINT


def record(graph, task_ns, peak: int = 1000, scale: float = 1.0) -> StepRecord:
    step_ns, spans = replay(graph, task_ns)
    return step_record(graph, tiny_workload(), round(step_ns * scale), spans, {Tier.GPU: peak, Tier.HOST: peak})


@pytest.fixture
def plan() -> Plan:
    model, machine = tiny_model(), tiny_machine()
    policy = tiny_policy(model)
    graph = lower(model, policy, tiny_workload(), FOOTPRINT)
    predicted = record(graph, [1000] * len(graph.tasks))
    memory = ledger(graph, machine)
    return Plan(
        version=__version__,
        model=model,
        model_digest=codec.digest(model),
        machine=MachineReference.of(machine),
        workload=tiny_workload(),
        policy=policy,
        footprint=FOOTPRINT,
        graph=graph,
        ledger=memory,
        prediction=Prediction(
            record=predicted,
            lower_bound_ns=1,
            critical_ns={},
            cost_sources={},
            host_updates_ns=1000 * len(graph.queue(LaneKind.HOST_UPDATE)),
            save=tiny_save(model, policy, memory),
        ),
        search=SearchRecord(candidates=1, pruned_by_capacity=0, pruned_by_bound=0, simulated=1),
        offloads=True,
    )


def measurement_of(plan: Plan, task_ns: int, scale: float) -> Measurement:
    durations = [task_ns] * len(plan.graph.tasks)
    measured = record(plan.graph, durations, peak=1100, scale=scale)
    return Measurement(
        version=__version__, plan_digest=codec.digest(plan), machine=tiny_machine().identity(), versions={}, date="",
        command="",
        steady_steps=(1, 2, 3, 4), step_ns=(10**9, *[measured.step_ns] * 4), losses=(1.0,) * 5,
        task_ns=tuple(durations), record=measured,
    )  # fmt: skip


def test_errors_are_split_between_cost_model_and_structure(plan: Plan):
    """Tasks take twice as long as predicted, and the step a quarter longer than such tasks explain."""
    found = compare(plan, measurement_of(plan, 2000, scale=1.25))
    predicted = plan.prediction.record.step_ns
    assert (found.step.predicted, found.step.replayed, found.step.measured) == (predicted, 2 * predicted, 2.5 * predicted)
    assert found.cost_model_error == pytest.approx(-0.5)
    assert found.structure_error == pytest.approx(-0.2)
    assert found.step.error == pytest.approx(-0.6)
    assert found.step_spread == 0
    loads = next(row for row in found.kinds if row.name == "weights host>gpu")
    assert (loads.predicted, loads.replayed, loads.measured) == (8000, 16000, 16000)
    assert [(row.predicted, row.replayed, row.measured) for row in found.memory] == [(1000, None, 1100)] * 2


def test_host_updates_that_were_rehearsed_say_what_step_to_expect(plan: Plan):
    """Twice as long in rehearsal: as a step of updates twice as long, whatever the run then took."""
    updates = plan.graph.queue(LaneKind.HOST_UPDATE)
    prediction = msgspec.structs.replace(plan.prediction, host_updates_ns=1000 * len(updates))
    plan = msgspec.structs.replace(plan, prediction=prediction)
    measurement = measurement_of(plan, 1500, scale=1.0)
    assert compare(plan, measurement).rehearsed is None
    as_planned = msgspec.structs.replace(measurement, rehearsed_ns=1000 * len(updates))
    row = compare(plan, as_planned).rehearsed
    assert row is not None
    assert (row.predicted, row.measured) == (plan.prediction.record.step_ns, measurement.record.step_ns)
    longer = [5000 if number in updates else 1000 for number in range(len(plan.graph.tasks))]
    assert expected_step_ns(plan, 5000 * len(updates)) == replay(plan.graph, longer)[0] > plan.prediction.record.step_ns
    # A step that is a tenth longer than its tasks say, with updates that others slow to twice their time: both stay so.
    slowed = [2000 if number in updates else 1000 for number in range(len(plan.graph.tasks))]
    prediction = msgspec.structs.replace(prediction, record=record(plan.graph, slowed, scale=1.1))
    slowed_plan = msgspec.structs.replace(plan, prediction=prediction)
    longer = [3000 if number in updates else 1000 for number in range(len(plan.graph.tasks))]
    expected_ns = 1.1 * replay(plan.graph, longer)[0]
    assert expected_step_ns(slowed_plan, 1500 * len(updates)) == pytest.approx(expected_ns, rel=1e-3)
    with pytest.raises(ValueError, match="rehearsed_ns is 0, must be positive"):
        msgspec.structs.replace(measurement, rehearsed_ns=0).__post_init__()


def test_a_run_of_another_plan_is_refused(plan: Plan):
    other = msgspec.structs.replace(plan, version="other")
    with pytest.raises(ValueError, match="compare a run with the plan it executed"):
        compare(other, measurement_of(plan, 1000, 1.0))


def test_plan_survives_its_file_and_checks_itself(plan: Plan, tmp_path: Path):
    codec.save(tmp_path / "plan.json", plan)
    loaded = codec.load(tmp_path / "plan.json", Plan)
    assert loaded == plan
    loaded.check("plan.json")


def test_a_changed_plan_is_refused(plan: Plan):
    other = msgspec.structs.replace(plan, model=tiny_model(ffn=256))
    with pytest.raises(ValueError, match=r"plan\.json: `model` was changed after planning"):
        other.check("plan.json")
    other = msgspec.structs.replace(plan, workload=tiny_workload(global_batch=6))
    with pytest.raises(ValueError, match=r"plan\.json: policy\.micro_batch .* the global batch is 6; plan again"):
        other.check("plan.json")
    tasks = tuple(msgspec.structs.replace(task, dependencies=()) for task in plan.graph.tasks)
    other = msgspec.structs.replace(plan, graph=msgspec.structs.replace(plan.graph, tasks=tasks))
    with pytest.raises(ValueError, match=r"plan\.json: task .* without waiting for .*; plan again"):
        other.check("plan.json")


@pytest.mark.parametrize("field", ["checkpoint_bytes", "weights_bytes", "staging_bytes", None])
def test_a_plan_with_saves_of_another_is_refused(plan: Plan, field: str | None):
    """A run reserves and writes what the plan says of saves. None: the plan says nothing."""
    save = plan.prediction.save
    assert save is not None
    changed = None if field is None else msgspec.structs.replace(save, **{field: getattr(save, field) + 1})
    other = msgspec.structs.replace(plan, prediction=msgspec.structs.replace(plan.prediction, save=changed))
    with pytest.raises(ValueError, match=r"^plan\.json: `prediction\.save` is not of `policy` and `ledger`; plan again$"):
        other.check("plan.json")


def test_trace_has_a_track_per_lane_and_record(plan: Plan, tmp_path: Path):
    write_trace(tmp_path / "trace.json", plan.graph, {"predicted": plan.prediction.record, "measured": plan.prediction.record})
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert len(spans) == 2 * len(plan.graph.tasks)
    assert min(event["ts"] for event in spans) == 0
    assert all(event["dur"] == 1 for event in spans)
    assert [event["name"] for event in spans[: len(plan.graph.tasks)]] == [task.name for task in plan.graph.tasks]
    for event, number in zip(spans, [*range(len(plan.graph.tasks))] * 2, strict=True):
        assert event["args"]["waits for"] == "; ".join(plan.graph.why(number))
    assert any("still read by" in event["args"]["waits for"] for event in spans)
    assert {event["args"]["name"] for event in events if event["name"] == "thread_name"} == {
        lane.name for lane in plan.graph.lanes
    }
