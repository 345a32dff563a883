"""What lanes share while they run at the same time: resources, what traffic takes of them, and who gets how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import msgspec

from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind

Demand = Mapping["Resource", int]
Shares = Mapping["Resource", float]

# Of shares, and of bytes that a byte takes: what is beyond is a mistake.
LARGEST_RATIO = 1e9
# Where floats leave a flow nothing beside one 2^40 times as heavy, it creeps: what stands still would never end.
SLOWEST = 2.0**-40


class Resource(StrEnum):
    """Bandwidth that several lanes draw on at once, from what few pass to what many do (see `fair_speeds`)."""

    PCIE = "pcie"  # both directions together
    SSD = "ssd"  # reads and writes together
    HOST_DRAM = "host_dram"  # the CPU optimizer, copies and SSD I/O
    GPU = "gpu"  # compute, and what copies and updates take from it; counted in device memory bandwidth


class Sharing(Spec, frozen=True):
    """How a machine's lanes meet.

    capacities: bytes/s of each resource
    usage:      bytes of a resource that one byte of a lane's traffic takes. A lane without an entry takes
                nothing. Compute has no bytes of its own: at full speed its traffic is the GPU's capacity.
    shares:    share of each lane where a resource is full, 1 where none is given (see `fair_speeds`)
    """

    capacities: dict[Resource, int]
    usage: dict[LaneKind, dict[Resource, float]]
    shares: dict[LaneKind, dict[Resource, float]] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        for resource, capacity in self.capacities.items():
            if not capacity > 0:
                raise ValueError(f"capacities.{resource} is {capacity}, must be positive")
        for lane, shares in self.shares.items():
            for resource, share in shares.items():
                if not 1 / LARGEST_RATIO <= share <= LARGEST_RATIO:
                    raise ValueError(
                        f"shares.{lane}.{resource} is {share}, must be in {1 / LARGEST_RATIO:g}..{LARGEST_RATIO:g}"
                    )
        for lane, usage in self.usage.items():
            for resource, taken in usage.items():
                if not 0 <= taken <= LARGEST_RATIO:
                    raise ValueError(f"usage.{lane}.{resource} is {taken}, must be in 0..{LARGEST_RATIO:g}")
                if taken and resource not in self.capacities:
                    raise ValueError(f"usage.{lane} names {resource}, which has no entry in capacities")

    def demand(self, lane: LaneKind, bytes_per_s: float) -> dict[Resource, int]:
        """Bytes/s that a task of the lane takes from each resource while it runs at this rate."""
        usage = self.usage.get(lane, {})
        return {resource: taken for resource, each in usage.items() if (taken := round(bytes_per_s * each))}

    def shares_of(self, lane: LaneKind) -> dict[Resource, float]:
        """Shares of the lane's tasks, where they are not 1."""
        return self.shares.get(lane, {})

    def speeds(self, alone: Mapping[LaneKind, float]) -> dict[LaneKind, float]:
        """Relative speed of each lane while all of these run at once. `alone`: bytes/s of each by itself."""
        demands = [within(self.demand(lane, rate), self.capacities) for lane, rate in alone.items()]
        shares = [self.shares_of(lane) for lane in alone]
        return dict(zip(alone, fair_speeds(demands, self.capacities, shares), strict=True))


def within(demand: Demand, capacities: Mapping[Resource, int]) -> dict[Resource, int]:
    """The demand, none of it beyond a capacity: a flow alone runs at full speed, whatever the profile claims."""
    return {resource: min(rate, capacities[resource]) for resource, rate in demand.items()}


def fair_speeds(
    demands: Sequence[Demand], capacities: Mapping[Resource, int], shares: Sequence[Shares] | None = None
) -> list[float]:
    """Speed of each flow in (0, 1], relative to the flow alone.

    `demands`: bytes/s that each flow takes at full speed. `capacities`: bytes/s of each resource. `shares`: positive,
    of each flow on each resource, 1 where none is given.

    Each resource is divided max-min fair: a resource that is asked for more than it has gives each flow share x level,
    at one level for all. Resources are divided once, in their order. A flow through a narrow resource, PCIe or SSD, also
    passes the wide ones, at the speed that the narrow one left it. What a flow must give up on a wide resource is not
    handed out again on a narrow one.
    """
    shares = [{}] * len(demands) if shares is None else shares
    speeds = [1.0] * len(demands)
    for resource in Resource:
        flows = [flow for flow, demand in enumerate(demands) if demand.get(resource)]
        if flows:
            rates = [demands[flow][resource] for flow in flows]
            of_flows = [shares[flow].get(resource, 1.0) for flow in flows]
            divided = _divide([speeds[flow] for flow in flows], rates, of_flows, capacities[resource])
            for flow, speed in zip(flows, divided, strict=True):
                speeds[flow] = speed
    return speeds


def _divide(limits: Sequence[float], rates: Sequence[int], shares: Sequence[float], capacity: float) -> list[float]:
    """Speeds of flows on one resource by progressive filling: share x level of each, up to its limit."""
    speeds = list(limits)
    # Those that come to their limits first, first: once one of them is held back by the level, all after it are.
    order = sorted(range(len(limits)), key=lambda flow: limits[flow] / shares[flow])
    spare = capacity
    for place, flow in enumerate(order):
        level = spare / sum(rates[other] * shares[other] for other in order[place:])
        if limits[flow] > shares[flow] * level:
            for other in order[place:]:
                speeds[other] = max(SLOWEST, shares[other] * level)
            break
        spare -= rates[flow] * limits[flow]
    return speeds
