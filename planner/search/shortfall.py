"""The answer where nothing fits: what is missing, and what would help."""

from __future__ import annotations

import msgspec

from planner.catalogue.machines import known_machines
from planner.search.candidate import Candidate
from planner.search.counts import divisors
from planner.search.space import SpaceBuilder
from slideplan import __version__
from slideplan.codec import Document
from slideplan.graph.tasks import TaskGraph
from slideplan.ledger import RESERVE_PERCENT, Ledger, fixed_bytes_of, ledger
from slideplan.lowering.pools import PoolLayout
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.plan import MachineReference
from slideplan.policy import Policy, Workload


class DoesNotFit(Document, frozen=True, tag="does_not_fit"):
    """No policy fits. Bytes are capacities of the whole tier, reserve and fixed use included.

    policy, ledger:    the least demanding policy (fits the GPU if any does; lacks least) and its memory
    bytes_needed:      of each tier, with which the model would fit while all others are what they are; None: no amount
    global_batch:      largest divisor of the global batch that fits; None: none
    machines:          known profiles on which it fits
    """

    version: str
    model: ModelSpec
    machine: MachineReference
    workload: Workload
    policy: Policy
    ledger: Ledger
    bytes_needed: dict[Tier, int | None]
    global_batch: int | None
    machines: tuple[str, ...]


def shortfall(builder: SpaceBuilder, machine: MachineProfile) -> DoesNotFit:
    """What is missing for a workload of which nothing fits."""
    shorts = {candidate: _lacking(builder, candidate) for candidate in builder.least_demanding()}
    # State moves between the tiers byte for byte, so where a policy fits the GPU, ask for the other tiers' memory alone.
    least = min(shorts, key=lambda candidate: (shorts[candidate][Tier.GPU] > 0, sum(shorts[candidate].values())))
    assert any(shorts[least].values()), "something fits after all"
    model, policy = builder.model, least.policy(builder.model)
    layout = PoolLayout(model, policy, builder.workload, builder.footprint(least))
    return DoesNotFit(
        version=__version__,
        model=model,
        machine=MachineReference.of(machine),
        workload=builder.workload,
        policy=policy,
        ledger=ledger(TaskGraph(pools=tuple(layout.pools.values()), tasks=()), machine),
        bytes_needed={tier: _capacity_needed(builder, tier, fixed_bytes_of(machine, tier)) for tier in (Tier.HOST, Tier.GPU)},
        global_batch=_largest_batch(builder, machine),
        machines=_fitting_machines(builder, machine),
    )


def _lacking(builder: SpaceBuilder, candidate: Candidate) -> dict[Tier, int]:
    return {tier: max(0, -spare) for tier, spare in builder.spare(candidate).items()}


def _capacity_needed(builder: SpaceBuilder, tier: Tier, fixed_bytes: int) -> int | None:
    """Capacity of a tier with which some policy fits, the other tiers being what they are."""
    needs = [
        builder.capacity[tier] - spare[tier]
        for spare in map(builder.spare, builder.least_demanding())
        if all(left >= 0 for other, left in spare.items() if other is not tier)
    ]
    return -(-(min(needs) + fixed_bytes) * 100 // (100 - RESERVE_PERCENT[tier])) if needs else None


def _fits(builder: SpaceBuilder) -> bool:
    return any(min(builder.spare(candidate).values()) >= 0 for candidate in builder.least_demanding())


def _largest_batch(builder: SpaceBuilder, machine: MachineProfile) -> int | None:
    batch, pinned = builder.workload.global_batch, builder.options.micro_batch or 1
    for smaller in reversed(divisors(batch)[:-1]):
        if smaller % pinned == 0:
            workload = msgspec.structs.replace(builder.workload, global_batch=smaller)
            if _fits(SpaceBuilder.on(builder.model, workload, machine, builder.options)):
                return smaller
    return None


def _fitting_machines(builder: SpaceBuilder, machine: MachineProfile) -> tuple[str, ...]:
    found = []
    # A broken profile of another machine is no reason to withhold this answer.
    for name, other in known_machines().by_name().items():
        if other.name != machine.name and _fits(SpaceBuilder.on(builder.model, builder.workload, other, builder.options)):
            found.append(name)
    return tuple(found)
