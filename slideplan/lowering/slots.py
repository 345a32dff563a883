"""Lowering, pass 4: every action gets its slots of the pools.

Walks the issue order once. A slot shared by several units goes back to its ring at its last reader
and the ring hands out the slot freed longest ago, so the assignment is static and repeats every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Literal

from msgspec import UNSET

from slideplan.graph.tasks import LANE_OF, Access, Lane, Role, Task, TaskKind
from slideplan.lowering.order import Action, WindowUse
from slideplan.lowering.pools import (
    CLIP_PASSES,
    MASTER_BYTES,
    MOMENT_BYTES,
    WEIGHT_BYTES,
    PoolLayout,
    state_bytes,
)
from slideplan.model import UnitRole
from slideplan.policy import Tier, chunk_elements

# What a chunk's load, update and way out do with its slot on the GPU.
_PASSING_MODES: dict[TaskKind, Literal["r", "w", "rw"]] = {
    TaskKind.LOAD_STATE: "w",
    TaskKind.UPDATE_PASSING: "rw",
    TaskKind.OFFLOAD_STATE: "r",
}


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
    """Accesses of a policy's actions to its pools, in issue order.

    `windows`: what each visit needs of the window (`order.window_slots`).
    """

    def __init__(self, layout: PoolLayout, seq_len: int, windows: Sequence[WindowUse | None]) -> None:
        self.model, self.policy, self.tokens, self.seq_len = layout.model, layout.policy, layout.tokens, seq_len
        policy = layout.policy
        self._layout = layout
        shared = layout.gradient_ring_of(UnitRole.LAYER)
        self._gradient_ring = _Ring(f"gpu.gradient.{shared}", policy.gradient_slots, "gradient_slots")
        self._host_gradient_ring = _Ring(f"host.gradient.{shared}", policy.host_gradient_slots, "host_gradient_slots")
        self._boundary_ring = _Ring("gpu.boundary.cycle", policy.boundary_slots, "boundary_slots")
        self._inner_ring = _Ring("gpu.feed_forward", policy.inner_slots, "inner_slots")
        self._state_ring = _Ring("gpu.state", policy.state_slots, "state_slots")
        self._gradient: dict[int, int] = {}
        self._host_gradient: dict[int, int] = {}
        self._boundary: dict[tuple[int, int], int] = {}
        self._boundary_users: dict[tuple[int, int], int] = {}
        self._feed_forward: dict[tuple[int, int], int] = {}
        self._passing: dict[tuple[int, int], int] = {}  # unit, chunk -> slot of its state
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

    def _own(self, role: Role, pool: str, unit: int, mode: Literal["r", "w", "rw"], part: int = 0) -> Access:
        """A slot of the unit's own; `part`: which of several, for micro-batches or chunks."""
        return Access(role=role, pool=pool, slot=self._layout.rank[pool, unit] + part, mode=mode)

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

    def _gradient_access(
        self, unit: int, mode: Literal["r", "w", "rw"], role: Role = Role.GRADIENT, last: bool = True
    ) -> Access:
        unit_role = self.model.role(unit)
        if self._layout.gradient_ring_of(unit_role) is None:
            return Access(role=role, pool=f"gpu.gradient.{unit_role}", slot=0, mode=mode)
        if mode == "w":
            self._gradient[unit] = self._gradient_ring.take()
        slot = self._gradient[unit]
        if mode == "r" and last:
            self._gradient_ring.give_back(self._gradient.pop(unit))
        return Access(role=role, pool=self._gradient_ring.pool, slot=slot, mode=mode)

    def _host_gradient_access(self, unit: int, mode: Literal["r", "w", "rw"]) -> Access:
        unit_role = self.model.role(unit)
        if self._layout.gradient_ring_of(unit_role) is None:
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

    def _passing_state(self, kind: TaskKind, unit: int, chunk: int) -> list[Access]:
        """Slots on the GPU of a chunk of state that passes through: taken by its load, given back by its way out."""
        if kind is TaskKind.LOAD_STATE:
            self._passing[unit, chunk] = self._state_ring.take()
        slot, mode = self._passing[unit, chunk], _PASSING_MODES[kind]
        if kind is TaskKind.OFFLOAD_STATE:
            self._state_ring.give_back(self._passing.pop((unit, chunk)))
        return [
            Access(role=Role.REMAINDER, pool="gpu.remainder.passing", slot=slot, mode=mode),
            Access(role=Role.MOMENTS, pool="gpu.moments.passing", slot=slot, mode=mode),
        ]

    def _state_on_host(self, unit: int, chunk: int, mode: Literal["r", "w"]) -> list[Access]:
        """Where a chunk of state that passes through the GPU lies on the host."""
        return [
            self._own(Role.HOST_REMAINDER, "host.remainder.passing", unit, mode, chunk),
            self._own(Role.HOST_MOMENTS, "host.moments.passing", unit, mode, chunk),
        ]

    def _state(self, tier: Tier, unit: int) -> list[Access]:
        role = self.model.role(unit)
        moments = self._own(Role.MOMENTS, f"{tier}.moments.{role}", unit, "rw")
        if self.policy.master != "split":
            return [moments]
        return [self._own(Role.REMAINDER, f"{tier}.remainder.{role}", unit, "rw"), moments]

    # -- tasks ---------------------------------------------------------------------------------

    def task(self, action: Action) -> Task:
        """The action with its slots; to be called once per action, in issue order."""
        kind, unit, micro, chunk = action
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
            bytes_moved = self._gpu_update_bytes(elements)
        elif chunk is not None:
            accesses, bytes_moved = self._chunk_of_state(kind, unit, chunk)
            name += f"/chunk{chunk}"
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
            chunk=UNSET if chunk is None else chunk,
        )  # fmt: skip

    def _chunk_of_state(self, kind: TaskKind, unit: int, chunk: int) -> tuple[list[Access], int]:
        """Slots and bytes of a chunk whose state passes through the GPU: of its copies, and of its update there."""
        policy, elements = self.policy, self.model.flat_elements(UnitRole.LAYER)
        size = chunk_elements(elements, policy.state_chunks)
        state = self._passing_state(kind, unit, chunk)
        if kind is not TaskKind.UPDATE_PASSING:
            on_host = self._state_on_host(unit, chunk, "r" if kind is TaskKind.LOAD_STATE else "w")
            return [*on_host, *state], state_bytes(size, policy.gpu_moments)
        size = min(size, elements - chunk * size)
        gradient = self._gradient_access(unit, "r", last=chunk == policy.state_chunks - 1)
        return [gradient, *state, self._weights(unit, "rw")], self._gpu_update_bytes(size)

    def _gpu_update_bytes(self, elements: int) -> int:
        """What an update on the GPU moves: weights and state read and written, the gradient read."""
        policy = self.policy
        read = WEIGHT_BYTES * elements + state_bytes(elements, policy.gpu_moments)
        return 2 * read + policy.gradient_element_bytes * elements

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
