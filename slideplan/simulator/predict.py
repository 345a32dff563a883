"""From a task graph to a prediction."""

from __future__ import annotations

from slideplan.plan.graph import TaskGraph
from slideplan.plan.ledger import Ledger
from slideplan.plan.machine import MachineProfile
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import Prediction
from slideplan.plan.policy import Workload
from slideplan.plan.timeline import step_record
from slideplan.simulator.analysis import critical_path, lower_bound
from slideplan.simulator.costs import Source, price
from slideplan.simulator.engine import simulate
from slideplan.simulator.resources import capacities

_WORSE: tuple[Source, ...] = ("measured", "scaled", "derived")


def predict(
    graph: TaskGraph, model: ModelSpec, micro_batch: int, workload: Workload, machine: MachineProfile, ledger: Ledger
) -> Prediction:
    """Price and simulate a graph on a machine; peak bytes are the ledger's.

    Raises DeadlockError for a graph that cannot run.
    """
    costs = price(graph, model, micro_batch, workload.seq_len, machine)
    shared = capacities(machine)
    bound_ns = lower_bound(graph, costs, shared)
    step_ns, spans = simulate(graph, costs, shared)
    # A run may end before it is steady, with a lane that falls behind by too little to show.
    step_ns = max(step_ns, bound_ns)
    sources: dict[str, str] = {}
    for task, cost in zip(graph.tasks, costs, strict=True):
        worst = sources.get(task.kind, cost.source)
        sources[task.kind] = max(worst, cost.source, key=_WORSE.index)
    return Prediction(
        record=step_record(graph, workload, step_ns, spans, ledger.peak_bytes()),
        lower_bound_ns=bound_ns,
        critical_ns=critical_path(graph, step_ns, spans),
        cost_sources=sources,
    )
