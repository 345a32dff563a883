"""Lowering, pass 3: every buffer a pool. How many slots of what size a policy takes in each tier, and whose they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from slideplan.footprint import Footprint
from slideplan.graph.tasks import SlotPool
from slideplan.lowering.sizes import BARRIER_BYTES, MASTER_BYTES, NORM_BYTES, Sizes, whole_pages
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.policy import OURS, OtherSystem, PassageKnobs, Policy, StateFormat, Workload, passage

# What slots of moments hold, by the format of state.
MOMENTS_CLASS: dict[StateFormat, TensorClass] = {
    "exact": TensorClass.MOMENTS, "bf16-moments": TensorClass.MOMENTS_BF16, "lean": TensorClass.MOMENTS_8BIT,
}  # fmt: skip
PASSING = "passing"  # group of units whose state passes through the tier that updates it
_WORDS = {
    TensorClass.WEIGHTS: "weights",
    TensorClass.REMAINDER: "remainder",
    TensorClass.MASTER: "master",
    TensorClass.MOMENTS: "moments",
    TensorClass.GRADIENT: "gradient",
    TensorClass.BOUNDARY: "boundary",
    TensorClass.INNER: "inner",
    TensorClass.FEED_FORWARD: "feed_forward",
}


class Holding(NamedTuple):
    """Slots of units' own: of which class, on which tier, for which group of units, updated where."""

    tensor: TensorClass
    tier: Tier
    group: str
    update: Tier = Tier.HOST

    @property
    def pool(self) -> str:
        # State on the SSD is cut by the tier that updates it.
        far = f".{self.update}" if (self.tier, self.update) == (Tier.SSD, Tier.GPU) else ""
        return f"{self.tier}.{_WORDS[self.tensor]}" + (f".{self.group}" if self.group else "") + far

    @property
    def passes(self) -> bool:
        """Whether it is state that lies elsewhere than where it is updated."""
        return self.tensor in STATE and self.tier is not self.update

    @property
    def role(self) -> UnitRole:
        """Of its units, where the group says it."""
        return UnitRole.LAYER if self.group == PASSING else UnitRole(self.group)


class Row(NamedTuple):
    """A pool before it is one: searches sum up many."""

    name: str
    tier: Tier
    tensor_class: TensorClass
    slot_bytes: int
    slots: int


class SlotKnobs(PassageKnobs, Protocol):
    """The knobs of a policy that say how many slots units share."""

    @property
    def micro_batches(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def gradient_slots(self) -> int: ...
    @property
    def host_gradient_slots(self) -> int: ...
    @property
    def boundary_slots(self) -> int: ...
    @property
    def inner_slots(self) -> int: ...
    @property
    def host_state_slots(self) -> int: ...
    @property
    def host_weight_slots(self) -> int: ...
    @property
    def host_boundary_slots(self) -> int: ...
    @property
    def host_inner_slots(self) -> int: ...
    @property
    def gradient_norms(self) -> bool: ...


def holders(model: ModelSpec, policy: Policy) -> dict[Holding, list[int]]:
    """Which units have slots of their own, by what they hold."""
    found: dict[Holding, list[int]] = {}
    system = policy.system
    for unit, placement in enumerate(policy.units):
        role = model.role(unit)
        held: list[Holding] = []
        on_host = placement.update is Tier.HOST
        if not policy.streams_weights(unit):
            held.append(Holding(TensorClass.WEIGHTS, Tier.GPU, role))
        if on_host and system.staging != "per_load":
            there = Tier.SSD if placement.weights is Tier.SSD else Tier.HOST
            held.append(Holding(TensorClass.WEIGHTS, there, role))
        if system.staging != "none":
            held.append(Holding(TensorClass.MASTER, Tier.HOST, role))
        # Of lean state remainders have no bytes, and so no pool.
        for tensor in STATE if system.master == "split" else (TensorClass.MOMENTS,):
            (tier,) = placement.tiers(tensor)
            passes = tensor in placement.passing and role is UnitRole.LAYER
            held.append(Holding(tensor, tier, PASSING if passes else role, placement.update))
        if role is not UnitRole.LAYER and system.unit_slots == "sized":
            held.append(Holding(TensorClass.GRADIENT, Tier.GPU, role))
            if on_host:
                held.append(Holding(TensorClass.GRADIENT, Tier.HOST, role))
        if unit < model.head_unit and policy.keeps_boundary(unit):
            held.append(Holding(TensorClass.BOUNDARY, placement.boundary, ""))
        if placement.inner is not None:
            held.append(Holding(TensorClass.INNER, placement.inner, "" if placement.feed_forward is Tier.GPU else "rest"))
        if placement.feed_forward not in (None, Tier.GPU):
            held.append(Holding(TensorClass.FEED_FORWARD, placement.feed_forward, ""))
        for holding in held:
            found.setdefault(holding, []).append(unit)
    return found


def own_slots(holding: Holding, knobs: SlotKnobs, model: ModelSpec) -> int:
    """How many slots of a pool each of its units has: one per micro-batch of an activation, one per chunk of passing state."""
    if holding.tensor in (TensorClass.BOUNDARY, TensorClass.INNER, TensorClass.FEED_FORWARD):
        return knobs.micro_batches
    return passage(knobs, holding.update).chunks_of(model, holding.role) if holding.passes else 1


def pool_rows(
    sizes: Sizes, counts: Mapping[Holding, int], knobs: SlotKnobs, kept_bytes: Sequence[int], system: OtherSystem = OURS
) -> Iterator[Row]:
    """All pools. `counts`: how many units hold what; `kept_bytes`: of each layer, in all micro-batches together."""
    layer = sizes.elements[UnitRole.LAYER]
    chunks = {tier: passage(knobs, tier).chunk_elements(sizes.model) for tier in (Tier.GPU, Tier.HOST)}
    for holding, units in counts.items():
        tensor, tier, group, update = holding
        tensor_class = _class_of(sizes, tensor)
        if tensor is TensorClass.INNER:
            slot_bytes = sizes.held_bytes(Tier.GPU, Tier.HOST if group else Tier.GPU)
        elif tensor is TensorClass.MASTER:
            slot_bytes = MASTER_BYTES[system.master] * sizes.elements[UnitRole(group)]
        else:
            elements = chunks[update] if holding.passes else sizes.elements[UnitRole(group)] if group else 0
            slot_bytes = _padded(sizes.of(tensor, elements), tensor, tier, system)
            slot_bytes = whole_pages(slot_bytes) if tier is Tier.SSD else slot_bytes
        yield Row(holding.pool, tier, tensor_class, slot_bytes, own_slots(holding, knobs, sizes.model) * units)
    for tensor, update in sorted({(holding.tensor, holding.update) for holding in counts if holding.passes}):
        slot_bytes, slots = sizes.of(tensor, chunks[update]), passage(knobs, update).slots
        slot_bytes = whole_pages(slot_bytes) if update is Tier.HOST else slot_bytes
        yield Row(passage_pool(tensor, update), update, _class_of(sizes, tensor), slot_bytes, slots)
    for tensor in STATE:
        if any(
            holding.passes and (holding.tensor, holding.tier, holding.update) == (tensor, Tier.SSD, Tier.GPU)
            for holding in counts
        ):
            slot_bytes = whole_pages(sizes.of(tensor, chunks[Tier.GPU]))
            yield Row(transit_pool(tensor), Tier.HOST, _class_of(sizes, tensor), slot_bytes, knobs.host_state_slots)
    shared = max(sizes.elements.values()) if system.unit_slots == "uniform" else layer
    gradient, gradients = sizes.of(TensorClass.GRADIENT, shared), gradient_pool(system)
    host_gradient = _padded(gradient, TensorClass.GRADIENT, Tier.HOST, system)
    weights = sizes.of(TensorClass.WEIGHTS, shared)
    boundary = sizes.boundary_bytes
    yield Row("gpu.weights.window", Tier.GPU, TensorClass.WEIGHTS, weights, knobs.window)
    yield Row(f"gpu.{gradients}", Tier.GPU, TensorClass.GRADIENT, gradient, knobs.gradient_slots)
    yield Row(f"host.{gradients}", Tier.HOST, TensorClass.GRADIENT, host_gradient, knobs.host_gradient_slots)
    yield Row("gpu.boundary.cycle", Tier.GPU, TensorClass.BOUNDARY, boundary, knobs.boundary_slots)
    yield Row("gpu.boundary_gradient", Tier.GPU, TensorClass.BOUNDARY, boundary, knobs.micro_batches)
    yield Row("gpu.feed_forward", Tier.GPU, TensorClass.FEED_FORWARD, sizes.feed_forward_bytes, knobs.inner_slots)
    for tensor, slots in (
        (TensorClass.WEIGHTS, knobs.host_weight_slots),
        (TensorClass.BOUNDARY, knobs.host_boundary_slots),
        (TensorClass.FEED_FORWARD, knobs.host_inner_slots),
    ):
        yield Row(_SHARED[tensor, Tier.HOST], Tier.HOST, tensor, whole_pages(sizes.of(tensor, layer)), slots)
    yield Row("gpu.norm", Tier.GPU, TensorClass.NORM, NORM_BYTES * sizes.model.units, int(knobs.gradient_norms))
    yield Row("gpu.workspace", Tier.GPU, TensorClass.WORKSPACE, sizes.footprint.workspace_beside(kept_bytes), 1)
    if system.staging == "per_load":
        staged = sizes.of(TensorClass.WEIGHTS, max(sizes.elements.values()))
        staged = _padded(staged, TensorClass.WEIGHTS, Tier.HOST, system)
        yield Row("host.staging", Tier.HOST, TensorClass.WEIGHTS, staged, 1)
    if system.step_barrier:
        yield Row("host.barrier", Tier.HOST, TensorClass.WORKSPACE, BARRIER_BYTES, 1)


def passage_pool(tensor: TensorClass, update: Tier) -> str:
    """Name of the pool through whose slots state passes on the tier that updates it."""
    return f"{update}.{_WORDS[tensor]}.{PASSING if update is Tier.GPU else Tier.SSD}"


def transit_pool(tensor: TensorClass) -> str:
    """Name of the pool through whose slots state passes on the host, on its way from the SSD to the GPU and back."""
    return f"{Tier.HOST}.{_WORDS[tensor]}.transit"


def gradient_pool(system: OtherSystem) -> str:
    """Name, without its tier, of the pools that share gradient slots: layers', or with slots of uniform size all units'."""
    return "gradient.window" if system.unit_slots == "uniform" else f"gradient.{UnitRole.LAYER}"


def _class_of(sizes: Sizes, tensor: TensorClass) -> TensorClass:
    return MOMENTS_CLASS[sizes.state] if tensor is TensorClass.MOMENTS else tensor


def _padded(size_bytes: int, tensor: TensorClass, tier: Tier, system: OtherSystem) -> int:
    """Bytes that a buffer takes: of other systems, what copies touch on the host may be rounded up."""
    copied = tensor in (TensorClass.WEIGHTS, TensorClass.GRADIENT, TensorClass.BOUNDARY)
    if system.pinned_sizes == "exact" or tier is not Tier.HOST or not copied:
        return size_bytes
    return 1 << max(0, size_bytes - 1).bit_length()


class PoolLayout:
    """Pools of a policy by name, and where a unit's tensors lie in them."""

    def __init__(self, model: ModelSpec, policy: Policy, workload: Workload, footprint: Footprint) -> None:
        self.model = model
        self.policy = policy
        self.seq_len = workload.seq_len
        self.sizes = sizes = Sizes(model, policy, workload.seq_len, footprint)
        self._own: dict[tuple[TensorClass, Tier, int], tuple[str, int]] = {}
        held = holders(model, policy)
        for holding, units in held.items():
            each = own_slots(holding, policy, model)
            for place, unit in enumerate(units):
                self._own[holding.tensor, holding.tier, unit] = holding.pool, each * place
        counts = {holding: len(units) for holding, units in held.items()}
        layers = policy.units[1 : model.head_unit]
        kept_bytes = [policy.micro_batches * sizes.held_bytes(layer.inner, layer.feed_forward) for layer in layers]
        rows = pool_rows(sizes, counts, policy, kept_bytes, policy.system)
        self.pools = {row.name: SlotPool(*row) for row in rows if row.slots and row.slot_bytes}

    def own(self, tensor: TensorClass, tier: Tier, unit: int) -> tuple[str, int] | None:
        """Pool and first slot of what the unit has there for itself; None where it shares slots with other units."""
        return self._own.get((tensor, tier, unit))

    def shared(self, tensor: TensorClass, tier: Tier, unit: int) -> str:
        """The pool whose slots the unit, and others in turn, takes for this class on this tier."""
        if tensor in STATE and tier is Tier.HOST and self.policy.units[unit].update is Tier.GPU:
            return transit_pool(tensor)
        if tensor is TensorClass.GRADIENT:
            return f"{tier}.{gradient_pool(self.policy.system)}"
        if self.policy.system.staging == "per_load" and (tensor, tier) == (TensorClass.WEIGHTS, Tier.HOST):
            return "host.staging"
        return _SHARED[tensor, tier]


_SHARED = {
    (TensorClass.WEIGHTS, Tier.GPU): "gpu.weights.window",
    (TensorClass.WEIGHTS, Tier.HOST): "host.weights.ssd",
    (TensorClass.BOUNDARY, Tier.GPU): "gpu.boundary.cycle",
    (TensorClass.BOUNDARY, Tier.HOST): "host.boundary.ssd",
    (TensorClass.FEED_FORWARD, Tier.GPU): "gpu.feed_forward",
    (TensorClass.FEED_FORWARD, Tier.HOST): "host.feed_forward.ssd",
    **{(tensor, tier): passage_pool(tensor, tier) for tensor in STATE for tier in (Tier.GPU, Tier.HOST)},
}
