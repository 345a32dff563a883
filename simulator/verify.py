"""Holds a prediction against the SimPy model: the same graph, costs and hand-offs, one SimPy process per lane."""

from __future__ import annotations

from simulator.costs import price
from simulator.engine import simulate
from simulator.reference import SimPyEngine
from simulator.resources import capacities
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.plan import Prediction
from slideplan.policy import ComputePolicy
from slideplan.quantities import format_ns


class VerificationError(RuntimeError):
    """The two models of a schedule disagree: one of them is wrong."""


def verify(
    graph: TaskGraph, model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile, prediction: Prediction
) -> int:
    """Simulate the graph by the SimPy model as well; the number of spans compared.

    Raises VerificationError, naming the first task in which they differ. All spans are compared, to the nanosecond.
    """
    costs = price(graph, model, knobs, seq_len, machine)
    step_ns, spans = simulate(graph, costs, capacities(machine), machine.handoffs, engine=SimPyEngine)
    for task, ours, theirs in zip(graph.tasks, prediction.record.spans, spans, strict=True):
        if ours != theirs:
            raise VerificationError(
                f"task {task.name}: predicted from {format_ns(ours.start_ns)} to {format_ns(ours.end_ns)}, by the SimPy model "
                f"from {format_ns(theirs.start_ns)} to {format_ns(theirs.end_ns)}"
            )
    if max(step_ns, prediction.lower_bound_ns) != prediction.record.step_ns:
        raise VerificationError(
            f"step: predicted {format_ns(prediction.record.step_ns)}, by the SimPy model {format_ns(step_ns)}"
        )
    return len(spans)
