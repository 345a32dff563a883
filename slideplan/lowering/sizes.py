"""Bytes of every tensor class, said once: pools, tasks, candidates, bounds and reports read them here."""

from __future__ import annotations

from typing import Literal, Protocol

from slideplan.footprint import Footprint
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.policy import GRADIENT_BYTES, MOMENT_BLOCK, GradientDtype, Kernels, Moments
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
    """Both moments of a unit: in fp32; or in 8 bits each, with an fp32 scale of each for every block."""
    return MOMENT_BYTES * elements if moments == "fp32" else 2 * elements + 8 * -(-elements // MOMENT_BLOCK)


def moments_updated(update: Tier, gpu_moments: Moments) -> Moments:
    """Format of moments that this tier updates; the host's are exact."""
    return gpu_moments if update is Tier.GPU else "fp32"


def state_bytes(elements: int, moments: Moments) -> int:
    """Remainder and both moments of a unit, or of a part of it."""
    return REMAINDER_BYTES * elements + moment_bytes(elements, moments)


def update_bytes(elements: int, master: Literal["split", "fp32", "bf16"], moments: Moments, gradient: GradientDtype) -> int:
    """What an update moves through memory: master weights and moments read and written, the gradient read."""
    state = MASTER_BYTES[master] * elements + moment_bytes(elements, moments)
    return 2 * state + GRADIENT_BYTES[gradient] * elements


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
    def gpu_moments(self) -> Moments:
        """How moments are kept that the GPU updates."""


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
        self._gpu_moments = formats.gpu_moments

    def moments(self, update: Tier) -> Moments:
        """Format of moments that this tier updates."""
        return moments_updated(update, self._gpu_moments)

    def of(self, tensor: TensorClass, elements: int, update: Tier = Tier.HOST) -> int:
        """Bytes of a class of so many elements of a unit; of an activation, those of one micro-batch.

        update: the tier that updates the unit, which decides the format of its moments.
        """
        match tensor:
            case TensorClass.WEIGHTS:
                return WEIGHT_BYTES * elements
            case TensorClass.REMAINDER:
                return REMAINDER_BYTES * elements
            case TensorClass.MOMENTS:
                return moment_bytes(elements, self.moments(update))
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
