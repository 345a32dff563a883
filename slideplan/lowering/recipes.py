"""Which slots each operation uses: one table, read by pass 4."""

from __future__ import annotations

from typing import Literal, NamedTuple

from slideplan.graph.operations import Operation, TaskKind
from slideplan.graph.tasks import COPIED_AS, TENSOR_OF, Mode, Role
from slideplan.lowering.order import Action
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.policy import Policy

# "sum": the first of several writes all of it, later ones add to it.
RecipeMode = Literal["r", "w", "rw", "sum"]
Recipe = tuple[tuple[Role, RecipeMode], ...]

_WEIGHTS: tuple[Role, RecipeMode] = (Role.WEIGHTS, "r")
_ENTERS: tuple[Role, RecipeMode] = (Role.INPUT, "r")
_FLOWS: tuple[Role, RecipeMode] = (Role.BOUNDARY_GRADIENT, "rw")
_SUMS: tuple[Role, RecipeMode] = (Role.GRADIENT, "sum")
_KEPT: Recipe = ((Role.INNER, "r"), (Role.FEED_FORWARD, "r"))

# In the order in which slots are freed and taken: what a task reads for the last time may hold what it writes.
COMPUTE: dict[tuple[TaskKind, UnitRole], Recipe] = {
    (TaskKind.FORWARD, UnitRole.EMBEDDING): (_WEIGHTS, (Role.OUTPUT, "w")),
    (TaskKind.FORWARD, UnitRole.LAYER): (_WEIGHTS, _ENTERS, (Role.OUTPUT, "w")),
    (TaskKind.FORWARD_KEEP, UnitRole.LAYER): (
        _WEIGHTS, _ENTERS, (Role.OUTPUT, "w"), (Role.INNER, "w"), (Role.FEED_FORWARD, "w"),
    ),
    (TaskKind.LOSS, UnitRole.HEAD): (
        _WEIGHTS, _ENTERS, (Role.BOUNDARY_GRADIENT, "w"), _SUMS, (Role.TIED_WEIGHTS, "r"), (Role.TIED_GRADIENT, "sum"),
        (Role.NORM, "sum"),
    ),
    (TaskKind.BACKWARD, UnitRole.LAYER): (_WEIGHTS, _ENTERS, *_KEPT, _FLOWS, _SUMS, (Role.NORM, "sum")),
    (TaskKind.BACKWARD_RECOMPUTE, UnitRole.LAYER): (_WEIGHTS, _ENTERS, _FLOWS, _SUMS, (Role.NORM, "sum")),
    # The embedding's backward scatters: it reads no weights.
    (TaskKind.BACKWARD, UnitRole.EMBEDDING): ((Role.BOUNDARY_GRADIENT, "r"), _SUMS, (Role.NORM, "sum")),
}  # fmt: skip

PASSES: dict[TaskKind, tuple[tuple[Role, Mode], ...]] = {
    TaskKind.UPDATE: ((Role.GRADIENT, "r"), (Role.REMAINDER, "rw"), (Role.MOMENTS, "rw"), (Role.MASTER, "rw")),
    TaskKind.CAST_WEIGHTS: ((Role.MASTER, "r"), (Role.WEIGHTS, "w")),
    TaskKind.REFRESH_WEIGHTS: ((Role.MASTER, "r"), (Role.WEIGHTS, "w")),
    TaskKind.CLIP_GRADIENT: ((Role.GRADIENT, "rw"),),
}


class Use(NamedTuple):
    """An access before its slot is known. `owner`: the unit whose tensor it is; `part`: micro-batch or chunk of it."""

    role: Role
    tier: Tier
    owner: int
    part: int
    mode: Mode


def uses(action: Action, model: ModelSpec, policy: Policy) -> list[Use]:
    """What an action uses, by the tables above and what its unit's placement leaves out of them."""
    operation, unit, micro, chunk = action
    if operation.kind is TaskKind.COPY:
        return _copied(operation, unit, micro if micro is not None else chunk or 0)
    if operation.kind in PASSES:
        return _passed(operation, unit, chunk or 0, policy)
    assert micro is not None, "compute tasks serve one micro-batch each"
    found = []
    for role, mode in COMPUTE[operation.kind, model.role(unit)]:
        if not _has(role, unit, micro, model, policy):
            continue
        part = micro if TENSOR_OF[role] in (TensorClass.BOUNDARY, TensorClass.INNER, TensorClass.FEED_FORWARD) else 0
        resolved: Mode = ("rw" if _adds(role, unit, micro, model) else "w") if mode == "sum" else mode
        found.append(Use(role, Tier.GPU, _owner(role, unit), part, resolved))
    return found


def _copied(operation: Operation, unit: int, part: int) -> list[Use]:
    roles = [COPIED_AS[tensor] for tensor in operation.tensors]
    reads = [Use(role, operation.source, unit, part, "r") for role in roles]
    return reads + [Use(role, operation.target, unit, part, "w") for role in roles]


def _passed(operation: Operation, unit: int, chunk: int, policy: Policy) -> list[Use]:
    """A pass over a unit's memory. Of a split master the halves are weights and remainder, a staged one has its own tensor."""
    system, passing = policy.system, policy.passing(unit)
    found = []
    for role, mode in PASSES[operation.kind]:
        if role is Role.REMAINDER and not policy.split_master:
            continue
        used = Role.WEIGHTS if role is Role.MASTER and system.staging == "none" else role
        found.append(Use(used, operation.target, unit, chunk if TENSOR_OF[used] in passing else 0, mode))
    return found


def _has(role: Role, unit: int, micro: int, model: ModelSpec, policy: Policy) -> bool:
    match role:
        case Role.FEED_FORWARD:  # of its own where it waits elsewhere; a part of what is kept where it does not
            return policy.units[unit].feed_forward is not Tier.GPU
        case Role.TIED_WEIGHTS | Role.TIED_GRADIENT:
            return model.tied_embeddings
        case Role.NORM:
            return policy.gradient_norms and micro == policy.micro_batches - 1
    return True


def _adds(role: Role, unit: int, micro: int, model: ModelSpec) -> bool:
    if role is Role.NORM:
        return unit != model.head_unit  # the head's gradient is complete first
    return micro > 0 or (role is Role.GRADIENT and unit == 0 and model.tied_embeddings)


def _owner(role: Role, unit: int) -> int:
    match role:
        case Role.INPUT:
            return unit - 1
        case Role.TIED_WEIGHTS | Role.TIED_GRADIENT:
            return 0
    return unit
