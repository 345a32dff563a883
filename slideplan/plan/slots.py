"""Lowering, pass 3: every buffer gets a pool, every action its slots.

Walks the issue order once. A slot shared by several units goes back to its ring at its last reader
and the ring hands out the slot freed longest ago, so the assignment is static and repeats every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET

from slideplan.plan.footprint import Footprint
from slideplan.plan.graph import LANE_OF, Access, Lane, Role, SlotPool, Task, TaskKind, TensorClass
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.order import Action, WindowUse
from slideplan.plan.policy import Kernels, Moments, Policy, Tier, Workload
from slideplan.plan.quantities import MIB

MOMENT_BYTES = 8  # fp32 m and v per element
MOMENT_BLOCK = 256  # elements that share scales where moments have 8 bits
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


# The head computes its loss in chunks of tokens whose logits (in fp32, fused: in bf16) stay within this, so that
# they are never whole, and eager gradients of the projection in blocks of rows whose bf16 product stays within that.
LOSS_CHUNK_BYTES: dict[Kernels, int] = {"eager": 256 * MIB, "fused": 512 * MIB, "graphed": 512 * MIB}
LOGIT_BYTES: dict[Kernels, int] = {"eager": 4, "fused": 2, "graphed": 2}
PRODUCT_BYTES = 128 * MIB


def loss_chunk_tokens(vocabulary: int, kernels: Kernels) -> int:
    """Tokens whose logits fit in LOSS_CHUNK_BYTES; at least one."""
    return max(1, LOSS_CHUNK_BYTES[kernels] // (LOGIT_BYTES[kernels] * vocabulary))


class _Ring:
    """Slots of a shared pool, handed out in the order in which they were freed."""

    def __init__(self, pool: str, count: int, knob: str) -> None:
        self.pool = pool
        self._free = deque(range(count))
        self._knob = knob

    def take(self) -> int:
        if not self._free:
            raise ValueError(f"policy.{self._knob} is too small for this order of tasks: pool {self.pool} runs out of slots")
        return self._free.popleft()

    def give_back(self, slot: int) -> None:
        self._free.append(slot)


class SlotAssignment:
    """Pools of a policy, and the accesses of its actions in issue order.

    `windows`: what each visit needs of the window (`order.window_slots`); pools alone need none.
    """

    def __init__(
        self,
        model: ModelSpec,
        policy: Policy,
        workload: Workload,
        footprint: Footprint,
        windows: Sequence[WindowUse | None] = (),
    ) -> None:
        self.model = model
        self.policy = policy
        self.tokens = policy.micro_batch * workload.seq_len
        self.seq_len = workload.seq_len
        self.footprint = footprint
        self.pools: dict[str, SlotPool] = {}
        self._rank: dict[tuple[str, int], int] = {}  # (pool, unit) -> slot of its own
        self._make_pools()
        shared = self._gradient_ring_of(UnitRole.LAYER)
        self._gradient_ring = _Ring(f"gpu.gradient.{shared}", policy.gradient_slots, "gradient_slots")
        self._host_gradient_ring = _Ring(f"host.gradient.{shared}", policy.host_gradient_slots, "host_gradient_slots")
        self._boundary_ring = _Ring("gpu.boundary.cycle", policy.boundary_slots, "boundary_slots")
        self._inner_ring = _Ring("gpu.feed_forward", policy.inner_slots, "inner_slots")
        self._gradient: dict[int, int] = {}
        self._host_gradient: dict[int, int] = {}
        self._boundary: dict[tuple[int, int], int] = {}
        self._boundary_users: dict[tuple[int, int], int] = {}
        self._feed_forward: dict[tuple[int, int], int] = {}
        self._loads: dict[int, int] = {}
        self._ran: set[tuple[int, int]] = set()  # unit, micro-batch: forward once already
        self._loading = False  # whether the step's first cast or load was seen
        self._window: dict[int, deque[int]] = {}
        self._window_loads: dict[int, deque[int]] = {}
        for window in windows:
            if window is not None:
                self._window.setdefault(window.unit, deque()).append(window.slot)
                if window.load:
                    self._window_loads.setdefault(window.unit, deque()).append(window.slot)

    # -- pools ---------------------------------------------------------------------------------

    def _add_pool(self, name: str, tier: Tier, tensor_class: TensorClass, slot_bytes: int, owners: list[int]) -> None:
        for slot, unit in enumerate(owners):
            self._rank[name, unit] = slot
        self._add_shared(name, tier, tensor_class, slot_bytes, len(owners))

    def _add_shared(self, name: str, tier: Tier, tensor_class: TensorClass, slot_bytes: int, count: int) -> None:
        if count and slot_bytes:
            self.pools[name] = SlotPool(name=name, tier=tier, tensor_class=tensor_class, slot_bytes=slot_bytes, count=count)

    def _pinned(self, size_bytes: int) -> int:
        """Bytes that a host buffer takes which copies touch."""
        return size_bytes if self.policy.pinned_sizes == "exact" else 1 << max(0, size_bytes - 1).bit_length()

    def _gradient_ring_of(self, role: UnitRole) -> str | None:
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
                owners = [unit for unit in units if policy.units[unit].state is tier]
                if policy.master == "split":
                    self._add_pool(f"{tier}.remainder.{role}", tier, TensorClass.REMAINDER, REMAINDER_BYTES * elements, owners)
                moments = policy.gpu_moments if tier is Tier.GPU else "fp32"
                holds = TensorClass.MOMENTS if moments == "fp32" else TensorClass.MOMENTS_8BIT
                self._add_pool(f"{tier}.moments.{role}", tier, holds, moment_bytes(elements, moments), owners)
            on_host = [unit for unit in units if policy.units[unit].state is Tier.HOST]
            if policy.staging != "none":
                master_bytes = MASTER_BYTES[policy.master] * elements
                self._add_pool(f"host.master.{role}", Tier.HOST, TensorClass.MASTER, master_bytes, on_host)
            if policy.staging != "per_load":
                weight_bytes = self._pinned(WEIGHT_BYTES * elements)
                self._add_pool(f"host.weights.{role}", Tier.HOST, TensorClass.WEIGHTS, weight_bytes, on_host)
            self._add_gradients(role, elements, len(on_host))
        if policy.unit_slots == "uniform":
            self._add_gradients(UnitRole.LAYER, largest, len(policy.update_order))
        if policy.staging == "per_load":
            self._add_shared("host.staging", Tier.HOST, TensorClass.WEIGHTS, self._pinned(WEIGHT_BYTES * largest), 1)
        if policy.step_barrier:
            self._add_shared("host.barrier", Tier.HOST, TensorClass.WORKSPACE, BARRIER_BYTES, 1)
        self._make_activation_pools()

    def _add_gradients(self, role: UnitRole, elements: int, on_host: int) -> None:
        """Slots of the ring for layers, one each for embedding and head; units of uniform size share one ring."""
        policy, ring = self.policy, self._gradient_ring_of(role)
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
        self._add_shared("gpu.boundary", Tier.GPU, TensorClass.BOUNDARY, boundary, len(stay) * micros)
        self._add_shared("host.boundary", Tier.HOST, TensorClass.BOUNDARY, self._pinned(boundary), len(leave) * micros)
        for name, owners in (("gpu.boundary", stay), ("host.boundary", leave)):
            self._rank.update({(name, unit): micros * place for place, unit in enumerate(owners)})
        self._add_shared("gpu.boundary.cycle", Tier.GPU, TensorClass.BOUNDARY, boundary, policy.boundary_slots)
        self._add_shared("gpu.boundary_gradient", Tier.GPU, TensorClass.BOUNDARY, boundary, micros)
        feed_forward = model.feed_forward_bytes(self.tokens)
        whole, rest = (self.footprint.held_bytes(inner, feed_forward) for inner in ("keep", "offload"))
        self._add_shared("gpu.inner", Tier.GPU, TensorClass.INNER, whole, len(kept) * micros)
        self._add_shared("gpu.inner.rest", Tier.GPU, TensorClass.INNER, rest, len(away) * micros)
        self._add_shared("gpu.feed_forward", Tier.GPU, TensorClass.FEED_FORWARD, feed_forward, policy.inner_slots)
        self._add_shared("host.feed_forward", Tier.HOST, TensorClass.FEED_FORWARD, feed_forward, len(away) * micros)
        for name, owners in (("gpu.inner", kept), ("gpu.inner.rest", away), ("host.feed_forward", away)):
            self._rank.update({(name, unit): micros * place for place, unit in enumerate(owners)})
        layers = policy.units[1 : model.head_unit]
        workspace = self.footprint.workspace_beside(
            [micros * self.footprint.held_bytes(layer.inner, feed_forward) for layer in layers]
        )
        self._add_shared("gpu.workspace", Tier.GPU, TensorClass.WORKSPACE, workspace, 1)

    def _own(self, role: Role, pool: str, unit: int, mode: Literal["r", "w", "rw"], micro: int = 0) -> Access:
        return Access(role=role, pool=pool, slot=self._rank[pool, unit] + micro, mode=mode)

    # -- slots of each tensor class ------------------------------------------------------------

    def _weights(self, unit: int, mode: Literal["r", "w", "rw"], role: Role = Role.WEIGHTS, last: bool = False) -> Access:
        if not self.policy.streams_weights(unit):
            return self._own(role, f"gpu.weights.{self.model.role(unit)}", unit, mode)
        queue = self._window_loads[unit] if mode == "w" else self._window[unit]
        slot = queue.popleft() if mode == "w" or last else queue[0]
        return Access(role=role, pool="gpu.weights.window", slot=slot, mode=mode)

    def _boundary_access(self, role: Role, unit: int, micro: int, mode: Literal["r", "w"]) -> Access:
        """Boundary activation that leaves `unit`, on the GPU."""
        policy, key = self.policy, (unit, micro)
        if policy.units[unit].boundary is Tier.GPU and policy.keeps_boundary(unit):
            return self._own(role, "gpu.boundary", unit, mode, micro)
        if mode == "w":
            self._boundary[key] = self._boundary_ring.take()
            # In forward the next unit reads it, and the offload if there is one; in backward the next unit's
            # backward does, and before it the next unit's second forward if there is one.
            forward = role is Role.OUTPUT and key not in self._ran
            also = policy.units[unit].boundary is Tier.HOST if forward else policy.runs_again(unit + 1)
            self._boundary_users[key] = 1 + also
        slot = self._boundary[key]
        if mode == "r":
            self._boundary_users[key] -= 1
            if self._boundary_users[key] == 0:
                self._boundary_ring.give_back(self._boundary.pop(key))
        return Access(role=role, pool="gpu.boundary.cycle", slot=slot, mode=mode)

    def _gradient_access(self, unit: int, mode: Literal["r", "w", "rw"], role: Role = Role.GRADIENT) -> Access:
        unit_role = self.model.role(unit)
        if self._gradient_ring_of(unit_role) is None:
            return Access(role=role, pool=f"gpu.gradient.{unit_role}", slot=0, mode=mode)
        if mode == "w":
            self._gradient[unit] = self._gradient_ring.take()
        slot = self._gradient[unit]
        if mode == "r":
            self._gradient_ring.give_back(self._gradient.pop(unit))
        return Access(role=role, pool=self._gradient_ring.pool, slot=slot, mode=mode)

    def _host_gradient_access(self, unit: int, mode: Literal["r", "w", "rw"]) -> Access:
        unit_role = self.model.role(unit)
        if self._gradient_ring_of(unit_role) is None:
            return Access(role=Role.HOST_GRADIENT, pool=f"host.gradient.{unit_role}", slot=0, mode=mode)
        if mode == "w":
            self._host_gradient[unit] = self._host_gradient_ring.take()
        slot = self._host_gradient[unit]
        if mode == "r":
            self._host_gradient_ring.give_back(self._host_gradient.pop(unit))
        return Access(role=Role.HOST_GRADIENT, pool=self._host_gradient_ring.pool, slot=slot, mode=mode)

    def _host_weights(self, unit: int, mode: Literal["r", "w", "rw"]) -> Access:
        """bf16 weights on the host, as loads read them."""
        if self.policy.staging == "per_load":
            return Access(role=Role.HOST_WEIGHTS, pool="host.staging", slot=0, mode=mode)
        return self._own(Role.HOST_WEIGHTS, f"host.weights.{self.model.role(unit)}", unit, mode)

    def _master(self, unit: int, mode: Literal["r", "rw"]) -> Access:
        """Master weights on the host, but for the remainder of a split one: where nothing is staged, the bf16 weights."""
        if self.policy.staging == "none":
            return self._host_weights(unit, mode)
        return self._own(Role.MASTER, f"host.master.{self.model.role(unit)}", unit, mode)

    def _barrier(self, kind: TaskKind, unit: int) -> list[Access]:
        """The first load of a step waits for the last task on the weights in the step before."""
        if not self.policy.step_barrier:
            return []
        last = TaskKind.REFRESH_WEIGHTS if self.policy.staging == "per_update" else TaskKind.UPDATE_HOST
        if kind is last and unit == self.policy.update_order[-1]:
            return [Access(role=Role.BARRIER, pool="host.barrier", slot=0, mode="w")]
        if kind in (TaskKind.CAST_WEIGHTS, TaskKind.LOAD_WEIGHTS) and not self._loading:
            self._loading = True
            return [Access(role=Role.BARRIER, pool="host.barrier", slot=0, mode="r")]
        return []

    def _inner(self, unit: int, micro: int, mode: Literal["r", "w"]) -> list[Access]:
        """What a forward keeps for its backward; of what can wait on the host, the slot on the GPU."""
        if self.policy.units[unit].inner == "keep":
            return [self._own(Role.INNER, "gpu.inner", unit, mode, micro)]
        return [self._own(Role.INNER, "gpu.inner.rest", unit, mode, micro), self._feed_forward_access(unit, micro, mode)]

    def _feed_forward_access(self, unit: int, micro: int, mode: Literal["r", "w"]) -> Access:
        """Written by the forward or by a fetch; its one reader, the offload or the backward, frees the slot."""
        if mode == "w":
            slot = self._feed_forward[unit, micro] = self._inner_ring.take()
        else:
            slot = self._feed_forward.pop((unit, micro))
            self._inner_ring.give_back(slot)
        return Access(role=Role.FEED_FORWARD, pool=self._inner_ring.pool, slot=slot, mode=mode)

    def _state(self, tier: Tier, unit: int) -> list[Access]:
        role = self.model.role(unit)
        moments = self._own(Role.MOMENTS, f"{tier}.moments.{role}", unit, "rw")
        if self.policy.master != "split":
            return [moments]
        return [self._own(Role.REMAINDER, f"{tier}.remainder.{role}", unit, "rw"), moments]

    # -- tasks ---------------------------------------------------------------------------------

    def task(self, action: Action) -> Task:
        """The action with its slots; to be called once per action, in issue order."""
        kind, unit, micro = action
        model = self.model
        role = model.role(unit)
        elements = model.flat_elements(role)
        gradient_bytes = self.policy.gradient_element_bytes * elements
        bytes_moved = flops = 0
        name = f"{kind}/{model.unit_name(unit)}" + (f"/mb{micro}" if micro is not None else "")
        accesses: list[Access]
        if kind is TaskKind.LOAD_WEIGHTS:
            accesses = [self._host_weights(unit, "r"), self._weights(unit, "w")]
            bytes_moved = WEIGHT_BYTES * elements
            name += self._load_suffix(unit)
            self._loads[unit] = self._loads.get(unit, 0) + 1
        elif kind in (TaskKind.CAST_WEIGHTS, TaskKind.REFRESH_WEIGHTS):
            accesses = [self._master(unit, "r"), self._host_weights(unit, "w")]
            bytes_moved = (MASTER_BYTES[self.policy.master] + WEIGHT_BYTES) * elements
            name += self._load_suffix(unit) if kind is TaskKind.CAST_WEIGHTS else ""
        elif kind is TaskKind.CLIP_GRADIENT:
            accesses = [self._host_gradient_access(unit, "rw")]
            bytes_moved = CLIP_PASSES * gradient_bytes
        elif kind is TaskKind.UPDATE_HOST:
            accesses = [self._host_gradient_access(unit, "r"), *self._state(Tier.HOST, unit), self._master(unit, "rw")]
            bytes_moved = 2 * (MASTER_BYTES[self.policy.master] + MOMENT_BYTES) * elements + gradient_bytes
        elif kind is TaskKind.UPDATE_GPU:
            accesses = [self._gradient_access(unit, "r"), *self._state(Tier.GPU, unit), self._weights(unit, "rw")]
            state_bytes = MASTER_BYTES["split"] * elements + moment_bytes(elements, self.policy.gpu_moments)
            bytes_moved = 2 * state_bytes + gradient_bytes
        elif kind is TaskKind.OFFLOAD_GRADIENT:
            accesses = [self._gradient_access(unit, "r"), self._host_gradient_access(unit, "w")]
            bytes_moved = gradient_bytes
        elif LANE_OF[kind] in (Lane.H2D, Lane.D2H):
            assert micro is not None
            accesses, bytes_moved = self._activation_copy(kind, unit, micro)
        else:
            assert micro is not None
            accesses = self._compute_accesses(kind, unit, micro)
            flops = self._flops(kind, role)
            if kind is TaskKind.FORWARD and (unit, micro) in self._ran:
                name += "/again"
            self._ran.add((unit, micro))
        copies = LANE_OF[kind] in (Lane.H2D, Lane.D2H)
        return Task(
            name=name, kind=kind, unit=unit, micro=micro, bytes_moved=bytes_moved, flops=flops,
            accesses=(*accesses, *self._barrier(kind, unit)),
            fifo=Lane.COPY if copies and self.policy.copy_lanes == "shared" else UNSET,
        )  # fmt: skip

    def _activation_copy(self, kind: TaskKind, unit: int, micro: int) -> tuple[list[Access], int]:
        """Slots and bytes of a copy of activations between GPU and host."""
        leaves = kind in (TaskKind.OFFLOAD_BOUNDARY, TaskKind.OFFLOAD_INNER)
        here: Literal["r", "w"] = "r" if leaves else "w"
        there: Literal["r", "w"] = "w" if leaves else "r"
        if kind in (TaskKind.OFFLOAD_BOUNDARY, TaskKind.FETCH_BOUNDARY):
            on_gpu = self._boundary_access(Role.INPUT, unit, micro, here)
            on_host = self._own(Role.HOST_BOUNDARY, "host.boundary", unit, there, micro)
            size_bytes = self.model.boundary_bytes(self.tokens)
        else:
            on_gpu = self._feed_forward_access(unit, micro, here)
            on_host = self._own(Role.HOST_FEED_FORWARD, "host.feed_forward", unit, there, micro)
            size_bytes = self.model.feed_forward_bytes(self.tokens)
        return [on_gpu, on_host] if leaves else [on_host, on_gpu], size_bytes

    def _load_suffix(self, unit: int) -> str:
        """Which pass the next load of a streaming unit is for."""
        if not self.policy.streams_weights(unit):
            return ""
        passes = ("forward", "backward") if self.policy.checkpoint_interval == 1 else ("pass1", "pass2", "pass3")
        return f"/{passes[self._loads.get(unit, 0)]}"

    def _compute_accesses(self, kind: TaskKind, unit: int, micro: int) -> list[Access]:
        model, micros = self.model, self.policy.micro_batches
        backward = kind in (TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE)
        accesses = []
        if not (backward and unit == 0):  # the embedding's backward scatters, it reads no weights
            accesses.append(self._weights(unit, "r", last=micro == micros - 1))
        if unit > 0:
            accesses.append(self._boundary_access(Role.INPUT, unit - 1, micro, "r"))
        if kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP):
            accesses.append(self._boundary_access(Role.OUTPUT, unit, micro, "w"))
            if kind is TaskKind.FORWARD_KEEP:
                accesses += self._inner(unit, micro, "w")
            return accesses
        if kind is TaskKind.BACKWARD and unit > 0:
            accesses += self._inner(unit, micro, "r")
        accesses.append(
            Access(role=Role.BOUNDARY_GRADIENT, pool="gpu.boundary_gradient", slot=micro,
                   mode="w" if kind is TaskKind.LOSS else "r" if unit == 0 else "rw")
        )  # fmt: skip
        started = micro > 0 or (unit == 0 and model.tied_embeddings)
        accesses.append(self._gradient_access(unit, "rw" if started else "w"))
        if kind is TaskKind.LOSS and model.tied_embeddings:
            accesses.append(self._weights(0, "r", Role.TIED_WEIGHTS, last=micro == micros - 1))
            accesses.append(self._gradient_access(0, "rw" if micro > 0 else "w", Role.TIED_GRADIENT))
        return accesses

    def _flops(self, kind: TaskKind, role: UnitRole) -> int:
        matmul = self.model.matmul_flops(role, self.tokens)
        attention = self.model.attention_flops(self.tokens, self.seq_len) if role is UnitRole.LAYER else 0
        forward, backward = matmul + attention, 2 * matmul + attention * 5 // 2
        return {
            TaskKind.FORWARD: forward,
            TaskKind.FORWARD_KEEP: forward,
            TaskKind.BACKWARD: backward,
            TaskKind.BACKWARD_RECOMPUTE: forward + backward,
            TaskKind.LOSS: forward + backward,
        }[kind]
