"""Pricing: what each task of a graph takes on a machine, in time and in shared bandwidth."""

from __future__ import annotations

from typing import Literal

from slideplan.plan.codec import Spec
from slideplan.plan.graph import LANE_OF, Lane, Task, TaskGraph, TaskKind
from slideplan.plan.machine import LayerShape, MachineProfile
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.simulator.formulas import compute_ns
from slideplan.simulator.measured import nearest
from slideplan.simulator.resources import Resource

Source = Literal["measured", "scaled", "derived"]


class TaskCost(Spec, frozen=True):
    """Cost of one task.

    duration_ns: time alone on an idle machine
    demand:      bytes/s that it takes from shared resources while it runs at full speed
    source:      "measured" at this very size, "scaled" from a measurement at another size, or "derived"
                 from rates, datasheet figures among them
    """

    duration_ns: int
    demand: dict[Resource, int]
    source: Source


def price(graph: TaskGraph, model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> tuple[TaskCost, ...]:
    """One cost per task, in the order of the graph's tasks.

    Copies take what the link's curve says, updates bytes_moved / rate of the optimizer. Compute tasks
    take what was measured for this shape, kind, micro-batch and sequence length; or, measured at
    another size, derived(here) x measured(there) / derived(there); or what `formulas` derives.
    """
    pricer = _Pricer(model, micro_batch, seq_len, machine)
    # Layers are alike, so a graph of thousands of tasks has a handful of prices.
    known: dict[tuple[TaskKind, UnitRole, int], TaskCost] = {}
    costs = []
    for task in graph.tasks:
        role = model.role(task.unit)
        key = task.kind, role, task.bytes_moved
        if key not in known:
            known[key] = pricer.cost(task, role)
        costs.append(known[key])
    return tuple(costs)


class _Pricer:
    def __init__(self, model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> None:
        self._model = model
        self._micro_batch = micro_batch
        self._seq_len = seq_len
        self._machine = machine
        self._rates_source: Source = "measured" if machine.provenance.source == "measured" else "derived"

    def cost(self, task: Task, role: UnitRole) -> TaskCost:
        match LANE_OF[task.kind]:
            case Lane.COMPUTE:
                return self._compute(task.kind, role)
            case Lane.H2D | Lane.D2H:
                return self._copy(task)
            case Lane.HOST_UPDATE | Lane.HOST_CAST:  # every pass over host memory runs at the rate of the fused update
                rate = self._machine.optimizer.host_bytes_per_s.p50
                return self._streaming(task.bytes_moved, rate, {Resource.HOST_DRAM: rate})
            case Lane.GPU_UPDATE:
                return self._streaming(task.bytes_moved, self._machine.optimizer.gpu_bytes_per_s.p50, {})
        raise ValueError(f"task {task.name}: lane {task.lane} has no price")

    def _streaming(self, size_bytes: int, rate_per_s: int, demand: dict[Resource, int]) -> TaskCost:
        duration = max(1, -(-size_bytes * 1_000_000_000 // rate_per_s))
        return TaskCost(duration_ns=duration, demand=demand, source=self._rates_source)

    def _copy(self, task: Task) -> TaskCost:
        """Curve of the direction. On the "cpu" backend a copy is a memcpy in RAM: it reads and writes DRAM."""
        link = self._machine.link
        duration = max(1, (link.h2d if LANE_OF[task.kind] is Lane.H2D else link.d2h).duration_ns(task.bytes_moved))
        rate = task.bytes_moved * 1_000_000_000 // duration
        passes = 2 if self._machine.gpu.backend == "cpu" else 1
        return TaskCost(
            duration_ns=duration,
            demand={Resource.PCIE: rate, Resource.HOST_DRAM: passes * rate},
            source=self._rates_source,
        )

    def _compute(self, kind: TaskKind, role: UnitRole) -> TaskCost:
        duration = self._derived_ns(kind, role, self._micro_batch, self._seq_len)
        cost = nearest(self._machine, LayerShape.of(self._model, role), kind, self._micro_batch, self._seq_len)
        if cost is None:
            return TaskCost(duration_ns=duration, demand={}, source="derived")
        if (cost.micro_batch, cost.seq_len) == (self._micro_batch, self._seq_len):
            return TaskCost(duration_ns=cost.duration_ns.p50, demand={}, source="measured")
        there = self._derived_ns(kind, role, cost.micro_batch, cost.seq_len)
        return TaskCost(duration_ns=max(1, duration * cost.duration_ns.p50 // there), demand={}, source="scaled")

    def _derived_ns(self, kind: TaskKind, role: UnitRole, micro_batch: int, seq_len: int) -> int:
        return compute_ns(self._model, role, kind, micro_batch, seq_len, self._machine.efficiency)
