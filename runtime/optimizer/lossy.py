"""AdamW on lossy state, in torch's operations: what the host's compiled pass and the GPU's kernels compute, bit for bit.

Both formats round to the nearest two values at random. "bf16-moments" has an fp32 master in two halves and moments in
bf16; "lean" has weights in bf16 alone and moments of 8 bits.
"""

from __future__ import annotations

import torch

from runtime.optimizer.adamw import AdamW
from runtime.optimizer.moments8 import DROPPED_BITS, compress, expand
from runtime.optimizer.rounding import Draws, bf16_at_random, noise
from runtime.optimizer.split_master import join, split
from slideplan.policy import MOMENT_BLOCK

LOW_BITS = (1 << 16) - 1


def lossy_scalars(settings: AdamW, step: int) -> tuple[float, ...]:
    """`AdamW.scalars`, with the inverse of the second bias correction's root: products are faster than divisions."""
    decay, w1, beta2, w2, root2, eps, step_size = settings.scalars(step)
    return decay, w1, beta2, w2, 1 / root2, eps, step_size


def lean_parts(moments: torch.Tensor, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of both moments, uint8 [2, n], and fp32 scales of both, [2, blocks], of one slot's bytes."""
    blocks = -(-elements // MOMENT_BLOCK)
    codes, scales = moments[: 2 * elements], moments[2 * elements : 2 * elements + 8 * blocks]
    return codes.view(2, elements), scales.view(torch.float32).view(2, blocks)


def update_lossy(
    weights: torch.Tensor,
    remainder: torch.Tensor | None,
    moments: torch.Tensor,
    gradient: torch.Tensor,
    settings: AdamW,
    step: int,
    draws: Draws,
) -> None:
    """One AdamW step in place.

    weights: bf16 [n]; gradient: bf16 or fp32 [n]. With bf16 moments, remainder: int16 [n], moments: bf16 [2, n]. Of lean state,
    remainder: None, moments: uint8, codes of both [2, n], then fp32 scales of both [2, blocks].
    """
    n = weights.numel()
    scalars = [torch.tensor(value, dtype=torch.float32, device=weights.device) for value in lossy_scalars(settings, step)]
    random_moments, random_weights = noise(n, draws, weights.device)
    if remainder is not None:
        p, m, v = _stepped(join(weights, remainder), moments[0].float(), moments[1].float(), gradient.float(), scalars)
        split(p, weights, remainder)
        bf16_at_random(m, random_moments & LOW_BITS, moments[0])
        bf16_at_random(v, random_moments >> 16, moments[1])
        return
    codes, scales = lean_parts(moments, n)
    m, v = (expand(codes[moment], scales[moment], moment) for moment in (0, 1))
    p, m, v = _stepped(weights.float(), m, v, gradient.float(), scalars)
    bf16_at_random(p, random_weights, weights)
    for moment, (values, random) in enumerate(
        ((m, random_moments & (1 << DROPPED_BITS) - 1), (v, random_moments >> (32 - DROPPED_BITS)))
    ):
        codes[moment], scales[moment] = compress(values, moment, random)


def _stepped(
    p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, g: torch.Tensor, scalars: list[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New weights and moments, in fp32."""
    decay, w1, beta2, w2, inverse_root2, eps, step_size = scalars
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    # Through fp64, since torch's own root in fp32 is off by one bit now and then.
    denominator = v.double().sqrt().float() * inverse_root2 + eps
    return p * decay - step_size * m / denominator, m, v
