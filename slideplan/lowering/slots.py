"""Lowering, pass 4: every action gets its slots of the pools.

Slots of a unit's own never change hands. A shared slot is taken by the action that overwrites it and given back at the
last use of what was written, so the assignment is static and repeats every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import CAST_WEIGHTS, COMPUTE_KINDS, LOAD_WEIGHTS, Operation, TaskKind
from slideplan.graph.tasks import TENSOR_OF, Access, Role, Task
from slideplan.lowering.order import Action, WindowUse
from slideplan.lowering.pools import PoolLayout, transit_pool
from slideplan.lowering.recipes import Use, uses
from slideplan.lowering.sizes import CLIP_PASSES, MASTER_BYTES, WEIGHT_BYTES, update_bytes, whole_pages
from slideplan.model import UnitRole
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.policy import passage

# Which knob says how many slots of a pool there are.
_KNOBS = {
    TensorClass.GRADIENT: {Tier.GPU: "gradient_slots", Tier.HOST: "host_gradient_slots"},
    TensorClass.WEIGHTS: {Tier.HOST: "host_weight_slots"},
    TensorClass.BOUNDARY: {Tier.GPU: "boundary_slots", Tier.HOST: "host_boundary_slots"},
    TensorClass.FEED_FORWARD: {Tier.GPU: "inner_slots", Tier.HOST: "host_inner_slots"},
    **{tensor: {Tier.GPU: "state_slots", Tier.HOST: "ssd_slots"} for tensor in STATE},
}
# Pools that belong to no unit, with the slot that a micro-batch uses: its own, or the only one.
_FIXED = {
    Role.BOUNDARY_GRADIENT: ("gpu.boundary_gradient", True),
    Role.NORM: ("gpu.norm", False),
    Role.BARRIER: ("host.barrier", False),
}

# What a shared slot holds: class, tier, the unit whose tensor it is, and micro-batch or chunk.
Value = tuple[TensorClass, Tier, int, int]


def tasks_of(layout: PoolLayout, actions: Sequence[Action], windows: Sequence[WindowUse | None]) -> list[Task]:
    """The step's actions as tasks, without dependencies. `windows`: what each visit needs (`order.window_slots`)."""
    model, policy = layout.model, layout.policy
    used = [uses(action, model, policy) for action in actions]
    if policy.system.step_barrier:
        _add_barrier(actions, used, layout)
    accesses = _Assignment(layout, windows).accesses(used)
    names = _Names(layout)
    return [
        Task(
            name=names.of(action),
            operation=action.operation,
            unit=action.unit,
            micro=action.micro,
            bytes_moved=_bytes_moved(layout, action),
            flops=_flops(layout, action),
            accesses=tuple(found),
            fifo=_fifo(action.operation, policy.system.copy_lanes == "shared"),
            chunk=UNSET if action.chunk is None else action.chunk,
        )
        for action, found in zip(actions, accesses, strict=True)
    ]


class _Assignment:
    """Slots of shared pools, each handed out in the order in which they were freed."""

    def __init__(self, layout: PoolLayout, windows: Sequence[WindowUse | None]) -> None:
        self._layout = layout
        self._free = {pool.name: deque(range(pool.count)) for pool in layout.pools.values()}
        self._held: dict[Value, int] = {}
        # The window's slots are chosen with the loads: by Belady's rule, not by who was freed first.
        self._loads: dict[int, deque[int]] = {}
        for window in windows:
            if window is not None and window.load:
                self._loads.setdefault(window.unit, deque()).append(window.slot)

    def accesses(self, used: Sequence[list[Use]]) -> list[list[Access]]:
        """Accesses of all actions, in issue order."""
        last = _last_uses(used)
        return [[self._access(use, last[number][place]) for place, use in enumerate(each)] for number, each in enumerate(used)]

    def _access(self, use: Use, last: bool) -> Access:
        role, tier, owner, part, mode = use
        if role in _FIXED:
            pool, by_part = _FIXED[role]
            return Access(role, tier, pool, part if by_part else 0, mode)
        tensor = TENSOR_OF[role]
        own = self._layout.own(tensor, tier, owner)
        if own is not None:
            return Access(role, tier, own[0], own[1] + part, mode)
        pool, value = self._layout.shared(tensor, tier, owner), (tensor, tier, owner, part)
        if mode == "w":
            self._held[value] = self._take(tensor, tier, owner, pool)
        slot = self._held[value]
        if last:
            self._free[pool].append(self._held.pop(value))
        return Access(role, tier, pool, slot, mode)

    def _take(self, tensor: TensorClass, tier: Tier, owner: int, pool: str) -> int:
        if tensor is TensorClass.WEIGHTS and tier is Tier.GPU:
            return self._loads[owner].popleft()
        if not self._free[pool]:
            knob = "host_state_slots" if pool == transit_pool(tensor) else _KNOBS[tensor][tier]
            raise ValueError(f"policy.{knob} is too small for this order of tasks: pool {pool} runs out of slots")
        return self._free[pool].popleft()


def _last_uses(used: Sequence[list[Use]]) -> list[list[bool]]:
    """For each use, whether nothing uses what the slot holds after it: its next use, if any, overwrites the slot."""
    live: set[Value] = set()
    found: list[list[bool]] = []
    for each in reversed(used):
        marks = []
        for role, tier, owner, part, mode in reversed(each):
            value = TENSOR_OF[role], tier, owner, part
            marks.append(role not in _FIXED and value not in live)
            if role not in _FIXED:
                live.add(value)
                if mode == "w":
                    live.discard(value)
        found.append(marks[::-1])
    return found[::-1]


def _add_barrier(actions: Sequence[Action], used: Sequence[list[Use]], layout: PoolLayout) -> None:
    """Of other systems: the first load of a step waits for the last task on the weights in the step before."""
    policy = layout.policy
    last = TaskKind.REFRESH_WEIGHTS if policy.system.staging == "per_update" else TaskKind.UPDATE
    loads = False
    for action, each in zip(actions, used, strict=True):
        if action.operation.kind is last and action.unit == policy.update_order[-1]:
            each.append(Use(Role.BARRIER, Tier.HOST, 0, 0, "w"))
        elif not loads and action.operation in (CAST_WEIGHTS, LOAD_WEIGHTS):
            loads = True
            each.append(Use(Role.BARRIER, Tier.HOST, 0, 0, "r"))


def _fifo(operation: Operation, shared: bool) -> LaneKind | UnsetType:
    return LaneKind.COPY if shared and operation.kind is TaskKind.COPY else UNSET


class _Names:
    """Task names: operation, unit, micro-batch or chunk, and which of several passes in the step it is for."""

    def __init__(self, layout: PoolLayout) -> None:
        self._model = layout.model
        self._policy = layout.policy
        self._made: dict[tuple[Operation, int, int | None, int | None], int] = {}

    def of(self, action: Action) -> str:
        """To be asked once per action, in issue order."""
        earlier = self._made.get(action, 0)
        self._made[action] = earlier + 1
        name = f"{action.operation}/{self._model.unit_name(action.unit)}"
        if action.micro is not None:
            name += f"/mb{action.micro}"
        if action.chunk is not None:
            name += f"/chunk{action.chunk}"
        return f"{name}/pass{earlier + 1}" if earlier else name


def _bytes_moved(layout: PoolLayout, action: Action) -> int:
    """Bytes that cross a link, or that a pass moves through memory; zero for compute."""
    operation, unit, _, chunk = action
    if operation.kind in COMPUTE_KINDS:
        return 0
    policy, sizes = layout.policy, layout.sizes
    placement = policy.units[unit]
    elements = sizes.elements[layout.model.role(unit)]
    part = elements if chunk is None else passage(policy, placement.update).chunk_elements(layout.model)
    master = policy.system.master
    match operation.kind:
        case TaskKind.COPY:
            moved = [sizes.of(tensor, part) for tensor in operation.tensors]
            return sum(map(whole_pages, moved) if Tier.SSD in (operation.source, operation.target) else moved)
        case TaskKind.UPDATE:
            part = min(part, elements - (chunk or 0) * part)  # the last chunk may be smaller
            return update_bytes(part, master, policy.state, policy.gradient_dtype)
        case TaskKind.CLIP_GRADIENT:
            return CLIP_PASSES * sizes.of(TensorClass.GRADIENT, elements)
    return (MASTER_BYTES[master] + WEIGHT_BYTES) * elements  # casts and refreshes


def _flops(layout: PoolLayout, action: Action) -> int:
    kind, role = action.operation.kind, layout.model.role(action.unit)
    if kind not in COMPUTE_KINDS:
        return 0
    tokens = layout.sizes.tokens
    matmul = layout.model.matmul_flops(role, tokens)
    attention = layout.model.attention_flops(tokens, layout.seq_len) if role is UnitRole.LAYER else 0
    forward, backward = matmul + attention, 2 * matmul + attention * 5 // 2
    return {
        TaskKind.FORWARD: forward,
        TaskKind.FORWARD_KEEP: forward,
        TaskKind.BACKWARD: backward,
        TaskKind.BACKWARD_RECOMPUTE: forward + backward,
        TaskKind.LOSS: forward + backward,
    }[kind]
