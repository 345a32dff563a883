"""Fits the fluid model of shared bandwidth to lanes measured alone and together.

What is free: the capacity of each resource; what a byte of each lane takes of host DRAM, where a byte of
the optimizer's traffic counts as one; what each lane takes of the GPU; and shares on each resource,
relative to one lane there. They differ from resource to resource: copies to the GPU wait for what they read and
lose to everything on a busy host memory, and less to copies the other way on PCIe. A byte on PCIe counts
as one in either direction: how much of the sum is lost when both run is in the capacity. Of an SSD the time counts that a
byte takes by itself: a drive that is busy with reads has as little left for writes, whichever is the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from slideplan.graph.lanes import LaneKind
from slideplan.machine.profile import Interference, LaneSpeed, Spread
from slideplan.machine.sharing import Resource, Sharing

Speeds = Mapping[LaneKind, float]  # relative to each lane alone
Vector = NDArray[np.float64]

_LINKS = {
    LaneKind.H2D: Resource.PCIE,
    LaneKind.D2H: Resource.PCIE,
    LaneKind.SSD_READ: Resource.SSD,
    LaneKind.SSD_WRITE: Resource.SSD,
}
_ON_SSD = (LaneKind.SSD_READ, LaneKind.SSD_WRITE)
_ON_GPU = (LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE, LaneKind.GPU_UPDATE)
# The lane whose share is 1 there. On the GPU all have 1 but compute, and who gives way to it.
_REFERENCE = {Resource.PCIE: LaneKind.D2H, Resource.SSD: LaneKind.SSD_WRITE, Resource.HOST_DRAM: LaneKind.HOST_UPDATE}

# What meets compute on a GPU takes a small part of it and hardly waits: compute starts with a low share.
_COMPUTE_SHARE = 1 / 16
# A lane within this of full speed beside compute was not slowed by it.
_FULL_SPEED = 0.97
# A part of the GPU below this cannot be told from noise, and would make every compute task a flow.
_NEGLIGIBLE = 0.005

# Bytes of host DRAM that a byte on a link takes at most. A drive's I/O also keeps cores from the optimizer, whose memory
# traffic falls by many times what the drive moves; on some machines it is the drive that falls behind.
_MOST_DRAM = {Resource.PCIE: 4.0, Resource.SSD: 64.0}

# Pull towards the start, for what no measurement speaks of. Against a residual of 1 %, moving a parameter
# by its own size costs less than a tenth.
_PRIOR = 0.003
_STEP = 1e-4
_ROUNDS = 100


Of = tuple[Literal["capacity", "usage", "part", "share"], LaneKind | None, Resource]
Values = dict[Of, float]


@dataclass(frozen=True)
class _Parameter:
    """One unknown: a capacity or share as the logarithm of its ratio to `start`, a usage as itself."""

    of: Of
    start: float
    low: float
    high: float

    @property
    def at_start(self) -> float:
        return 0.0 if self._is_ratio else self.start

    @property
    def _is_ratio(self) -> bool:
        return self.of[0] in ("capacity", "share")

    def value(self, x: float) -> float:
        return self.start * float(np.exp(x)) if self._is_ratio else x


def interference(
    alone: Mapping[LaneKind, Spread], together: Sequence[Mapping[LaneKind, Spread]], gpu_bytes_per_s: int
) -> Interference:
    """Rates measured alone and together, with the model fitted to their middles and what it says of each.

    As for `fit`, but rates in bytes/s throughout; every lane of `together` must be in `alone`.
    """
    middle = {lane: float(rate.p50) for lane, rate in alone.items()}
    speeds = [
        # A lane that stood still is told from one that was not measured, and has a logarithm.
        {lane: max(1e-3, rate.p50 / middle[lane]) for lane, rate in rates.items()}
        for rates in together
    ]
    # No lane gains by company: what is above 1 is noise in the rate alone.
    fitted = fit(middle, [{lane: min(1.0, speed) for lane, speed in each.items()} for each in speeds], gpu_bytes_per_s)
    demands = middle | {LaneKind.COMPUTE: float(gpu_bytes_per_s)}
    combinations = []
    for measured, rates in zip(speeds, together, strict=True):
        predicted = fitted.speeds({lane: demands[lane] for lane in measured})
        combinations.append(
            tuple(
                LaneSpeed(lane=lane, rate=rates[lane], speed=round(measured[lane], 4), predicted=round(predicted[lane], 4))
                for lane in measured
            )
        )
    return Interference(alone=dict(alone), together=tuple(combinations), fitted=fitted)


def fit(alone: Mapping[LaneKind, float], together: Sequence[Speeds], gpu_bytes_per_s: int) -> Sharing:
    """The model whose relative speeds differ least from those measured, in the sum of squares.

    `alone`: bytes/s of each lane by itself (of compute, any figure); `together`: relative speeds in
    combinations of these lanes; `gpu_bytes_per_s`: capacity that compute takes alone. Resources that no
    combination fills keep the largest load seen. Raises ValueError for a combination with a lane that was
    not measured alone, or with fewer than two lanes.
    """
    for speeds in together:
        if len(speeds) < 2 or not set(speeds) <= set(alone):
            raise ValueError(f"combination {sorted(speeds)}: needs two or more of the lanes measured alone, {sorted(alone)}")
    alone = {lane: float(gpu_bytes_per_s) if lane is LaneKind.COMPUTE else rate for lane, rate in alone.items()}
    found: Values = {}
    # The drive's lanes last, by themselves: what they ask of a model should not move what it says of all others.
    drive = {lane for lane in alone if lane in _ON_SSD}
    for lanes in [set(alone) - drive, set(alone)] if drive else [set(alone)]:
        rates = {lane: rate for lane, rate in alone.items() if lane in lanes}
        of_lanes = [speeds for speeds in together if set(speeds) <= lanes and (lanes.isdisjoint(drive) or drive & set(speeds))]
        found |= _fitted(rates, of_lanes, gpu_bytes_per_s, found)
    return _sharing(found, alone, gpu_bytes_per_s)


def _fitted(alone: Mapping[LaneKind, float], together: Sequence[Speeds], gpu_bytes_per_s: int, known: Values) -> Values:
    """Values of what is not known yet, by least squares."""
    unknowns = [unknown for unknown in _unknowns(alone, together, known) if unknown.of not in known]
    measured = np.array([speed for speeds in together for speed in speeds.values()])
    start = np.array([unknown.at_start for unknown in unknowns])

    def values(x: Vector) -> Values:
        return {unknown.of: unknown.value(float(at)) for unknown, at in zip(unknowns, x, strict=True)}

    def residuals(x: Vector) -> Vector:
        model = _sharing(known | values(x), alone, gpu_bytes_per_s)
        predicted = [speed for speeds in together for speed in model.speeds({lane: alone[lane] for lane in speeds}).values()]
        return np.concatenate([np.array(predicted) - measured, _PRIOR * (x - start)])

    low, high = (np.array([getattr(unknown, bound) for unknown in unknowns]) for bound in ("low", "high"))
    return values(_least_squares(residuals, start, low, high))


def _unknowns(alone: Mapping[LaneKind, float], together: Sequence[Speeds], known: Values) -> list[_Parameter]:
    found = []
    shares: dict[tuple[LaneKind, Resource], float] = {}
    for resource, reference in _REFERENCE.items():
        users = [lane for lane in alone if _LINKS.get(lane) is resource or (resource is Resource.HOST_DRAM and _on_dram(lane))]
        if users:
            demand = {lane: alone[lane] * (1.0 if resource is Resource.HOST_DRAM else _taken(lane, alone)) for lane in users}
            loads = [sum(demand[lane] * speed for lane, speed in speeds.items() if lane in users) for speeds in together]
            largest = max(demand.values())
            start = max([largest, *loads])
            found.append(_Parameter(("capacity", None, resource), start, float(np.log(largest / start)), 1.0))
        if reference in users:
            shares |= {(lane, resource): 1.0 for lane in users if lane is not reference}
    if LaneKind.HOST_UPDATE in alone:
        for lane in (each for each in _LINKS if each in alone):
            usage = 1.0
            # Where nothing is full, no step tells how much would fill it: a drive slower beside updates says what it takes.
            for beside in (each for each in together if set(each) == {LaneKind.HOST_UPDATE, lane} and lane in _ON_SSD):
                updates, drive = beside[LaneKind.HOST_UPDATE], beside[lane]
                if min(drive, updates) < _FULL_SPEED:
                    full = known["capacity", None, Resource.HOST_DRAM]
                    usage = max(0.0, full - alone[LaneKind.HOST_UPDATE] * updates) / (alone[lane] * drive)
                    shares[lane, Resource.HOST_DRAM] = drive / updates
            most = _MOST_DRAM[_LINKS[lane]]
            found.append(_Parameter(("usage", lane, Resource.HOST_DRAM), min(usage, most), 0.0, most))
    if LaneKind.COMPUTE in alone:
        shares[LaneKind.COMPUTE, Resource.GPU] = _COMPUTE_SHARE
        for speeds in together:
            for lane in _ON_GPU:
                if set(speeds) == {LaneKind.COMPUTE, lane}:
                    compute, other = speeds[LaneKind.COMPUTE], speeds[lane]
                    part = min(1.0, max(0.0, 1.0 - compute) / other)
                    found.append(_Parameter(("part", lane, Resource.GPU), part, 0.0, 1.0))
                    if other < _FULL_SPEED:  # the two shared what there is
                        shares[lane, Resource.GPU] = _COMPUTE_SHARE * other / compute
    return found + [_Parameter(("share", lane, resource), start, -3.0, 3.0) for (lane, resource), start in shares.items()]


def _taken(lane: LaneKind, alone: Mapping[LaneKind, float]) -> float:
    """What a byte of a lane takes of its link. On an SSD, in bytes of the faster direction, as much as takes the same time."""
    fastest = (
        max(rate for other, rate in alone.items() if _LINKS.get(other) is Resource.SSD) if lane in _ON_SSD else alone[lane]
    )
    return fastest / alone[lane]


def _on_dram(lane: LaneKind) -> bool:
    return lane in _LINKS or lane is LaneKind.HOST_UPDATE


def _sharing(value: Values, alone: Mapping[LaneKind, float], gpu_bytes_per_s: int) -> Sharing:
    """The model with these values. A part of the GPU is of the lane at its rate alone; usage is per byte."""
    capacities = {of: round(value["capacity", None, of]) for of in Resource if ("capacity", None, of) in value}
    usage: dict[LaneKind, dict[Resource, float]] = {}
    for lane in alone:
        of: dict[Resource, float] = {_LINKS[lane]: _taken(lane, alone)} if lane in _LINKS else {}
        if _on_dram(lane):
            of[Resource.HOST_DRAM] = value.get(("usage", lane, Resource.HOST_DRAM), 1.0)
        part = value.get(("part", lane, Resource.GPU), 0.0)
        if part >= _NEGLIGIBLE:
            of[Resource.GPU] = part * gpu_bytes_per_s / alone[lane]
        usage[lane] = of
    if any(Resource.GPU in of for of in usage.values()):
        capacities[Resource.GPU] = gpu_bytes_per_s
        usage[LaneKind.COMPUTE] = {Resource.GPU: 1.0}
    shares: dict[LaneKind, dict[Resource, float]] = {}
    for (what, shared_by, resource), found in value.items():
        if what == "share" and shared_by is not None and resource in usage[shared_by]:
            shares.setdefault(shared_by, {})[resource] = found
    return Sharing(capacities=capacities, usage={lane: of for lane, of in usage.items() if of}, shares=shares)


def _least_squares(residuals: Callable[[Vector], Vector], x: Vector, low: Vector, high: Vector) -> Vector:
    """Levenberg and Marquardt's method within bounds: few unknowns, kinks where a resource fills up."""

    def slope(number: int) -> Vector:
        """How the residuals change with one unknown; at a bound, from one side."""
        above, below = x.copy(), x.copy()
        above[number], below[number] = min(x[number] + _STEP, high[number]), max(x[number] - _STEP, low[number])
        change: Vector = residuals(above) - residuals(below)
        return change / float(above[number] - below[number])

    damping = 1e-3
    error = residuals(x)
    for _ in range(_ROUNDS):
        slopes = np.stack([slope(number) for number in range(len(x))], axis=1)
        improved = False
        while not improved and damping < 1e6:
            system = np.concatenate([slopes, np.sqrt(damping) * np.eye(len(x))])
            wanted = np.linalg.lstsq(system, np.concatenate([-error, np.zeros(len(x))]), rcond=None)[0]
            candidate = np.clip(x + wanted, low, high)
            new = residuals(candidate)
            improved = bool(new @ new < error @ error * (1 - 1e-9))
            damping *= 0.3 if improved else 10.0
        if not improved:
            break
        x, error = candidate, new
    return x
