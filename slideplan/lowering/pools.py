"""Every buffer a pool: how many slots of what size a policy takes in each tier, and whose they are."""

from __future__ import annotations

from slideplan.footprint import Footprint
from slideplan.graph.tasks import SlotPool, TensorClass
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import MOMENT_BLOCK, Kernels, Moments, Policy, Tier, Workload, chunk_elements
from slideplan.quantities import MIB

MOMENT_BYTES = 8  # fp32 m and v per element
REMAINDER_BYTES = 2  # int16 low half of the fp32 master weight
WEIGHT_BYTES = 2  # bf16 high half
# All of a master weight, by format: the split one is weight and remainder.
MASTER_BYTES = {"split": WEIGHT_BYTES + REMAINDER_BYTES, "fp32": 4, "bf16": 2}
CLIP_PASSES = 3  # over the gradient: read for the norm, read and written for the scaling
BARRIER_BYTES = 8  # a counter of updated units
# AdamW reads and writes the master weights and both moments, and reads the gradient; this, for the split master.
UPDATE_STATE_TRAFFIC_BYTES = 2 * (MASTER_BYTES["split"] + MOMENT_BYTES)


def moment_bytes(elements: int, moments: Moments) -> int:
    """Both moments of a unit: in fp32; or in 8 bits each, with an fp32 scale of each for every block."""
    return MOMENT_BYTES * elements if moments == "fp32" else 2 * elements + 8 * -(-elements // MOMENT_BLOCK)


def state_bytes(elements: int, moments: Moments) -> int:
    """Remainder and both moments of a unit, or of a part of it."""
    return REMAINDER_BYTES * elements + moment_bytes(elements, moments)


# The head computes its loss in chunks of tokens whose logits (in fp32, fused: in bf16) stay within this, so that
# they are never whole, and eager gradients of the projection in blocks of rows whose bf16 product stays within that.
LOSS_CHUNK_BYTES: dict[Kernels, int] = {"eager": 256 * MIB, "fused": 512 * MIB, "graphed": 512 * MIB}
LOGIT_BYTES: dict[Kernels, int] = {"eager": 4, "fused": 2, "graphed": 2}
PRODUCT_BYTES = 128 * MIB


def loss_chunk_tokens(vocabulary: int, kernels: Kernels) -> int:
    """Tokens whose logits fit in LOSS_CHUNK_BYTES; at least one."""
    return max(1, LOSS_CHUNK_BYTES[kernels] // (LOGIT_BYTES[kernels] * vocabulary))


_MOMENTS: dict[Moments, TensorClass] = {"fp32": TensorClass.MOMENTS, "8bit": TensorClass.MOMENTS_8BIT}


class PoolLayout:
    """Pools of a policy by name, and which slots of theirs belong to which unit."""

    def __init__(self, model: ModelSpec, policy: Policy, workload: Workload, footprint: Footprint) -> None:
        self.model = model
        self.policy = policy
        self.tokens = policy.micro_batch * workload.seq_len
        self.footprint = footprint
        self.pools: dict[str, SlotPool] = {}
        self.rank: dict[tuple[str, int], int] = {}  # (pool, unit) -> first slot of its own
        self._make_pools()

    def _add_pool(
        self, name: str, tier: Tier, tensor_class: TensorClass, slot_bytes: int, owners: list[int], each: int = 1
    ) -> None:
        """Slots of units' own, `each` many per unit."""
        self.rank.update({(name, unit): each * place for place, unit in enumerate(owners)})
        self._add_shared(name, tier, tensor_class, slot_bytes, each * len(owners))

    def _add_shared(self, name: str, tier: Tier, tensor_class: TensorClass, slot_bytes: int, count: int) -> None:
        if count and slot_bytes:
            self.pools[name] = SlotPool(name=name, tier=tier, tensor_class=tensor_class, slot_bytes=slot_bytes, count=count)

    def _pinned(self, size_bytes: int) -> int:
        """Bytes that a host buffer takes which copies touch."""
        return size_bytes if self.policy.pinned_sizes == "exact" else 1 << max(0, size_bytes - 1).bit_length()

    def gradient_ring_of(self, role: UnitRole) -> str | None:
        """Name of the gradient slots that units of the role share; None where they have their own."""
        if self.policy.unit_slots == "uniform":
            return "window"
        return role if role is UnitRole.LAYER else None

    def _make_pools(self) -> None:
        model, policy = self.model, self.policy
        largest = max(model.flat_elements(role) for role in UnitRole)
        for role in UnitRole:
            units = [unit for unit in range(model.units) if model.role(unit) is role]
            elements = model.flat_elements(role)
            streaming = sum(policy.streams_weights(unit) for unit in units)
            resident = [unit for unit in units if not policy.streams_weights(unit)]
            self._add_pool(f"gpu.weights.{role}", Tier.GPU, TensorClass.WEIGHTS, WEIGHT_BYTES * elements, resident)
            if streaming:
                slot_bytes = WEIGHT_BYTES * (largest if policy.unit_slots == "uniform" else elements)
                self._add_shared("gpu.weights.window", Tier.GPU, TensorClass.WEIGHTS, slot_bytes, policy.window)
            for tier in (Tier.GPU, Tier.HOST):
                owners = [unit for unit in units if policy.units[unit].state is tier and not policy.units[unit].streams_state]
                if policy.master == "split":
                    self._add_pool(f"{tier}.remainder.{role}", tier, TensorClass.REMAINDER, REMAINDER_BYTES * elements, owners)
                moments = policy.gpu_moments if tier is Tier.GPU else "fp32"
                moments_bytes = moment_bytes(elements, moments)
                self._add_pool(f"{tier}.moments.{role}", tier, _MOMENTS[moments], moments_bytes, owners)
            on_host = [unit for unit in units if policy.units[unit].updated_on_host]
            if policy.staging != "none":
                master_bytes = MASTER_BYTES[policy.master] * elements
                self._add_pool(f"host.master.{role}", Tier.HOST, TensorClass.MASTER, master_bytes, on_host)
            if policy.staging != "per_load":
                weight_bytes = self._pinned(WEIGHT_BYTES * elements)
                self._add_pool(f"host.weights.{role}", Tier.HOST, TensorClass.WEIGHTS, weight_bytes, on_host)
            self._add_gradients(role, elements, len(on_host))
        self._make_state_pools()
        if policy.unit_slots == "uniform":
            self._add_gradients(UnitRole.LAYER, largest, len(policy.update_order))
        if policy.staging == "per_load":
            self._add_shared("host.staging", Tier.HOST, TensorClass.WEIGHTS, self._pinned(WEIGHT_BYTES * largest), 1)
        if policy.step_barrier:
            self._add_shared("host.barrier", Tier.HOST, TensorClass.WORKSPACE, BARRIER_BYTES, 1)
        self._make_activation_pools()

    def _make_state_pools(self) -> None:
        """State that passes through the GPU: its chunks on the host, apart from what no copy touches, and its slots."""
        policy = self.policy
        passing = [unit for unit in range(self.model.units) if policy.units[unit].streams_state]
        if not passing:
            return
        elements = chunk_elements(self.model.flat_elements(UnitRole.LAYER), policy.state_chunks)
        for tensor, tensor_class, size_bytes in (
            ("remainder", TensorClass.REMAINDER, REMAINDER_BYTES * elements),
            ("moments", _MOMENTS[policy.gpu_moments], moment_bytes(elements, policy.gpu_moments)),
        ):
            self._add_pool(f"host.{tensor}.passing", Tier.HOST, tensor_class, size_bytes, passing, policy.state_chunks)
            self._add_shared(f"gpu.{tensor}.passing", Tier.GPU, tensor_class, size_bytes, policy.state_slots)

    def _add_gradients(self, role: UnitRole, elements: int, on_host: int) -> None:
        """Slots of the ring for layers, one each for embedding and head; units of uniform size share one ring."""
        policy, ring = self.policy, self.gradient_ring_of(role)
        size_bytes = policy.gradient_element_bytes * elements
        name, gpu, host = (role, 1, on_host) if ring is None else (ring, policy.gradient_slots, policy.host_gradient_slots)
        self._add_shared(f"gpu.gradient.{name}", Tier.GPU, TensorClass.GRADIENT, size_bytes, gpu)
        self._add_shared(f"host.gradient.{name}", Tier.HOST, TensorClass.GRADIENT, self._pinned(size_bytes), host)

    def _make_activation_pools(self) -> None:
        model, policy = self.model, self.policy
        boundary = model.boundary_bytes(self.tokens)
        micros = policy.micro_batches
        held = [unit for unit in range(model.head_unit) if policy.keeps_boundary(unit)]
        stay = [unit for unit in held if policy.units[unit].boundary is Tier.GPU]
        leave = [unit for unit in held if policy.units[unit].boundary is Tier.HOST]
        kept = [unit for unit in range(model.units) if policy.units[unit].inner == "keep"]
        away = [unit for unit in range(model.units) if policy.units[unit].inner == "offload"]
        self._add_pool("gpu.boundary", Tier.GPU, TensorClass.BOUNDARY, boundary, stay, micros)
        self._add_pool("host.boundary", Tier.HOST, TensorClass.BOUNDARY, self._pinned(boundary), leave, micros)
        self._add_shared("gpu.boundary.cycle", Tier.GPU, TensorClass.BOUNDARY, boundary, policy.boundary_slots)
        self._add_shared("gpu.boundary_gradient", Tier.GPU, TensorClass.BOUNDARY, boundary, micros)
        feed_forward = model.feed_forward_bytes(self.tokens)
        whole, rest = (self.footprint.held_bytes(inner, feed_forward) for inner in ("keep", "offload"))
        self._add_pool("gpu.inner", Tier.GPU, TensorClass.INNER, whole, kept, micros)
        self._add_pool("gpu.inner.rest", Tier.GPU, TensorClass.INNER, rest, away, micros)
        self._add_shared("gpu.feed_forward", Tier.GPU, TensorClass.FEED_FORWARD, feed_forward, policy.inner_slots)
        self._add_pool("host.feed_forward", Tier.HOST, TensorClass.FEED_FORWARD, feed_forward, away, micros)
        layers = policy.units[1 : model.head_unit]
        workspace = self.footprint.workspace_beside(
            [micros * self.footprint.held_bytes(layer.inner, feed_forward) for layer in layers]
        )
        self._add_shared("gpu.workspace", Tier.GPU, TensorClass.WORKSPACE, workspace, 1)
