"""The answer where nothing fits: what is missing, and what would help."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from planner.catalogue.machines import known_machines
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
from slideplan.policy import STATE_FORMATS, Policy, StateFormat, Workload


class DoesNotFit(Document, frozen=True, tag="does_not_fit"):
    """No policy fits. Bytes are capacities of the whole tier, reserve and fixed use included.

    policy, ledger:    the least demanding policy (fits the GPU if any does; lacks least) and its memory
    bytes_needed:      of each tier, with which the model would fit while all others are what they are; None: no amount.
                       Of a drive also where the machine has none
    states:            leaner formats of state with which it would fit, all lossy
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
    states: tuple[StateFormat, ...] = ()


def shortfall(builder: SpaceBuilder, machine: MachineProfile) -> DoesNotFit:
    """What is missing for a workload of which nothing fits."""
    spares = {candidate: builder.spare(candidate) for candidate in builder.least_demanding()}
    shorts = {candidate: {tier: max(0, -left) for tier, left in spare.items()} for candidate, spare in spares.items()}
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
        bytes_needed={
            Tier.HOST: _capacity_needed(builder, machine, spares.values(), Tier.HOST),
            Tier.SSD: _drive_needed(builder, machine, spares.values()),
            Tier.GPU: _capacity_needed(builder, machine, spares.values(), Tier.GPU),
        },
        global_batch=_largest_batch(builder, machine),
        machines=_fitting_machines(builder, machine),
        states=_fitting_states(builder, machine),
    )


def _capacity_needed(
    builder: SpaceBuilder, machine: MachineProfile, spares: Iterable[Mapping[Tier, int]], tier: Tier
) -> int | None:
    """Capacity of a tier with which some policy fits, the other tiers being what they are.

    spares: what each of the least demanding policies leaves of each tier
    """
    needs = [
        builder.capacity[tier] - spare[tier]
        for spare in spares
        if all(left >= 0 for other, left in spare.items() if other is not tier)
    ]
    fixed_bytes = fixed_bytes_of(machine, tier)
    return -(-(min(needs) + fixed_bytes) * 100 // (100 - RESERVE_PERCENT[tier])) if needs else None


def _drive_needed(builder: SpaceBuilder, machine: MachineProfile, spares: Iterable[Mapping[Tier, int]]) -> int | None:
    """The same of the drive. A builder that knows of none puts nothing there, so another one is asked."""
    if not builder.capacity[Tier.SSD]:
        builder = SpaceBuilder.on(builder.model, builder.workload, machine, builder.options, {Tier.SSD: 1})
        spares = map(builder.spare, builder.least_demanding())
    return _capacity_needed(builder, machine, spares, Tier.SSD)


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


def _fitting_states(builder: SpaceBuilder, machine: MachineProfile) -> tuple[StateFormat, ...]:
    """Of the formats that take less than the one asked for, those with which some policy fits."""
    found = []
    for state in STATE_FORMATS[STATE_FORMATS.index(builder.options.state) + 1 :]:
        options = msgspec.structs.replace(builder.options, state=state)
        if _fits(SpaceBuilder.on(builder.model, builder.workload, machine, options)):
            found.append(state)
    return tuple(found)


def _fitting_machines(builder: SpaceBuilder, machine: MachineProfile) -> tuple[str, ...]:
    found = []
    # A broken profile of another machine is no reason to withhold this answer.
    for name, other in known_machines().by_name().items():
        if other.name != machine.name and _fits(SpaceBuilder.on(builder.model, builder.workload, other, builder.options)):
            found.append(name)
    return tuple(found)
