"""A policy by counts. Layers are alike, so a candidate says how many, not which."""

from __future__ import annotations

from collections.abc import Sequence
from operator import mul

import msgspec

from slideplan.codec import Spec
from slideplan.footprint import Footprint
from slideplan.lowering.pools import PASSING, Holding, pool_rows
from slideplan.lowering.sizes import Sizes
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import STATE, Placement, TensorClass, Tier
from slideplan.policy import SHARED_SLOTS, GradientDtype, Kernels, Policy, StateFormat

# Where a layer's inner activations and their feed-forward part lie.
Inner = tuple[Tier | None, Tier | None]
RECOMPUTED: Inner = (None, None)
KEPT: Inner = (Tier.GPU, Tier.GPU)
AWAY: Inner = (Tier.GPU, Tier.HOST)


class Candidate(Spec, frozen=True):
    """A policy by counts. The fields shared with `Policy` mean the same.

    state_layers:      first layers whose state, and with it weights, stay on the GPU
    streamed_state:    layers after those whose state lies on the host and is updated on the GPU: their gradients are
                       the last, so that the host has begun to update the others
    ssd_layers:        layers whose moments lie on the SSD, of those that the host updates: spread among them, so that the
                       drive works as evenly as updates come
    ssd_ends:          whether those of embedding and head lie there too, where the host updates them
    ssd_whole:         whether the remainders of all of these lie there with their moments
    ssd_weights:       layers whose weights lie on the SSD, of those whose weights stream: spread among them
    ssd_outputs:       units of the offloaded outputs whose boundary activation waits on the SSD: spread among them
    weight_layers:     first layers whose weights stay on the GPU; all of the above at least
    embedding_on_gpu, head_on_gpu: whether their weights and state stay on the GPU
    offloaded_outputs: first units whose boundary activation waits on the host
    kept_layers:       last layers that keep their inner activations
    offloaded_inner:   layers of those between offloaded outputs and kept layers that keep them too, with what can
                       wait on the host there
    deferred_updates:  how many units that the host updates, from the first on, are updated in order of next need
                       after all others, which are updated as their gradients arrive; from 1 (order of
                       arrival: the first unit's gradient is the last anyway) to all of them
    """

    micro_batch: int
    micro_batches: int
    gradient_dtype: GradientDtype
    kernels: Kernels
    state: StateFormat = "exact"
    gradient_norms: bool = False
    window: int = 0
    prefetch_depth: int = 0
    gradient_slots: int = 2
    host_gradient_slots: int = 0
    boundary_slots: int = 0
    inner_slots: int = 0
    state_slots: int = 0
    state_chunks: int = 0
    state_layers: int = 0
    streamed_state: int = 0
    weight_layers: int = 0
    embedding_on_gpu: bool = False
    head_on_gpu: bool = False
    offloaded_outputs: int = 0
    kept_layers: int = 0
    offloaded_inner: int = 0
    deferred_updates: int = 0
    ssd_slots: int = 0
    ssd_chunks: int = 0
    host_state_slots: int = 0
    host_weight_slots: int = 0
    host_boundary_slots: int = 0
    host_inner_slots: int = 0
    ssd_layers: int = 0
    ssd_ends: bool = False
    ssd_whole: bool = False
    ssd_weights: int = 0
    ssd_outputs: int = 0

    def state_on_gpu(self, model: ModelSpec, unit: int) -> bool:
        if unit == 0:
            return self.embedding_on_gpu
        return self.head_on_gpu if unit == model.head_unit else unit <= self.state_layers

    @property
    def gpu_updated(self) -> int:
        """First layers that are updated on the GPU."""
        return self.state_layers + self.streamed_state

    def on_ssd(self, model: ModelSpec) -> set[int]:
        """Units whose moments, or state, lie on the SSD."""
        first, hosted = self.gpu_updated + 1, model.layers - self.gpu_updated
        layers = {first + number * hosted // self.ssd_layers for number in range(self.ssd_layers)}
        ends = {unit for unit in (0, model.head_unit) if self.ssd_ends and not self.state_on_gpu(model, unit)}
        return layers | ends

    def weights_on_ssd(self, model: ModelSpec) -> set[int]:
        """Layers whose weights lie on the SSD."""
        streaming = model.layers - self.weight_layers
        return {self.weight_layers + 1 + number * streaming // self.ssd_weights for number in range(self.ssd_weights)}

    def outputs_on_ssd(self) -> set[int]:
        """Units whose boundary activation waits on the SSD."""
        return {number * self.offloaded_outputs // self.ssd_outputs for number in range(self.ssd_outputs)}

    def host_units(self, model: ModelSpec) -> int:
        """How many units the host updates."""
        return model.units - self.gpu_updated - self.embedding_on_gpu - self.head_on_gpu

    def update_order(self, model: ModelSpec) -> tuple[int, ...]:
        """Units that the host updates: the later ones as their gradients arrive, then the deferred, first unit first."""
        passing = range(self.state_layers + 1, self.gpu_updated + 1)
        host = [unit for unit in range(model.units) if not self.state_on_gpu(model, unit) and unit not in passing]
        return (*reversed(host[self.deferred_updates :]), *host[: self.deferred_updates])

    def inner(self, model: ModelSpec) -> list[Inner]:
        """Where each layer's inner activations lie.

        Layers whose feed-forward part waits on the host are spread among those that may, so that copies have time to
        keep up with compute.
        """
        recomputed = model.layers - self.kept_layers
        found = [RECOMPUTED if layer < recomputed else KEPT for layer in range(model.layers)]
        room = recomputed - self.offloaded_outputs
        for number in range(self.offloaded_inner):
            found[self.offloaded_outputs + (number + 1) * room // self.offloaded_inner - 1] = AWAY
        return found

    def policy(self, model: ModelSpec) -> Policy:
        """The policy spelt out unit by unit."""
        units = []
        layers, on_ssd = self.inner(model), self.on_ssd(model)
        weights_away, outputs_away = self.weights_on_ssd(model), self.outputs_on_ssd()
        for unit in range(model.units):
            state = Tier.GPU if self.state_on_gpu(model, unit) else Tier.HOST
            layer = model.role(unit) is UnitRole.LAYER
            inner, feed_forward = layers[unit - 1] if layer else RECOMPUTED
            away = Tier.SSD if unit in outputs_away else Tier.HOST
            units.append(
                Placement(
                    weights=Tier.SSD if unit in weights_away else Tier.GPU if layer and unit <= self.weight_layers else state,
                    remainder=Tier.SSD if unit in on_ssd and self.ssd_whole else state,
                    moments=Tier.SSD if unit in on_ssd else state,
                    boundary=away if unit < self.offloaded_outputs else Tier.GPU,
                    inner=inner,
                    feed_forward=feed_forward,
                    update=Tier.GPU if layer and unit <= self.gpu_updated else state,
                )
            )
        return Policy(
            micro_batch=self.micro_batch, micro_batches=self.micro_batches, window=self.window,
            prefetch_depth=self.prefetch_depth, gradient_slots=self.gradient_slots,
            host_gradient_slots=self.host_gradient_slots, boundary_slots=self.boundary_slots, inner_slots=self.inner_slots,
            state_slots=self.state_slots, state_chunks=self.state_chunks,
            gradient_dtype=self.gradient_dtype, kernels=self.kernels, state=self.state,
            gradient_norms=self.gradient_norms, update_order=self.update_order(model), units=tuple(units),
            ssd_slots=self.ssd_slots, ssd_chunks=self.ssd_chunks,
            host_state_slots=self.host_state_slots, host_weight_slots=self.host_weight_slots,
            host_boundary_slots=self.host_boundary_slots, host_inner_slots=self.host_inner_slots,
        )  # fmt: skip

    def unit_counts(self, model: ModelSpec) -> tuple[int, ...]:
        """How many units hold each of HOLDINGS in slots of their own, counted without listing units."""
        layers, hosted = model.layers, model.layers - self.gpu_updated
        ends: list[int] = []
        for gpu in (int(self.embedding_on_gpu), int(self.head_on_gpu)):
            host = 1 - gpu
            ends += (1, host, 1, host)
            for moved in (self.ssd_whole, True):  # remainder, moments
                ssd = host * (self.ssd_ends and moved)
                ends += (gpu, host - ssd, ssd)
        state: list[int] = []
        for moved in (self.ssd_whole, True):
            ssd = self.ssd_layers * moved
            state += (self.state_layers, hosted - ssd, self.streamed_state, ssd)
        weights = (self.weight_layers, hosted - self.ssd_weights, self.ssd_weights)
        away, outputs, far = self.offloaded_inner, self.offloaded_outputs, self.ssd_outputs
        boundaries = (layers + 1 - outputs, outputs - far, far)
        return (*ends, *weights, *state, *boundaries, self.kept_layers, away, away)

    def holdings(self, model: ModelSpec) -> dict[Holding, int]:
        """The same by what is held: `pools.holders` of the policy, counted."""
        return dict(zip(HOLDINGS, self.unit_counts(model), strict=True))


def _of_ends(role: UnitRole) -> tuple[Holding, ...]:
    pairs = [(tensor, tier) for tensor in (TensorClass.WEIGHTS, TensorClass.GRADIENT) for tier in (Tier.GPU, Tier.HOST)]
    return (
        *(Holding(tensor, tier, role) for tensor, tier in pairs),
        *(
            Holding(tensor, tier, role, update)
            for tensor in STATE
            for tier, update in ((Tier.GPU, Tier.GPU), (Tier.HOST, Tier.HOST), (Tier.SSD, Tier.HOST))
        ),
    )


# All that units of a candidate's policy can have slots of their own for.
HOLDINGS = (
    *_of_ends(UnitRole.EMBEDDING),
    *_of_ends(UnitRole.HEAD),
    Holding(TensorClass.WEIGHTS, Tier.GPU, UnitRole.LAYER),
    Holding(TensorClass.WEIGHTS, Tier.HOST, UnitRole.LAYER),
    Holding(TensorClass.WEIGHTS, Tier.SSD, UnitRole.LAYER),
    *(
        Holding(tensor, tier, group, update)
        for tensor in STATE
        for tier, group, update in (
            (Tier.GPU, UnitRole.LAYER, Tier.GPU),
            (Tier.HOST, UnitRole.LAYER, Tier.HOST),
            (Tier.HOST, PASSING, Tier.GPU),
            (Tier.SSD, PASSING, Tier.HOST),
        )
    ),
    Holding(TensorClass.BOUNDARY, Tier.GPU, ""),
    Holding(TensorClass.BOUNDARY, Tier.HOST, ""),
    Holding(TensorClass.BOUNDARY, Tier.SSD, ""),
    Holding(TensorClass.INNER, Tier.GPU, ""),
    Holding(TensorClass.INNER, Tier.GPU, "rest"),
    Holding(TensorClass.FEED_FORWARD, Tier.HOST, ""),
)


class SlotBytes:
    """What pools take in each tier, for candidates that compute alike: linear in counts of units and of shared slots.

    How much one more of each takes is asked of `pools.pool_rows` once, and summed up for thousands of candidates.
    """

    def __init__(self, model: ModelSpec, alike: Candidate, seq_len: int, footprint: Footprint) -> None:
        self._model = model
        self._footprint = footprint
        self._micro_batches = alike.micro_batches
        sizes = Sizes(model, alike, seq_len, footprint)
        nothing = msgspec.structs.replace(alike, **dict.fromkeys(SHARED_SLOTS, 0))
        held = {inner: self._micro_batches * sizes.held_bytes(*inner) for inner in (RECOMPUTED, KEPT, AWAY)}
        self._held = held
        idle = footprint.workspace_beside([0] * model.layers)

        def total(knobs: Candidate, *holding: Holding) -> dict[Tier, int]:
            found = {Tier.GPU: -idle, Tier.HOST: 0, Tier.SSD: 0}
            for row in pool_rows(sizes, dict.fromkeys(holding, 1), knobs, [0] * model.layers):
                found[row.tier] += row.slot_bytes * row.slots
            return found

        self._base = total(nothing)
        per_unit = [total(nothing, holding) for holding in HOLDINGS]
        # Remainders always pass through the GPU with their moments, and through the host where they lie on the SSD.
        tensors = {Tier.GPU: STATE, Tier.HOST: STATE if alike.ssd_whole else (TensorClass.MOMENTS,)}
        passes = [each for each in HOLDINGS if each.passes and each.tensor in tensors[each.update]]
        per_slot = [total(msgspec.structs.replace(nothing, **{knob: 1}), *passes) for knob in SHARED_SLOTS]
        passing = total(nothing, *passes)
        self._of_units = {tier: [each[tier] - self._base[tier] for each in per_unit] for tier in self._base}
        self._of_slots = {tier: [each[tier] - passing[tier] for each in per_slot] for tier in self._base}

    def of(self, candidate: Candidate) -> dict[Tier, int]:
        """Bytes of the candidate's slots by tier."""
        units, slots, held = candidate.unit_counts(self._model), _shared_slots(candidate), self._held
        found = {tier: self._sum(tier, units, slots) for tier in self._base}
        found[Tier.GPU] += self._footprint.workspace_beside([held[inner] for inner in candidate.inner(self._model)])
        return found

    def on_host(self, candidate: Candidate) -> int:
        """Those on the host alone, in a fraction of the time."""
        return self._sum(Tier.HOST, candidate.unit_counts(self._model), _shared_slots(candidate))

    def _sum(self, tier: Tier, units: Sequence[int], slots: Sequence[int]) -> int:
        total: int = self._base[tier] + sum(map(mul, units, self._of_units[tier])) + sum(map(mul, slots, self._of_slots[tier]))
        return total


def _shared_slots(candidate: Candidate) -> list[int]:
    return [getattr(candidate, knob) for knob in SHARED_SLOTS]
