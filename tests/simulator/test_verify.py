"""`verify` accepts what the SimPy model finds too, and names the first task about which they disagree."""

from __future__ import annotations

import msgspec
import pytest

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import VerificationError, footprint, predict, verify
from slideplan.graph.tasks import TaskGraph
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.handoffs import Handoffs
from slideplan.machine.profile import MachineProfile
from slideplan.plan import Prediction
from slideplan.timeline import Span

MODEL = tiny_model()
POLICY = tiny_policy(MODEL, offload_boundaries=True)
MACHINE = tiny_machine(handoffs=Handoffs(device_to_device_ns=700, device_to_host_ns=5000, host_to_device_ns=9000))


def predicted(at: MachineProfile = MACHINE) -> tuple[TaskGraph, Prediction]:
    graph = lower(MODEL, POLICY, tiny_workload(), footprint(MODEL, POLICY, 32, at))
    return graph, predict(graph, MODEL, POLICY, tiny_workload(), at, ledger(graph, at))


def verified(graph: TaskGraph, prediction: Prediction) -> int:
    return verify(graph, MODEL, POLICY, 32, MACHINE, prediction)


def changed(prediction: Prediction, **fields: object) -> Prediction:
    return msgspec.structs.replace(prediction, record=msgspec.structs.replace(prediction.record, **fields))


def test_every_span_is_compared() -> None:
    graph, prediction = predicted()
    assert verified(graph, prediction) == len(graph.tasks) == len(prediction.record.spans)


@pytest.mark.parametrize("which", [0, 17, -1])
@pytest.mark.parametrize(("later_start", "later_end"), [(1, 0), (0, 1)])
def test_a_nanosecond_is_too_much(which: int, later_start: int, later_end: int) -> None:
    graph, prediction = predicted()
    spans = list(prediction.record.spans)
    spans[which] = Span(spans[which].start_ns + later_start, spans[which].end_ns + later_end)
    with pytest.raises(VerificationError) as refused:
        verified(graph, changed(prediction, spans=tuple(spans)))
    assert str(refused.value).startswith(f"task {graph.tasks[which].name}: predicted from ")


def test_so_is_a_nanosecond_of_the_step() -> None:
    graph, prediction = predicted()
    for step_ns in (prediction.record.step_ns - 1, prediction.record.step_ns + 1):
        with pytest.raises(VerificationError, match=r"^step: predicted "):
            verified(graph, changed(prediction, step_ns=step_ns))


def test_a_prediction_for_another_machine_is_refused() -> None:
    """One without the time that hand-offs between lanes take."""
    graph, prediction = predicted(tiny_machine())
    with pytest.raises(VerificationError):
        verified(graph, prediction)
