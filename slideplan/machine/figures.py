"""The figures of a machine profile by name, and which of them changed between two profiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import GRADIENT_KINDS
from slideplan.machine.profile import ComputeCost, Curve, LaunchCost, MachineProfile, Spread
from slideplan.quantities import format_bytes

# Beyond their spreads, two profiles of one machine may differ by this: as much as a prediction may be off on average.
TOLERANCE_PERCENT = 3.0


Unit = Literal["/s", "ns"]


class Figure(Spec, frozen=True):
    """A rate (of bytes or operations) per second, or a duration in nanoseconds."""

    spread: Spread
    unit: Unit


class Change(Spec, frozen=True):
    """One figure measured twice."""

    name: str
    unit: Unit
    before: Spread
    now: Spread

    @property
    def holds(self) -> bool:
        """Whether the two ranges from p10 to p90 meet, with TOLERANCE_PERCENT of the former median between them."""
        apart = max(self.now.p10 - self.before.p90, self.before.p10 - self.now.p90)
        return apart <= TOLERANCE_PERCENT / 100 * self.before.p50


def figure_name(lane: LaneKind, lanes: tuple[LaneKind, ...]) -> str:
    """Rate of a lane while these run."""
    others = [str(other) for other in lanes if other is not lane]
    return f"{lane} with {' and '.join(others)}" if others else f"{lane} alone"


def cost_name(cost: ComputeCost) -> str:
    """Duration of a compute task."""
    found = f"{cost.kind} {cost.shape.role}, hidden {cost.shape.hidden}, {cost.micro_batch}x{cost.seq_len}, {cost.kernels}"
    return f"{found}, {cost.gradient_dtype}{'+' if cost.accumulate else ''}" if cost.kind in GRADIENT_KINDS else found


def launch_name(launch: LaunchCost) -> str:
    """Time to issue a task."""
    return f"launch of {launch.kind} {f'{launch.role}, {launch.kernels}' if launch.role else f'on {launch.lane}'}"


def figures(machine: MachineProfile) -> dict[str, Figure]:
    """Every figure of the profile that has a spread."""
    rates: dict[str, Spread] = {}

    def curve(name: str, points: Curve, label: Callable[[int], str] = format_bytes) -> None:
        rates.update({f"{name}, {label(point.size)}": point.rate for point in points.points})

    curve("h2d copy", machine.link.h2d)
    curve("d2h copy", machine.link.d2h)
    rates["AdamW on the host"] = machine.optimizer.host_bytes_per_s
    rates["AdamW on the device"] = machine.optimizer.gpu_bytes_per_s
    if machine.optimizer.host_by_bytes is not None:
        curve("AdamW on the host", machine.optimizer.host_by_bytes)
    for at in machine.optimizer.by_threads:
        rates[f"AdamW on the host, {at.threads} threads"] = at.host_bytes_per_s
        if (beside := at.beside_copies) is not None:
            name = f"{at.threads} threads of AdamW on the host"
            rates[f"AdamW on the host, {at.threads} threads, beside copies"] = beside.host_bytes_per_s
            rates[f"h2d copy beside {name}"] = beside.h2d_bytes_per_s
            rates[f"d2h copy beside {name}"] = beside.d2h_bytes_per_s
    if machine.ssd is not None:
        curve("SSD read", machine.ssd.read)
        curve("SSD write", machine.ssd.write)
    curve("matrix product", machine.efficiency.gemm, lambda flops: f"{flops / 1e9:,.2f} GFLOP")
    rates |= {name: spread for name, spread in machine.spreads.items() if not name.endswith("_ns")}
    if machine.interference is not None:
        met = machine.interference
        rates |= {figure_name(lane, (lane,)): rate for lane, rate in met.alone.items()}
        for combination in met.together:
            lanes = tuple(each.lane for each in combination)
            rates |= {figure_name(each.lane, lanes): each.rate for each in combination}
    durations = {launch_name(launch): launch.duration_ns for launch in machine.launches}
    durations |= {name: spread for name, spread in machine.spreads.items() if name.endswith("_ns")}
    # What writes no gradients was measured with gradients of either type; the first is what costs are taken from.
    durations |= {cost_name(cost): cost.duration_ns for cost in reversed(machine.costs)}
    return {name: Figure(spread, "/s") for name, spread in rates.items()} | {
        name: Figure(spread, "ns") for name, spread in durations.items()
    }


def changes(before: Mapping[str, Figure], now: Mapping[str, Spread]) -> list[Change]:
    """Figures that both have, in the order of the former."""
    return [
        Change(name=name, unit=figure.unit, before=figure.spread, now=now[name])
        for name, figure in before.items()
        if name in now
    ]
