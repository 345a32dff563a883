"""Memory of a plan per tier: a sum known before anything starts."""

from __future__ import annotations

from slideplan.codec import Spec
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.profile import MachineProfile
from slideplan.placement import Tier
from slideplan.quantities import format_bytes

# Share of a tier left free: fragmentation and other processes on the GPU, page tables and the
# operating system's own needs on the host, the filesystem's own needs on the drive.
RESERVE_PERCENT = {Tier.GPU: 3, Tier.HOST: 3, Tier.SSD: 3}


class TierLedger(Spec, frozen=True):
    """Bytes of one tier by what they hold.

    items:          tensor class -> bytes reserved by slots
    fixed_bytes:    GPU context, or the process before it reserves anything
    reserve_bytes:  left free on purpose
    capacity_bytes: what the tier has
    """

    capacity_bytes: int
    items: dict[str, int]
    fixed_bytes: int
    reserve_bytes: int

    def __post_init__(self) -> None:
        for field in ("capacity_bytes", "fixed_bytes", "reserve_bytes"):
            if getattr(self, field) < 0:
                raise ValueError(f"ledger: {field} is {getattr(self, field)}, must be zero or more")
        if min(self.items.values(), default=0) < 0:
            raise ValueError("ledger: items must be zero or more")

    @property
    def used_bytes(self) -> int:
        """Peak use: slots and fixed part."""
        return sum(self.items.values()) + self.fixed_bytes

    @property
    def headroom_bytes(self) -> int:
        """What is left beyond use and reserve; negative where the tier is too small."""
        return self.capacity_bytes - self.used_bytes - self.reserve_bytes


class Ledger(Spec, frozen=True):
    """Memory of a plan on a machine."""

    tiers: dict[Tier, TierLedger]

    @property
    def fits(self) -> bool:
        return all(tier.headroom_bytes >= 0 for tier in self.tiers.values())

    def lacking(self) -> list[str]:
        """One phrase per tier that is too small: which and by how much."""
        return [
            f"lacks {format_bytes(-tier.headroom_bytes)} of {name.upper()} memory "
            f"(needs {format_bytes(tier.used_bytes + tier.reserve_bytes)}, has {format_bytes(tier.capacity_bytes)})"
            for name, tier in self.tiers.items()
            if tier.headroom_bytes < 0
        ]

    def peak_bytes(self) -> dict[Tier, int]:
        return {name: tier.used_bytes for name, tier in self.tiers.items()}


def slot_capacity(machine: MachineProfile, tier: Tier) -> int:
    """Bytes that slots of a tier may take on this machine; negative where it is too small for the process alone."""
    capacity, fixed = _capacity(machine)[tier]
    return capacity - fixed - capacity * RESERVE_PERCENT[tier] // 100


def slot_capacities(machine: MachineProfile) -> dict[Tier, int]:
    """The same for every tier; zero for a drive that is not there."""
    return {tier: slot_capacity(machine, tier) for tier in _capacity(machine)}


def fixed_bytes_of(machine: MachineProfile, tier: Tier) -> int:
    """Bytes of a tier that are taken whatever the plan."""
    return _capacity(machine)[tier][1]


def _capacity(machine: MachineProfile) -> dict[Tier, tuple[int, int]]:
    """Capacity and fixed use of each tier; a machine without a drive has an SSD tier of nothing.

    On the "cpu" backend the device's memory is a part of RAM set aside for it: the host keeps the
    capacity that its profile states, and the process is counted there.
    """
    return {
        Tier.GPU: (machine.gpu.memory_bytes, machine.gpu.context_bytes),
        Tier.HOST: (machine.host.memory_bytes, machine.host.process_bytes),
        Tier.SSD: (0 if machine.ssd is None else machine.ssd.capacity_bytes, 0),
    }


def ledger_items(graph: TaskGraph) -> dict[Tier, dict[str, int]]:
    """Bytes that the graph's pools reserve, by tier and tensor class; GPU and host always have an entry."""
    items: dict[Tier, dict[str, int]] = {Tier.GPU: {}, Tier.HOST: {}}
    for pool in graph.pools:
        of_tier = items.setdefault(pool.tier, {})
        of_tier[pool.tensor_class] = of_tier.get(pool.tensor_class, 0) + pool.total_bytes
    return items


def ledger(graph: TaskGraph, machine: MachineProfile) -> Ledger:
    """Sum the graph's pools on the machine's tiers."""
    capacities = _capacity(machine)
    tiers = {}
    for tier, items in ledger_items(graph).items():
        capacity, fixed = capacities[tier]
        tiers[tier] = TierLedger(
            capacity_bytes=capacity,
            items=items,
            fixed_bytes=fixed,
            reserve_bytes=capacity * RESERVE_PERCENT[tier] // 100,
        )
    return Ledger(tiers=tiers)
