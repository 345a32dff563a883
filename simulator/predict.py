"""From a task graph to a prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulator.analysis import critical_path, lower_bound
from simulator.costs import Source, TaskCost, price
from simulator.engine import simulate
from simulator.resources import capacities
from simulator.saves import save_cost
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import TaskGraph
from slideplan.ledger import Ledger
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.plan import Prediction
from slideplan.policy import Policy, Workload
from slideplan.timeline import step_record
from slideplan.wear import DriveWear

_WORSE: tuple[Source, ...] = ("measured", "interpolated", "derived", "datasheet")


def predict(
    graph: TaskGraph, model: ModelSpec, policy: Policy, workload: Workload, machine: MachineProfile, ledger: Ledger
) -> Prediction:
    """Price and simulate a graph on a machine, and what saves cost it; peak bytes are the ledger's.

    Raises DeadlockError for a graph that cannot run.
    """
    costs = price(graph, model, policy, workload.seq_len, machine)
    shared = capacities(machine)
    bound_ns = lower_bound(graph, costs, shared, machine.handoffs)
    step_ns, spans = simulate(graph, costs, shared, machine.handoffs)
    # A run may end before it is steady, with a lane that falls behind by too little to show.
    step_ns = max(step_ns, bound_ns)
    sources: dict[str, str] = {}
    for task, cost in zip(graph.tasks, costs, strict=True):
        worst = sources.get(str(task.operation), cost.source)
        sources[str(task.operation)] = max(worst, cost.source, key=_WORSE.index)
    critical_ns = critical_path(graph, step_ns, spans)
    return Prediction(
        record=step_record(graph, workload, step_ns, spans, ledger.peak_bytes()),
        lower_bound_ns=bound_ns,
        critical_ns=critical_ns,
        cost_sources=sources,
        host_updates_ns=sum(costs[number].duration_ns for number in graph.queue(LaneKind.HOST_UPDATE)),
        step_uncertainty_percent=round(_step_uncertainty(graph, costs, critical_ns), 1),
        handoffs=machine.handoffs,
        save=None if policy.other else save_cost(graph, costs, model, policy, machine, ledger, step_ns),
        drive=DriveWear.of(graph, machine.ssd, step_ns),
    )


def _step_uncertainty(graph: TaskGraph, costs: Sequence[TaskCost], critical_ns: Mapping[str, int]) -> float:
    """Percent of the step time: each lane's uncertainty, by its tasks' time, for as long as it holds the critical path.

    Tasks of a kind share one figure and are off together, so lanes are added and not their squares. How
    well the model of contention fits is not in it.
    """
    total = 0.0
    for lane, queue in graph.lanes.items():
        work_ns = sum(costs[number].duration_ns for number in queue)
        off = sum(costs[number].duration_ns * costs[number].uncertainty_percent for number in queue) / max(1, work_ns)
        total += off * critical_ns.get(lane.name, 0)
    return total / max(1, sum(critical_ns.values()))
