"""The task graph: one training step as data, with edges into the step before. It holds no durations."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from functools import cached_property
from typing import Literal

from msgspec import UNSET, UnsetType

from slideplan.codec import Spec
from slideplan.policy import Tier


class Lane(StrEnum):
    """A FIFO of tasks on one resource: a GPU stream or a host thread."""

    COMPUTE = "compute"
    H2D = "h2d"
    D2H = "d2h"
    HOST_UPDATE = "host_update"
    GPU_UPDATE = "gpu_update"
    SSD_READ = "ssd_read"
    SSD_WRITE = "ssd_write"
    COPY = "copy"  # both directions in one FIFO
    HOST_CAST = "host_cast"


class TaskKind(StrEnum):
    """What a task does; each kind has a lane of its own, but for copies that share one FIFO."""

    LOAD_WEIGHTS = "load_weights"
    FORWARD = "forward"  # keeps nothing but the boundary
    FORWARD_KEEP = "forward_keep"  # keeps inner activations too
    LOSS = "loss"  # head: forward, loss and backward in one
    BACKWARD = "backward"  # from kept inner activations (embedding: scatter)
    BACKWARD_RECOMPUTE = "backward_recompute"  # forward again, then backward
    OFFLOAD_BOUNDARY = "offload_boundary"
    FETCH_BOUNDARY = "fetch_boundary"
    OFFLOAD_INNER = "offload_inner"  # the feed-forward's two wide products
    FETCH_INNER = "fetch_inner"
    OFFLOAD_GRADIENT = "offload_gradient"
    LOAD_STATE = "load_state"  # a chunk of a unit's that lies on the host and is updated on the GPU
    OFFLOAD_STATE = "offload_state"
    UPDATE_HOST = "update_host"
    UPDATE_GPU = "update_gpu"
    UPDATE_PASSING = "update_passing"  # on the GPU, a chunk whose state passes through
    CAST_WEIGHTS = "cast_weights"  # from the fp32 master into the staging buffer of a load
    CLIP_GRADIENT = "clip_gradient"  # read for the global norm, read and written for the scaling
    REFRESH_WEIGHTS = "refresh_weights"  # from the updated master into the bf16 copy that loads read


LANE_OF = {
    TaskKind.LOAD_WEIGHTS: Lane.H2D,
    TaskKind.FORWARD: Lane.COMPUTE,
    TaskKind.FORWARD_KEEP: Lane.COMPUTE,
    TaskKind.LOSS: Lane.COMPUTE,
    TaskKind.BACKWARD: Lane.COMPUTE,
    TaskKind.BACKWARD_RECOMPUTE: Lane.COMPUTE,
    TaskKind.OFFLOAD_BOUNDARY: Lane.D2H,
    TaskKind.FETCH_BOUNDARY: Lane.H2D,
    TaskKind.OFFLOAD_INNER: Lane.D2H,
    TaskKind.FETCH_INNER: Lane.H2D,
    TaskKind.OFFLOAD_GRADIENT: Lane.D2H,
    TaskKind.LOAD_STATE: Lane.H2D,
    TaskKind.OFFLOAD_STATE: Lane.D2H,
    TaskKind.UPDATE_HOST: Lane.HOST_UPDATE,
    TaskKind.UPDATE_GPU: Lane.GPU_UPDATE,
    TaskKind.UPDATE_PASSING: Lane.GPU_UPDATE,
    TaskKind.CAST_WEIGHTS: Lane.HOST_CAST,
    TaskKind.CLIP_GRADIENT: Lane.HOST_UPDATE,
    TaskKind.REFRESH_WEIGHTS: Lane.HOST_UPDATE,
}


# Compute tasks that write gradients of weights.
GRADIENT_KINDS = (TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE, TaskKind.LOSS)


class TensorClass(StrEnum):
    """What a buffer holds."""

    WEIGHTS = "weights"
    REMAINDER = "master_remainder"
    MASTER = "master_weights"
    MOMENTS = "moments"
    MOMENTS_8BIT = "moments_8bit"
    GRADIENT = "gradient"
    BOUNDARY = "boundary_activation"
    INNER = "inner_activation"
    FEED_FORWARD = "feed_forward_activation"  # the part of inner activations that can leave the GPU
    WORKSPACE = "workspace"


class Role(StrEnum):
    """What a task uses a slot for; its handler finds its buffers by these names."""

    WEIGHTS = "weights"
    TIED_WEIGHTS = "tied_weights"
    HOST_WEIGHTS = "host_weights"
    REMAINDER = "remainder"
    HOST_REMAINDER = "host_remainder"
    MASTER = "master"
    MOMENTS = "moments"
    HOST_MOMENTS = "host_moments"
    GRADIENT = "gradient"
    TIED_GRADIENT = "tied_gradient"
    HOST_GRADIENT = "host_gradient"
    INPUT = "input"  # boundary activation that enters the unit
    OUTPUT = "output"  # boundary activation that leaves it
    HOST_BOUNDARY = "host_boundary"
    BARRIER = "barrier"  # how many units are updated: the next step's first load waits for all
    BOUNDARY_GRADIENT = "boundary_gradient"  # gradient of the output, overwritten by that of the input
    INNER = "inner"
    FEED_FORWARD = "feed_forward"
    HOST_FEED_FORWARD = "host_feed_forward"


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


class Access(Spec, frozen=True):
    """One use of one slot. "w" overwrites all of it, "rw" builds on what it holds."""

    role: Role
    pool: str
    slot: int
    mode: Literal["r", "w", "rw"]


class Dependency(Spec, frozen=True):
    """The task waits for task `task` of the same step (distance 0) or of the step before (1)."""

    task: int
    distance: Literal[0, 1]


class Task(Spec, frozen=True):
    """One piece of work of one lane.

    unit:         unit number
    micro:        micro-batch number, or None where the task serves all of them
    bytes_moved:  bytes that cross a link, or that an update moves through memory
    flops:        floating-point operations of a compute task, recompute included
    accesses:     slots it reads and writes
    dependencies: at most one per other lane; order within its own lane is the lane's
    fifo:         lane that it shares with other kinds, where that is not its kind's own
    chunk:        number of the chunk of the unit, where the task serves one
    """

    name: str
    kind: TaskKind
    unit: int
    micro: int | None
    bytes_moved: int
    flops: int
    accesses: tuple[Access, ...]
    dependencies: tuple[Dependency, ...] = ()
    fifo: Lane | UnsetType = UNSET
    chunk: int | UnsetType = UNSET

    def completes_gradient(self, micro_batches: int) -> bool:
        """Whether its unit's gradient is summed over all of this many micro-batches when it ends."""
        return self.kind in GRADIENT_KINDS and self.micro == micro_batches - 1

    @property
    def lane(self) -> Lane:
        return LANE_OF[self.kind] if self.fifo is UNSET else self.fifo

    def slot(self, role: Role) -> tuple[str, int]:
        """Pool name and slot number of the access in this role. Raises KeyError without one."""
        for access in self.accesses:
            if access.role is role:
                return access.pool, access.slot
        raise KeyError(f"task {self.name} has no {role} access")

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
    def lanes(self) -> dict[Lane, tuple[int, ...]]:
        """Task numbers of each lane that has any, in FIFO order."""
        queues: dict[Lane, list[int]] = {}
        for number, task in enumerate(self.tasks):
            queues.setdefault(task.lane, []).append(number)
        return {lane: tuple(queues[lane]) for lane in Lane if lane in queues}

    @cached_property
    def lane_position(self) -> tuple[int, ...]:
        """Place of each task in its lane's FIFO."""
        position = [0] * len(self.tasks)
        for queue in self.lanes.values():
            for place, number in enumerate(queue):
                position[number] = place
        return tuple(position)

    @cached_property
    def pool(self) -> dict[str, SlotPool]:
        return {pool.name: pool for pool in self.pools}


def tier_bytes(pools: Iterable[SlotPool], tier: Tier) -> int:
    """Bytes that all pools of a tier reserve."""
    return sum(pool.total_bytes for pool in pools if pool.tier is tier)
