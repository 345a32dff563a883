"""A policy by counts. Layers are alike, so a candidate says how many, not which."""

from __future__ import annotations

from slideplan.codec import Spec
from slideplan.footprint import Footprint
from slideplan.lowering.pools import MOMENT_BYTES, REMAINDER_BYTES, WEIGHT_BYTES, state_bytes
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import (
    GRADIENT_BYTES,
    GradientDtype,
    Inner,
    Kernels,
    Moments,
    Policy,
    Tier,
    UnitPolicy,
    chunk_elements,
)

STATE_BYTES = MOMENT_BYTES + REMAINDER_BYTES


class Candidate(Spec, frozen=True):
    """A policy by counts. The fields shared with `Policy` mean the same.

    state_layers:      first layers whose state, and with it weights, stay on the GPU
    streamed_state:    layers after those whose state lies on the host and is updated on the GPU: their gradients are
                       the last, so that the host has begun to update the others
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
    gpu_moments: Moments = "fp32"
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

    def state_on_gpu(self, model: ModelSpec, unit: int) -> bool:
        if unit == 0:
            return self.embedding_on_gpu
        return self.head_on_gpu if unit == model.head_unit else unit <= self.state_layers

    @property
    def gpu_updated(self) -> int:
        """First layers that are updated on the GPU."""
        return self.state_layers + self.streamed_state

    def host_units(self, model: ModelSpec) -> int:
        """How many units the host updates."""
        return model.units - self.gpu_updated - self.embedding_on_gpu - self.head_on_gpu

    def update_order(self, model: ModelSpec) -> tuple[int, ...]:
        """Units that the host updates: the later ones as their gradients arrive, then the deferred, first unit first."""
        passing = range(self.state_layers + 1, self.gpu_updated + 1)
        host = [unit for unit in range(model.units) if not self.state_on_gpu(model, unit) and unit not in passing]
        return (*reversed(host[self.deferred_updates :]), *host[: self.deferred_updates])

    def inner(self, model: ModelSpec) -> list[Inner]:
        """What becomes of each layer's inner activations.

        Layers that offload theirs are spread among those that may, so that copies have time to keep up with compute.
        """
        recomputed = model.layers - self.kept_layers
        found: list[Inner] = ["recompute" if layer < recomputed else "keep" for layer in range(model.layers)]
        room = recomputed - self.offloaded_outputs
        for number in range(self.offloaded_inner):
            found[self.offloaded_outputs + (number + 1) * room // self.offloaded_inner - 1] = "offload"
        return found

    def policy(self, model: ModelSpec) -> Policy:
        """The policy spelt out unit by unit."""
        units = []
        inner = self.inner(model)
        for unit in range(model.units):
            state = Tier.GPU if self.state_on_gpu(model, unit) else Tier.HOST
            layer = model.role(unit) is UnitRole.LAYER
            units.append(
                UnitPolicy(
                    state=state,
                    weights=Tier.GPU if layer and unit <= self.weight_layers else state,
                    boundary=Tier.HOST if unit < self.offloaded_outputs else Tier.GPU,
                    inner=inner[unit - 1] if layer else "recompute",
                    streams_state=layer and self.state_layers < unit <= self.gpu_updated,
                )
            )
        return Policy(
            micro_batch=self.micro_batch, micro_batches=self.micro_batches, window=self.window,
            prefetch_depth=self.prefetch_depth, gradient_slots=self.gradient_slots,
            host_gradient_slots=self.host_gradient_slots, boundary_slots=self.boundary_slots, inner_slots=self.inner_slots,
            state_slots=self.state_slots, state_chunks=self.state_chunks,
            gradient_dtype=self.gradient_dtype, kernels=self.kernels, gpu_moments=self.gpu_moments,
            gradient_norms=self.gradient_norms, update_order=self.update_order(model), units=tuple(units),
        )  # fmt: skip

    def slot_bytes(self, model: ModelSpec, seq_len: int, footprint: Footprint) -> dict[Tier, int]:
        """What the pools of this policy take in each tier, without making them."""
        embedding, layer, head = (model.flat_elements(role) for role in UnitRole)
        gradient, micros, layers = GRADIENT_BYTES[self.gradient_dtype], self.micro_batches, model.layers
        boundary = model.boundary_bytes(self.micro_batch * seq_len)
        ends_on_host = embedding * (not self.embedding_on_gpu) + head * (not self.head_on_gpu)
        gpu = WEIGHT_BYTES * (embedding + head + layer * (self.weight_layers + self.window))
        chunk = chunk_elements(layer, self.state_chunks) if self.state_chunks else 0
        on_gpu = (
            (embedding, self.embedding_on_gpu),
            (head, self.head_on_gpu),
            (layer, self.state_layers),
            (chunk, self.state_slots),
        )
        gpu += sum(count * state_bytes(elements, self.gpu_moments) for elements, count in on_gpu)
        gpu += gradient * (embedding + head + layer * self.gradient_slots)
        gpu += boundary * ((layers + 1 - self.offloaded_outputs + 1) * micros + self.boundary_slots)
        feed_forward = model.feed_forward_bytes(self.micro_batch * seq_len)
        kept_bytes = [micros * footprint.held_bytes(inner, feed_forward) for inner in self.inner(model)]
        gpu += sum(kept_bytes) + footprint.workspace_beside(kept_bytes) + feed_forward * self.inner_slots
        host = (WEIGHT_BYTES + STATE_BYTES) * (ends_on_host + layer * (layers - self.gpu_updated))
        host += state_bytes(chunk, self.gpu_moments) * self.state_chunks * self.streamed_state
        host += gradient * (ends_on_host + layer * self.host_gradient_slots)
        host += (boundary * self.offloaded_outputs + feed_forward * self.offloaded_inner) * micros
        return {Tier.GPU: gpu, Tier.HOST: host}
