"""Where bytes lie: tiers, tensor classes, and the placement of one unit. Nothing else says it."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

from slideplan.codec import Spec


class Tier(StrEnum):
    """Memory that holds slots."""

    GPU = "gpu"
    HOST = "host"
    SSD = "ssd"


class TensorClass(StrEnum):
    """What a slot holds."""

    WEIGHTS = "weights"  # bf16
    REMAINDER = "master_remainder"  # int16 low half of the fp32 master weight
    MASTER = "master_weights"  # of other systems: a master in a tensor of its own
    MOMENTS = "moments"
    MOMENTS_BF16 = "moments_bf16"  # the same, rounded
    MOMENTS_8BIT = "moments_8bit"  # the same, in block-wise 8-bit floats
    GRADIENT = "gradient"
    BOUNDARY = "boundary_activation"
    INNER = "inner_activation"
    FEED_FORWARD = "feed_forward_activation"  # the part of inner activations that can leave the GPU
    NORM = "gradient_norm"
    WORKSPACE = "workspace"


STATE = (TensorClass.REMAINDER, TensorClass.MOMENTS)


def hops(source: Tier, target: Tier) -> tuple[tuple[Tier, Tier], ...]:
    """The copies that bring a tensor from tier to tier. GPU and SSD have the host between them; none where it is there."""
    line = tuple(Tier)
    first, last = line.index(source), line.index(target)
    way = line[first : last + 1] if first <= last else line[last : first + 1][::-1]
    return tuple(pairwise(way))


class Placement(Spec, frozen=True):
    """Where one unit's tensors lie between their uses, by tensor class.

    A tensor that lies on another tier than the one that uses it passes through slots of that tier, and of the host where
    that is on the way: weights and activations are used on the GPU, remainder and moments where `update` says.

    weights:      GPU: in a slot of the unit's own. HOST: they stream through the window. SSD: so they do, and through host
                  slots before, where they are updated too. Embedding and head have slots of their own in any case, so for
                  them `weights` equals `update`
    remainder, moments: state of the unit
    boundary:     the unit's output, between forward and backward. The head has none; the last layer's output is
                  consumed at once and stays on the GPU
    inner:        inner activations, kept for backward; None: computed again in backward. Embedding and head have none
    feed_forward: the feed-forward's two wide products, most of the bytes of inner activations; None with `inner` None
    update:       whose processor updates the unit. Weights lie there too, since the update writes them, or come there
                  from the SSD
    """

    weights: Tier = Tier.HOST
    remainder: Tier = Tier.HOST
    moments: Tier = Tier.HOST
    boundary: Tier = Tier.GPU
    inner: Tier | None = None
    feed_forward: Tier | None = None
    update: Tier = Tier.HOST

    def tiers(self, tensor: TensorClass) -> tuple[Tier, ...]:
        """Tiers on which the unit has slots of its own for this class."""
        tier: Tier | None = getattr(self, _FIELDS[tensor])
        if tensor is TensorClass.WEIGHTS and self.weights is Tier.GPU and self.update is not Tier.GPU:
            return self.weights, self.update
        return () if tier is None else (tier,)

    @property
    def passing(self) -> tuple[TensorClass, ...]:
        """Classes of the unit's state that lie elsewhere than where they are updated, and pass through slots there."""
        return tuple(tensor for tensor in STATE if self.tiers(tensor) != (self.update,))

    @property
    def keeps(self) -> bool:
        """Whether inner activations are kept from forward to backward."""
        return self.inner is not None


# The field of a placement that says where a class lies. Gradients are made on the GPU and used where `update` says.
_FIELDS = {
    TensorClass.WEIGHTS: "weights",
    TensorClass.REMAINDER: "remainder",
    TensorClass.MOMENTS: "moments",
    TensorClass.BOUNDARY: "boundary",
    TensorClass.INNER: "inner",
    TensorClass.FEED_FORWARD: "feed_forward",
}
