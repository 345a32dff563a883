"""What tasks do. Compute and passes over memory work on one tier; copies are one family, from tier to tier."""

from __future__ import annotations

from enum import StrEnum

from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind
from slideplan.placement import STATE, TensorClass, Tier


class TaskKind(StrEnum):
    """The verb of an operation."""

    FORWARD = "forward"  # keeps nothing but the boundary
    FORWARD_KEEP = "forward_keep"  # keeps inner activations too
    LOSS = "loss"  # head: forward, loss and backward in one
    BACKWARD = "backward"  # from kept inner activations (embedding: scatter)
    BACKWARD_RECOMPUTE = "backward_recompute"  # forward again, then backward
    COPY = "copy"
    UPDATE = "update"
    CAST_WEIGHTS = "cast_weights"  # from the fp32 master into the staging buffer of a load
    CLIP_GRADIENT = "clip_gradient"  # read for the global norm, read and written for the scaling
    REFRESH_WEIGHTS = "refresh_weights"  # from the updated master into the bf16 copy that loads read


COMPUTE_KINDS = (
    TaskKind.FORWARD,
    TaskKind.FORWARD_KEEP,
    TaskKind.LOSS,
    TaskKind.BACKWARD,
    TaskKind.BACKWARD_RECOMPUTE,
)
# Compute tasks that write gradients of weights.
GRADIENT_KINDS = (TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE, TaskKind.LOSS)

_LANES: dict[tuple[TaskKind, Tier, Tier], LaneKind] = {
    **{(kind, Tier.GPU, Tier.GPU): LaneKind.COMPUTE for kind in COMPUTE_KINDS},
    (TaskKind.COPY, Tier.HOST, Tier.GPU): LaneKind.H2D,
    (TaskKind.COPY, Tier.GPU, Tier.HOST): LaneKind.D2H,
    (TaskKind.COPY, Tier.SSD, Tier.HOST): LaneKind.SSD_READ,
    (TaskKind.COPY, Tier.HOST, Tier.SSD): LaneKind.SSD_WRITE,
    (TaskKind.UPDATE, Tier.HOST, Tier.HOST): LaneKind.HOST_UPDATE,
    (TaskKind.UPDATE, Tier.GPU, Tier.GPU): LaneKind.GPU_UPDATE,
    (TaskKind.CLIP_GRADIENT, Tier.HOST, Tier.HOST): LaneKind.HOST_UPDATE,
    (TaskKind.REFRESH_WEIGHTS, Tier.HOST, Tier.HOST): LaneKind.HOST_UPDATE,
    (TaskKind.CAST_WEIGHTS, Tier.HOST, Tier.HOST): LaneKind.HOST_CAST,
}

_SHORT_NAMES: dict[tuple[TensorClass, ...], str] = {STATE: "state"}


class Operation(Spec, frozen=True, array_like=True):
    """What a task does, and where.

    source, target: a copy's tiers; anything else has one tier, whose memory and processor it works with
    tensors:        what a copy moves; nothing else names any
    """

    kind: TaskKind
    source: Tier
    target: Tier
    tensors: tuple[TensorClass, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind, self.source, self.target) not in _LANES:
            raise ValueError(f"operation {self.kind}: no lane does it from {self.source} to {self.target}")
        if (self.kind is TaskKind.COPY) != bool(self.tensors):
            raise ValueError(f"operation {self.kind}: copies name the tensors that they move, nothing else does")

    @property
    def lane(self) -> LaneKind:
        """The kind of lane that it runs on."""
        return _LANES[self.kind, self.source, self.target]

    def __str__(self) -> str:
        """``forward``, ``update host``, ``weights host>gpu``."""
        if self.kind is TaskKind.COPY:
            moved = _SHORT_NAMES.get(self.tensors) or "+".join(tensor.removesuffix("_activation") for tensor in self.tensors)
            return f"{moved} {self.source}>{self.target}"
        return f"{self.kind} {self.target}" if self.kind is TaskKind.UPDATE else str(self.kind)


def compute(kind: TaskKind) -> Operation:
    """A compute task on the GPU."""
    return Operation(kind, Tier.GPU, Tier.GPU)


def copy(source: Tier, target: Tier, *tensors: TensorClass) -> Operation:
    """A copy of these classes of a unit, one after the other, from tier to tier."""
    return Operation(TaskKind.COPY, source, target, tensors)


def update(tier: Tier) -> Operation:
    """AdamW by the processor of a tier."""
    return Operation(TaskKind.UPDATE, tier, tier)


def host_pass(kind: TaskKind) -> Operation:
    """A pass of the CPU over host memory, as other systems make them."""
    return Operation(kind, Tier.HOST, Tier.HOST)


FORWARD = compute(TaskKind.FORWARD)
FORWARD_KEEP = compute(TaskKind.FORWARD_KEEP)
LOSS = compute(TaskKind.LOSS)
BACKWARD = compute(TaskKind.BACKWARD)
BACKWARD_RECOMPUTE = compute(TaskKind.BACKWARD_RECOMPUTE)
UPDATE_HOST, UPDATE_GPU = update(Tier.HOST), update(Tier.GPU)
LOAD_WEIGHTS = copy(Tier.HOST, Tier.GPU, TensorClass.WEIGHTS)
READ_WEIGHTS = copy(Tier.SSD, Tier.HOST, TensorClass.WEIGHTS)
WRITE_WEIGHTS = copy(Tier.HOST, Tier.SSD, TensorClass.WEIGHTS)
OFFLOAD_GRADIENT = copy(Tier.GPU, Tier.HOST, TensorClass.GRADIENT)
OFFLOAD_BOUNDARY = copy(Tier.GPU, Tier.HOST, TensorClass.BOUNDARY)
FETCH_BOUNDARY = copy(Tier.HOST, Tier.GPU, TensorClass.BOUNDARY)
OFFLOAD_FEED_FORWARD = copy(Tier.GPU, Tier.HOST, TensorClass.FEED_FORWARD)
FETCH_FEED_FORWARD = copy(Tier.HOST, Tier.GPU, TensorClass.FEED_FORWARD)
WRITE_BOUNDARY = copy(Tier.HOST, Tier.SSD, TensorClass.BOUNDARY)
READ_BOUNDARY = copy(Tier.SSD, Tier.HOST, TensorClass.BOUNDARY)
WRITE_FEED_FORWARD = copy(Tier.HOST, Tier.SSD, TensorClass.FEED_FORWARD)
READ_FEED_FORWARD = copy(Tier.SSD, Tier.HOST, TensorClass.FEED_FORWARD)
LOAD_STATE = copy(Tier.HOST, Tier.GPU, *STATE)
OFFLOAD_STATE = copy(Tier.GPU, Tier.HOST, *STATE)
READ_STATE = copy(Tier.SSD, Tier.HOST, *STATE)
WRITE_STATE = copy(Tier.HOST, Tier.SSD, *STATE)
READ_MOMENTS = copy(Tier.SSD, Tier.HOST, TensorClass.MOMENTS)
WRITE_MOMENTS = copy(Tier.HOST, Tier.SSD, TensorClass.MOMENTS)
CAST_WEIGHTS = host_pass(TaskKind.CAST_WEIGHTS)
CLIP_GRADIENT = host_pass(TaskKind.CLIP_GRADIENT)
REFRESH_WEIGHTS = host_pass(TaskKind.REFRESH_WEIGHTS)
