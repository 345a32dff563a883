"""Bytes of every tensor class, said once: pools, tasks, candidates, bounds and reports read them here."""

from __future__ import annotations

from typing import Literal, Protocol

from slideplan.footprint import Footprint
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.policy import (
    GRADIENT_BYTES,
    MOMENT_BLOCK,
    MOMENTS_OF,
    GradientDtype,
    Kernels,
    Moments,
    StateFormat,
    state_classes,
)
from slideplan.quantities import MIB

MOMENT_BYTES = 8  # fp32 m and v per element
REMAINDER_BYTES = 2  # int16 low half of the fp32 master weight
WEIGHT_BYTES = 2  # bf16 high half
# All of a master weight, by format: the split one is weight and remainder.
MASTER_BYTES = {"split": WEIGHT_BYTES + REMAINDER_BYTES, "fp32": 4, "bf16": 2}
TRAINING_BYTES = MASTER_BYTES["split"] + MOMENT_BYTES  # per parameter in exact state, gradients aside
CLIP_PASSES = 3  # over the gradient: read for the norm, read and written for the scaling
BARRIER_BYTES = 8  # a counter of updated units
PAGE_BYTES = 4096  # slots on the SSD, and those of the host that are read from and written to it, are whole pages
NORM_BYTES = 4  # a unit's sum of squares in fp32
# AdamW reads and writes the master weights and both moments, and reads the gradient; this, for the split master.
UPDATE_STATE_TRAFFIC_BYTES = 2 * TRAINING_BYTES

# The head computes its loss in chunks of tokens whose logits (in fp32, fused: in bf16) stay within this, so that
# they are never whole, and eager gradients of the projection in blocks of rows whose bf16 product stays within that.
LOSS_CHUNK_BYTES: dict[Kernels, int] = {"eager": 256 * MIB, "fused": 512 * MIB, "graphed": 512 * MIB}
LOGIT_BYTES: dict[Kernels, int] = {"eager": 4, "fused": 2, "graphed": 2}
PRODUCT_BYTES = 128 * MIB


def moment_bytes(elements: int, moments: Moments) -> int:
    """Both moments of a unit: in fp32 or bf16; or in 8 bits each, with an fp32 scale of each for every block."""
    if moments == "8bit":
        return 2 * elements + 8 * -(-elements // MOMENT_BLOCK)
    return (MOMENT_BYTES if moments == "fp32" else MOMENT_BYTES // 2) * elements


def remainder_bytes(elements: int, state: StateFormat) -> int:
    """Low halves of the fp32 master weights, where there are any."""
    return REMAINDER_BYTES * elements if TensorClass.REMAINDER in state_classes(state) else 0


def state_bytes(elements: int, state: StateFormat) -> int:
    """Remainder and both moments of a unit, or of a part of it."""
    return remainder_bytes(elements, state) + moment_bytes(elements, MOMENTS_OF[state])


def update_bytes(elements: int, master: Literal["split", "fp32", "bf16"], state: StateFormat, gradient: GradientDtype) -> int:
    """What an update moves through memory: master weights and moments read and written, the gradient read."""
    weights = (
        WEIGHT_BYTES * elements + remainder_bytes(elements, state) if master == "split" else MASTER_BYTES[master] * elements
    )
    return 2 * (weights + moment_bytes(elements, MOMENTS_OF[state])) + GRADIENT_BYTES[gradient] * elements


def whole_pages(size_bytes: int) -> int:
    """Bytes of the pages that hold so many."""
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES


def loss_chunk_tokens(vocabulary: int, kernels: Kernels) -> int:
    """Tokens whose logits fit in LOSS_CHUNK_BYTES; at least one."""
    return max(1, LOSS_CHUNK_BYTES[kernels] // (LOGIT_BYTES[kernels] * vocabulary))


class Formats(Protocol):
    """The knobs of a policy that say how large its tensors are."""

    @property
    def micro_batch(self) -> int:
        """Sequences that pass a unit at once."""

    @property
    def gradient_dtype(self) -> GradientDtype:
        """Of the gradient slots."""

    @property
    def state(self) -> StateFormat:
        """How state is kept."""


class Sizes:
    """Bytes of one unit's tensors under a policy."""

    def __init__(self, model: ModelSpec, formats: Formats, seq_len: int, footprint: Footprint) -> None:
        self.model = model
        self.tokens = formats.micro_batch * seq_len
        self.footprint = footprint
        self.elements = {role: model.flat_elements(role) for role in UnitRole}
        self.gradient_bytes = GRADIENT_BYTES[formats.gradient_dtype]
        self.boundary_bytes = model.boundary_bytes(self.tokens)
        self.feed_forward_bytes = model.feed_forward_bytes(self.tokens)
        self.state = formats.state

    def of(self, tensor: TensorClass, elements: int) -> int:
        """Bytes of a class of so many elements of a unit; of an activation, those of one micro-batch."""
        match tensor:
            case TensorClass.WEIGHTS:
                return WEIGHT_BYTES * elements
            case TensorClass.REMAINDER:
                return remainder_bytes(elements, self.state)
            case TensorClass.MOMENTS:
                return moment_bytes(elements, MOMENTS_OF[self.state])
            case TensorClass.GRADIENT:
                return self.gradient_bytes * elements
            case TensorClass.BOUNDARY:
                return self.boundary_bytes
            case TensorClass.FEED_FORWARD:
                return self.feed_forward_bytes
        raise ValueError(f"{tensor} has no size of its own")

    def held_bytes(self, inner: Tier | None, feed_forward: Tier | None) -> int:
        """What one layer keeps of its inner activations on the GPU for one micro-batch, beside shared slots."""
        if inner is None:
            return 0
        whole = self.footprint.inner_bytes
        return whole if feed_forward is Tier.GPU else max(1, whole - self.feed_forward_bytes)
