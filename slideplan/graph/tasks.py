"""The task graph: one training step as data, with edges into the step before. It holds no durations."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import cached_property
from typing import Literal

from msgspec import UNSET, UnsetType

from slideplan.codec import Spec
from slideplan.graph.lanes import Lane, LaneKind, order_of
from slideplan.graph.operations import GRADIENT_KINDS, Operation, TaskKind
from slideplan.placement import TensorClass, Tier


class Role(StrEnum):
    """What a slot is to the task that uses it; with the slot's tier, its handler finds buffers by it."""

    WEIGHTS = "weights"
    TIED_WEIGHTS = "tied_weights"
    REMAINDER = "remainder"
    MASTER = "master"
    MOMENTS = "moments"
    GRADIENT = "gradient"
    TIED_GRADIENT = "tied_gradient"
    INPUT = "input"  # boundary activation that enters the unit
    OUTPUT = "output"  # boundary activation that leaves it
    BOUNDARY = "boundary"  # the same, where nothing is computed from it
    BOUNDARY_GRADIENT = "boundary_gradient"  # gradient of the output, overwritten by that of the input
    INNER = "inner"
    FEED_FORWARD = "feed_forward"
    NORM = "norm"  # sums of squares of the gradients of all units
    BARRIER = "barrier"  # how many units are updated: the next step's first load waits for all


TENSOR_OF = {
    Role.WEIGHTS: TensorClass.WEIGHTS,
    Role.TIED_WEIGHTS: TensorClass.WEIGHTS,
    Role.REMAINDER: TensorClass.REMAINDER,
    Role.MASTER: TensorClass.MASTER,
    Role.MOMENTS: TensorClass.MOMENTS,
    Role.GRADIENT: TensorClass.GRADIENT,
    Role.TIED_GRADIENT: TensorClass.GRADIENT,
    Role.INPUT: TensorClass.BOUNDARY,
    Role.OUTPUT: TensorClass.BOUNDARY,
    Role.BOUNDARY: TensorClass.BOUNDARY,
    Role.BOUNDARY_GRADIENT: TensorClass.BOUNDARY,
    Role.INNER: TensorClass.INNER,
    Role.FEED_FORWARD: TensorClass.FEED_FORWARD,
    Role.NORM: TensorClass.NORM,
    Role.BARRIER: TensorClass.WORKSPACE,
}
# In which role a copy uses a class.
COPIED_AS = {
    TENSOR_OF[role]: role
    for role in (Role.WEIGHTS, Role.REMAINDER, Role.MOMENTS, Role.GRADIENT, Role.BOUNDARY, Role.FEED_FORWARD)
}

Mode = Literal["r", "w", "rw"]
# Why a task waits for another one: it reads what that one writes, overwrites what that one reads, or overwrites what it wrote.
Hazard = Literal["reads", "overwrites_read", "overwrites_written"]


class SlotPool(Spec, frozen=True):
    """`count` equal buffers of one tensor class in one tier, reserved before the first step."""

    name: str
    tier: Tier
    tensor_class: TensorClass
    slot_bytes: int
    count: int

    @property
    def total_bytes(self) -> int:
        return self.slot_bytes * self.count


class Access(Spec, frozen=True, array_like=True):
    """One use of one slot. "w" overwrites all of it, "rw" builds on what it holds."""

    role: Role
    tier: Tier
    pool: str
    slot: int
    mode: Mode


class Dependency(Spec, frozen=True, array_like=True):
    """The task waits for task `task` of the same step (distance 0) or of the step before (1), because of a slot.

    `pool` is "" for an order that no slot asks for, as graphs made by hand may have it.
    """

    task: int
    distance: Literal[0, 1]
    pool: str = ""
    slot: int = 0
    hazard: Hazard = "reads"


class Task(Spec, frozen=True):
    """One piece of work of one lane.

    unit:         unit number
    micro:        micro-batch number, or None where the task serves all of them
    bytes_moved:  bytes that cross a link, or that an update moves through memory
    flops:        floating-point operations of a compute task, recompute included
    accesses:     slots it reads and writes
    dependencies: at most one per other lane; order within its own lane is the lane's
    fifo:         kind of lane that it shares with other operations, where that is not its operation's own
    chunk:        number of the chunk of the unit, where the task serves one
    device:       number of the GPU that does it, or that it is done for
    """

    name: str
    operation: Operation
    unit: int
    micro: int | None
    bytes_moved: int
    flops: int
    accesses: tuple[Access, ...]
    dependencies: tuple[Dependency, ...] = ()
    fifo: LaneKind | UnsetType = UNSET
    chunk: int | UnsetType = UNSET
    device: int = 0

    @property
    def kind(self) -> TaskKind:
        return self.operation.kind

    @property
    def lane(self) -> Lane:
        return Lane(self.operation.lane if self.fifo is UNSET else self.fifo, self.device)

    def completes_gradient(self, micro_batches: int) -> bool:
        """Whether its unit's gradient is summed over all of this many micro-batches when it ends."""
        return self.kind in GRADIENT_KINDS and self.micro == micro_batches - 1

    def slot(self, role: Role, tier: Tier = Tier.GPU) -> tuple[str, int]:
        """Pool name and slot number of the access in this role on this tier. Raises KeyError without one."""
        for access in self.accesses:
            if access.role is role and access.tier is tier:
                return access.pool, access.slot
        raise KeyError(f"task {self.name} has no {role} on tier {tier}")

    def has(self, role: Role) -> bool:
        return any(access.role is role for access in self.accesses)

    @property
    def accumulates(self) -> bool:
        """Whether it adds to weight gradients of earlier micro-batches; of the loss, to the projection's."""
        return self.builds_on(Role.TIED_GRADIENT if self.has(Role.TIED_GRADIENT) else Role.GRADIENT)

    def builds_on(self, role: Role) -> bool:
        """Whether the task builds on what its slot in this role holds, as later micro-batches do on gradients."""
        return any(access.role is role and access.mode == "rw" for access in self.accesses)


class TaskGraph(Spec, frozen=True, dict=True):
    """Tasks of one step in topological order; a lane runs its tasks in this order, step after step."""

    pools: tuple[SlotPool, ...]
    tasks: tuple[Task, ...]

    @cached_property
    def lane_of(self) -> tuple[Lane, ...]:
        """Lane of each task."""
        return tuple([task.lane for task in self.tasks])

    @cached_property
    def lanes(self) -> dict[Lane, tuple[int, ...]]:
        """Task numbers of each lane that has any, in FIFO order."""
        queues: dict[Lane, list[int]] = {}
        for number, lane in enumerate(self.lane_of):
            queues.setdefault(lane, []).append(number)
        return {lane: tuple(queues[lane]) for lane in sorted(queues, key=order_of)}

    @cached_property
    def lane_position(self) -> tuple[int, ...]:
        """Place of each task in its lane's FIFO."""
        position = [0] * len(self.tasks)
        for queue in self.lanes.values():
            for place, number in enumerate(queue):
                position[number] = place
        return tuple(position)

    def queue(self, kind: LaneKind, device: int = 0) -> tuple[int, ...]:
        """Task numbers of a lane in FIFO order; none where the graph has no such lane."""
        return self.lanes.get(Lane(kind, device), ())

    @cached_property
    def pool(self) -> dict[str, SlotPool]:
        return {pool.name: pool for pool in self.pools}

    def why(self, number: int) -> list[str]:
        """In words, what a task waits for and because of which slot, one line per dependency."""
        return [self.reason(dependency) for dependency in self.tasks[number].dependencies]

    def reason(self, dependency: Dependency) -> str:
        """``slot 3 of gpu.weights.window, still read by backward/layer010/mb1 of the step before``."""
        before = " of the step before" if dependency.distance else ""
        other = self.tasks[dependency.task].name
        return f"slot {dependency.slot} of {dependency.pool}, {_SAID[dependency.hazard]} {other}{before}"


_SAID: dict[Hazard, str] = {
    "reads": "written by",
    "overwrites_read": "still read by",
    "overwrites_written": "written before by",
}


def tier_bytes(pools: Iterable[SlotPool], tier: Tier) -> int:
    """Bytes that all pools of a tier reserve."""
    return sum(pool.total_bytes for pool in pools if pool.tier is tier)
