"""What saves cost a run: how long its lanes take to empty and to fill again, and what writing beside it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from simulator.costs import TaskCost, rates
from simulator.engine import STEADY_PARTS, EngineMaker, FastEngine, trace
from simulator.resources import capacities, sharing
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import copy
from slideplan.graph.replay import MAX_STEPS, steady_step
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.ledger import Ledger
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.profile import MachineProfile
from slideplan.machine.sharing import Resource
from slideplan.model import ModelSpec
from slideplan.placement import TensorClass, Tier
from slideplan.policy import Policy
from slideplan.saving import (
    BLOCK_BYTES,
    COPIER_BYTES_PER_S,
    SaveCost,
    checkpoint_bytes,
    copiers,
    staging_bytes,
    unit_optimizer_bytes,
    unit_weights_bytes,
    weights_bytes,
)
from slideplan.timeline import first_compute

# From a cold start to empty lanes. Most schedules are steady within a few steps.
DRAIN_STEPS = 8
# Of host memory, for each byte that is copied and hashed.
HASHED_PASSES = 3
# A write that runs beside steps is cut into tasks, one per step and each as long as this many steps, so that one always runs.
_STEPS_PER_WRITE = 2


def save_cost(
    graph: TaskGraph,
    costs: Sequence[TaskCost],
    model: ModelSpec,
    policy: Policy,
    machine: MachineProfile,
    memory: Ledger,
    step_ns: int,
) -> SaveCost:
    """What saves cost a run of this graph, whose steady step takes `step_ns`. `costs`: of its tasks, on this machine."""
    size_bytes = checkpoint_bytes(model, policy)
    write = rates(machine).get(LaneKind.SSD_WRITE)
    write_bytes_per_s = None if write is None else write.points[-1].rate.p50
    slowed = 0.0 if write_bytes_per_s is None else slowed_by_writing(graph, costs, machine, write_bytes_per_s, step_ns)
    return SaveCost(
        checkpoint_bytes=size_bytes,
        weights_bytes=weights_bytes(model),
        staging_bytes=staging_bytes(memory, size_bytes),
        drain_ns=drain_ns(graph, costs, capacities(machine), step_ns, machine.handoffs),
        copy_bytes_per_s=max(1, size_bytes * 1_000_000_000 // _copy_ns(model, policy, machine)),
        write_bytes_per_s=write_bytes_per_s,
        slowed=slowed,
    )


def drain_ns(
    graph: TaskGraph,
    costs: Sequence[TaskCost],
    shared: Mapping[Resource, int],
    step_ns: int,
    handoffs: Handoffs = IMMEDIATE,
    engine: EngineMaker = FastEngine,
) -> int:
    """By how much steps from a cold start to the end of their last task are longer than as many steady ones. Nanoseconds.

    Zero where a cold start gains as much as the end loses: the first step has no updates of another beside it.
    """
    steps = trace(graph, costs, shared, DRAIN_STEPS, engine, handoffs)
    end_ns = max(span.end_ns for spans in steps for span in spans)
    return max(0, end_ns - DRAIN_STEPS * step_ns)


def slowed_by_writing(
    graph: TaskGraph,
    costs: Sequence[TaskCost],
    machine: MachineProfile,
    write_bytes_per_s: int,
    step_ns: int,
    engine: EngineMaker = FastEngine,
) -> float:
    """Part of its speed that training loses while the drive writes at this rate beside it.

    The graph runs with a lane of writes that never rests. It takes of host memory what the machine's model of shared
    bandwidth says; the threads that feed the drive take nothing else.
    """
    shares = sharing(machine)
    demand = shares.demand(LaneKind.SSD_WRITE, write_bytes_per_s)
    if not demand:
        return 0.0
    writing = Task(
        name="save",
        operation=copy(Tier.HOST, Tier.SSD, TensorClass.MOMENTS),
        unit=0,
        micro=None,
        bytes_moved=0,
        flops=0,
        accesses=(),
    )
    cost = TaskCost(
        duration_ns=_STEPS_PER_WRITE * step_ns,
        demand=demand,
        source="derived",
        shares=shares.shares_of(LaneKind.SSD_WRITE),
    )
    beside = msgspec.structs.replace(graph, tasks=(*graph.tasks, writing))
    run = engine(beside, (*costs, cost), shares.capacities, MAX_STEPS, machine.handoffs)

    def next_step() -> tuple[list[int], list[int]]:
        """Without the write, which keeps a time of its own."""
        starts, ends = run.next_step()
        return starts[:-1], ends[:-1]

    slow_ns, _ = steady_step(next_step, first_compute(graph), STEADY_PARTS)
    return max(0.0, 1 - step_ns / max(1, slow_ns))


def _copy_ns(model: ModelSpec, policy: Policy, machine: MachineProfile) -> int:
    """How long it takes to copy a checkpoint's bytes from where they lie to other places on the host, and to hash them."""
    sizes: list[tuple[Tier, int]] = []  # of files
    for unit, placement in enumerate(policy.units):
        sizes.append((placement.tiers(TensorClass.WEIGHTS)[-1], unit_weights_bytes(model, unit)))
        sizes.append((placement.moments, unit_optimizer_bytes(model, policy, unit)))
    on = {tier: sum(size for where, size in sizes if where is tier) for tier in Tier}
    curves = rates(machine)
    block_ns = curves[LaneKind.D2H].duration_ns(BLOCK_BYTES)
    # What lies on the drive is read there first.
    read_ns = curves[LaneKind.SSD_READ].duration_ns(on[Tier.SSD]) if on[Tier.SSD] else 0
    # The copy reads and writes each byte, the hash reads it again.
    passed_ns = HASHED_PASSES * on[Tier.HOST] * 1_000_000_000 // machine.optimizer.host_bytes_per_s.p50
    # One thread has a file to itself, so none of them is through before the largest is.
    by_one = max(*(size for _, size in sizes), sum(on.values()) // copiers(machine.host.cores))
    threads_ns = by_one * 1_000_000_000 // COPIER_BYTES_PER_S
    return max(1, on[Tier.GPU] * block_ns // BLOCK_BYTES + passed_ns, threads_ns, read_ns)
