"""Pricing: what each task of a graph takes on a machine, in time and in shared bandwidth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from simulator import formulas
from simulator.measured import measurements, nearest, neighbours
from simulator.resources import sharing
from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import Operation, TaskKind
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.machine.profile import ComputeCost, Curve, MachineProfile, RatePoint, Spread
from slideplan.machine.sharing import Resource
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from slideplan.policy import ComputeKnobs, ComputePolicy, Kernels, StateFormat

Source = Literal["measured", "interpolated", "derived", "datasheet"]

# Percent by which a cost may be off. A measured cost has its spread, and what two profiles of a machine
# differ by beyond it (clocks, temperature): 1. The others come from one H100 and an 8B layer measured at
# five micro-batches, each point held against what the rest says of it: between two points 3 at most,
# beyond them 5, scaled from one point 10. Layers and loss priced from rates alone are 14 to 45 short.
# Nobody measured the machine of a datasheet: its derating factors alone differ by half among machines.
REPEAT_PERCENT = 1.0
BETWEEN_PERCENT = 3.0
BEYOND_PERCENT = 5.0
SCALED_PERCENT = 10.0
DERIVED_PERCENT = 45.0
# Attention between shapes of equal tokens took 0.5 to 1.3 of what its rate at one shape says, a tenth of a layer.
ATTENTION_PERCENT = 30.0
DATASHEET_PERCENT = 50.0


class TaskCost(Spec, frozen=True):
    """Cost of one task.

    duration_ns: time alone on an idle machine
    demand:      bytes/s that it takes from shared resources while it runs at full speed
    source:      "measured" at this very size; "interpolated" from measurements at other sizes; "derived"
                 from measured rates; or "datasheet", derived from rates that nobody measured
    shares:      where a resource is full, 1 where none is given (see `machine.sharing.fair_speeds`)
    uncertainty_percent: by which the duration may be off, either way
    """

    duration_ns: int
    demand: dict[Resource, int]
    source: Source
    shares: dict[Resource, float] = msgspec.field(default_factory=dict)
    uncertainty_percent: float = 0.0


def price(
    graph: TaskGraph, model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile
) -> tuple[TaskCost, ...]:
    """One cost per task, in the order of the graph's tasks; `knobs` is the policy that the graph was lowered from.

    Copies take what the link's curve says, updates bytes_moved / rate of the optimizer. Compute tasks
    take what was measured for this shape, kind, kernels, way of writing gradients and size, or for another
    way with the traffic that the two differ by; or lie on the line through two measurements over tokens, with
    attention, which grows with the sequence too, left out and put back at its rate; or take derived(here) x
    measured(there) / derived(there); or what `formulas` derives. What is smaller than all that was measured takes
    no less than its launch, which is in the measurements of others.
    """
    pricer = _Pricer(model, knobs, seq_len, machine)
    # Layers are alike, so a graph of thousands of tasks has a handful of prices.
    known: dict[tuple[Operation, UnitRole, int, bool, bool], TaskCost] = {}
    costs = []
    for task in graph.tasks:
        role = model.role(task.unit)
        key = task.operation, role, task.bytes_moved, task.accumulates, pricer.takes_norm(task)
        if key not in known:
            known[key] = pricer.cost(task, role)
        costs.append(known[key])
    return tuple(costs)


_LAYER_KINDS = (TaskKind.FORWARD, TaskKind.BACKWARD_RECOMPUTE)


def layer_ns(model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile) -> int | None:
    """Forward and backward with recompute of one layer; None where they were not measured on this machine."""
    pricer = _Pricer(model, knobs, seq_len, machine)
    total_ns = 0
    for kind in _LAYER_KINDS:
        duration_ns, source, _ = pricer.compute_ns(kind, UnitRole.LAYER, accumulate=False)
        if source == "derived":
            return None
        total_ns += duration_ns
    return total_ns


def layer_launch_ns(kernels: Kernels, machine: MachineProfile) -> int:
    """Host time to issue one layer's forward and backward with recompute; zero where it was not measured."""
    return sum(
        launch.duration_ns.p50
        for launch in machine.launches
        if launch.kernels == kernels and launch.role is UnitRole.LAYER and launch.kind in _LAYER_KINDS
    )


class _Pricer:
    def __init__(self, model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile) -> None:
        self._model = model
        self._knobs = knobs
        self._seq_len = seq_len
        self._machine = machine
        self._sharing = sharing(machine)
        self._from_datasheet = machine.provenance.source == "datasheet"
        self._launch_ns = {
            (launch.kind, launch.role): launch.duration_ns.p50 for launch in machine.launches if launch.kernels == knobs.kernels
        }
        self._curves = rates(machine, knobs.state)
        # On an idle stream nothing is faster than it is issued: a norm is all launch. Copies have theirs in their curves.
        # One kernel updates, whichever compute.
        self._gpu_update_launch_ns = max(
            (launch.duration_ns.p50 for launch in machine.launches if launch.lane is LaneKind.GPU_UPDATE), default=0
        )

    def cost(self, task: Task, role: UnitRole) -> TaskCost:
        lane = task.operation.lane
        if lane is LaneKind.COMPUTE:
            return self._compute(task, role)
        # Every pass over host memory runs at the rate of the fused update.
        lane = LaneKind.HOST_UPDATE if lane is LaneKind.HOST_CAST else lane
        curve = self._curves.get(lane)
        if curve is None:
            raise ValueError(f"task {task.name}: machine {self._machine.name} has no rate for lane {lane}")
        return self._moved(lane, task, curve, self._gpu_update_launch_ns if lane is LaneKind.GPU_UPDATE else 0)

    def _cost(self, lane: LaneKind, duration_ns: int, bytes_per_s: int, source: Source, percent: float) -> TaskCost:
        return TaskCost(
            duration_ns=max(1, duration_ns),
            demand=self._sharing.demand(lane, bytes_per_s),
            source="datasheet" if self._from_datasheet else source,
            shares=self._sharing.shares_of(lane),
            uncertainty_percent=DATASHEET_PERCENT if self._from_datasheet else percent,
        )

    def _moved(self, lane: LaneKind, task: Task, curve: Curve, least_ns: int = 0) -> TaskCost:
        duration_ns = max(1, least_ns, curve.duration_ns(task.bytes_moved))
        rate = task.bytes_moved * 1_000_000_000 // duration_ns
        point = min(curve.points, key=lambda point: abs(point.size - task.bytes_moved))
        return self._cost(lane, duration_ns, rate, "measured", measured_percent(point.rate))

    def takes_norm(self, task: Task) -> bool:
        """Whether the task ends with a pass over its unit's gradient."""
        return self._knobs.gradient_norms and task.completes_gradient(self._knobs.micro_batches)

    def _compute(self, task: Task, role: UnitRole) -> TaskCost:
        duration_ns, source, percent = self.compute_ns(task.kind, role, task.accumulates)
        if self.takes_norm(task):
            source = "interpolated" if source == "measured" else source  # this part is derived
            duration_ns += formulas.square_sum_ns(self._model, role, self._knobs, self._machine.efficiency)
        # At full speed compute has all of the GPU; a task that nothing slows takes part in no sharing.
        return self._cost(LaneKind.COMPUTE, duration_ns, self._sharing.capacities.get(Resource.GPU, 0), source, percent)

    def compute_ns(self, kind: TaskKind, role: UnitRole, accumulate: bool) -> tuple[int, Source, float]:
        micro_batch, seq_len = self._knobs.micro_batch, self._seq_len
        costs, converted = measurements(self._model, role, kind, self._knobs, accumulate, self._machine)
        cost = nearest(costs, micro_batch, seq_len)
        launch_ns = self._launch_ns.get((kind, role), 0)
        if cost is None:
            derived_ns = self._derived_ns(kind, role, self._knobs, seq_len, accumulate)
            return max(derived_ns, launch_ns), "derived", DERIVED_PERCENT
        added = SCALED_PERCENT if converted else 0.0
        percent = measured_percent(cost.duration_ns) + added
        if (cost.micro_batch, cost.seq_len) == (micro_batch, seq_len):
            return cost.duration_ns.p50, "interpolated" if converted else "measured", percent
        pair = neighbours(costs, micro_batch, seq_len)
        if pair is not None:
            duration_ns, percent = self._interpolated(kind, role, pair, launch_ns)
            return duration_ns, "interpolated", percent + added
        # What was measured did the same at another size.
        other = msgspec.structs.replace(ComputeKnobs.of(self._knobs), micro_batch=cost.micro_batch)
        sizes = (self._knobs, seq_len), (other, cost.seq_len)
        here, there = (self._derived_ns(kind, role, *at, accumulate) for at in sizes)
        scaled_ns = here * cost.duration_ns.p50 // there
        return max(scaled_ns, launch_ns), "interpolated", percent + SCALED_PERCENT

    def _interpolated(
        self, kind: TaskKind, role: UnitRole, pair: tuple[ComputeCost, ComputeCost], launch_ns: int
    ) -> tuple[int, float]:
        """Time and uncertainty from two measurements: attention at its rate, all else on the line over tokens."""
        tokens = self._knobs.micro_batch * self._seq_len
        sizes = [each.micro_batch * each.seq_len for each in pair]
        whole_ns = [each.duration_ns.p50 for each in pair]
        attention_ns = [self._attention_ns(kind, role, size, each.seq_len) for size, each in zip(sizes, pair, strict=True)]
        rest_ns = [max(0, whole - attention) for whole, attention in zip(whole_ns, attention_ns, strict=True)]
        duration_ns = max(1, _on_line(sizes, rest_ns, tokens) + self._attention_ns(kind, role, tokens, self._seq_len))
        percent = max(measured_percent(each.duration_ns) for each in pair)
        percent += BETWEEN_PERCENT if sizes[0] <= tokens <= sizes[1] else BEYOND_PERCENT
        # By what attention makes of it, it is as uncertain as attention's rate.
        percent += ATTENTION_PERCENT * abs(duration_ns - _on_line(sizes, whole_ns, tokens)) / duration_ns
        if tokens < sizes[0]:
            # Below what was measured, until its launch is longer; as long as what was measured at most.
            duration_ns = max(duration_ns, min(launch_ns, whole_ns[0]))
        return duration_ns, percent

    def _attention_ns(self, kind: TaskKind, role: UnitRole, tokens: int, seq_len: int) -> int:
        return round(formulas.attention_ns(self._model, role, kind, tokens, seq_len, self._machine.efficiency))

    def _derived_ns(self, kind: TaskKind, role: UnitRole, knobs: ComputePolicy, seq_len: int, accumulate: bool) -> int:
        return formulas.compute_ns(self._model, role, kind, knobs, seq_len, accumulate, self._machine.efficiency)


def rates(machine: MachineProfile, state: StateFormat = "exact") -> dict[LaneKind, Curve]:
    """Bytes -> bytes/s of each lane that moves bytes, alone; no drive's lanes without a drive. state: what updates work on."""
    optimizer = machine.optimizer
    on_host = optimizer.host_by_bytes or _flat(optimizer.host_bytes_per_s)
    found = {
        LaneKind.H2D: machine.link.h2d,
        LaneKind.D2H: machine.link.d2h,
        LaneKind.HOST_UPDATE: _scaled(on_host, optimizer.share(state, Tier.HOST)),
        LaneKind.GPU_UPDATE: _scaled(_flat(optimizer.gpu_bytes_per_s), optimizer.share(state, Tier.GPU)),
    }
    if machine.ssd is not None:
        found |= {LaneKind.SSD_READ: machine.ssd.read, LaneKind.SSD_WRITE: machine.ssd.write}
    return found


def _scaled(curve: Curve, share: float) -> Curve:
    """A curve of rates, each times `share`."""
    if share == 1.0:
        return curve
    points = []
    for point in curve.points:
        rates = [max(1, round(share * rate)) for rate in msgspec.structs.astuple(point.rate)]
        points.append(RatePoint(size=point.size, rate=Spread(*rates)))
    return Curve(points=tuple(points))


def _flat(rate: Spread) -> Curve:
    """The same rate at every size."""
    return Curve(points=(RatePoint(size=1, rate=rate),))


def measured_percent(spread: Spread) -> float:
    """Uncertainty of a measured figure: half its p10-p90 spread, and what repetition adds."""
    return REPEAT_PERCENT + 50.0 * (spread.p90 - spread.p10) / spread.p50


def _on_line(sizes: Sequence[int], durations_ns: Sequence[int], size: int) -> int:
    """Time at a size on the line through two others, the smaller one first. Nanoseconds.

    Beyond both, it stays between the nearer one's time and that time in proportion: work has a fixed
    part and one that grows with it, whatever the slope that noise gives the line.
    """
    (low, high), (low_ns, high_ns) = sizes, durations_ns
    line_ns = low_ns + (high_ns - low_ns) * (size - low) // (high - low)
    if low <= size <= high:
        return line_ns
    near, near_ns = (low, low_ns) if size < low else (high, high_ns)
    bounds = sorted((near_ns, near_ns * size // near))
    return min(max(line_ns, bounds[0]), bounds[1])
