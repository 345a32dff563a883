"""What lanes share while they run at the same time: resources, what traffic takes of them, and who gets how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from slideplan.plan.codec import Spec
from slideplan.plan.graph import Lane

Demand = Mapping["Resource", int]


class Resource(StrEnum):
    """Bandwidth that several lanes draw on at once."""

    PCIE = "pcie"  # both directions together
    HOST_DRAM = "host_dram"  # the CPU optimizer, copies and SSD I/O
    SSD = "ssd"  # reads and writes together
    GPU = "gpu"  # compute, and what copies and updates take from it; counted in device memory bandwidth


class Sharing(Spec, frozen=True):
    """How a machine's lanes meet.

    capacities: bytes/s of each resource
    usage:      bytes of a resource that one byte of a lane's traffic takes. A lane without an entry takes
                nothing. Compute has no bytes of its own: at full speed its traffic is the GPU's capacity.
    weights:    share weight of each lane, 1 where none is given (see `fair_speeds`)
    """

    capacities: dict[Resource, int]
    usage: dict[Lane, dict[Resource, float]]
    weights: dict[Lane, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in (("capacities", self.capacities), ("weights", self.weights)):
            for key, value in values.items():
                if not value > 0:
                    raise ValueError(f"{name}.{key} is {value}, must be positive")
        for lane, usage in self.usage.items():
            for resource, taken in usage.items():
                if not taken >= 0:
                    raise ValueError(f"usage.{lane}.{resource} is {taken}, must be zero or more")
                if taken and resource not in self.capacities:
                    raise ValueError(f"usage.{lane} names {resource}, which has no entry in capacities")

    def demand(self, lane: Lane, bytes_per_s: float) -> dict[Resource, int]:
        """Bytes/s that a task of the lane takes from each resource while it runs at this rate."""
        usage = self.usage.get(lane, {})
        return {resource: taken for resource, each in usage.items() if (taken := round(bytes_per_s * each))}

    def weight(self, lane: Lane) -> float:
        """Share weight of the lane's tasks."""
        return self.weights.get(lane, 1.0)

    def speeds(self, alone: Mapping[Lane, float]) -> dict[Lane, float]:
        """Relative speed of each lane while all of these run at once. `alone`: bytes/s of each by itself."""
        demands = [within(self.demand(lane, rate), self.capacities) for lane, rate in alone.items()]
        weights = [self.weight(lane) for lane in alone]
        return dict(zip(alone, fair_speeds(demands, self.capacities, weights), strict=True))


def within(demand: Demand, capacities: Mapping[Resource, int]) -> dict[Resource, int]:
    """The demand, none of it beyond a capacity: a flow alone runs at full speed, whatever the profile claims."""
    return {resource: min(rate, capacities[resource]) for resource, rate in demand.items()}


def fair_speeds(
    demands: Sequence[Demand], capacities: Mapping[Resource, int], weights: Sequence[float] | None = None
) -> list[float]:
    """Speed of each flow in (0, 1], relative to the flow alone, by progressive filling.

    `demands`: bytes/s that each flow takes at full speed; `capacities`: bytes/s of each resource;
    `weights`: positive, 1 for every flow unless given. A level rises from zero, and each flow's speed is
    weight x level until it runs at full speed or one of its resources is full; the others rise on. So
    the smallest speed / weight is as large as can be, then the next.
    """
    weights = [1.0] * len(demands) if weights is None else weights
    speeds = [1.0] * len(demands)
    rising = {flow for flow, demand in enumerate(demands) if any(demand.values())}
    spare = {resource: float(capacities[resource]) for demand in demands for resource in demand}
    while rising:
        # What each resource gives per level while all of these rise, and the level at which it is full.
        slopes = {resource: sum(demands[flow].get(resource, 0) * weights[flow] for flow in rising) for resource in spare}
        levels = {resource: spare[resource] / slope for resource, slope in slopes.items() if slope}
        level = min(levels.values())
        fastest = max(weights[flow] for flow in rising)
        if fastest * level >= 1.0:  # the fastest reach full speed before anything is full
            settled = {flow: 1.0 for flow in rising if weights[flow] == fastest}
        else:
            full = [resource for resource, reached in levels.items() if reached == level]
            settled = {flow: weights[flow] * level for flow in rising if any(demands[flow].get(resource) for resource in full)}
        for flow in sorted(settled):
            speeds[flow] = settled[flow]
            rising.remove(flow)
            for resource, rate in demands[flow].items():
                spare[resource] -= rate * settled[flow]
    return speeds
