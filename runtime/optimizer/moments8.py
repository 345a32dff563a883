"""AdamW with moments of 8 bits, in torch's operations: what the Triton kernel computes, bit for bit. Lossy, by choice.

Blocks of elements share the largest magnitude of each moment in fp32 (Dettmers et al., "8-bit Optimizers via
Block-wise Quantization", 2022). Relative to it a moment is a small float: the top bits of its fp32 pattern, three of
them mantissa, counted down from 1. The first moment has a sign and 16 octaves, the second none and 32. What lies
below is zero, but a second moment that is not zero stays the smallest there is, so that no step explodes. Rounding
is stochastic: what changes by a thousandth a step would otherwise never change.
"""

from __future__ import annotations

import torch

from runtime.optimizer.adamw import AdamW
from runtime.optimizer.split_master import join, split
from slideplan.policy import MOMENT_BLOCK

DROPPED_BITS = 20  # of an fp32 pattern: what is left is exponent and three bits of mantissa
ONE = 127 << 3  # the pattern of 1.0, so shortened
CODES = (127, 255)  # the largest code of each moment: that of 1.0
MASK32 = 0xFFFFFFFF


def noise(elements: int, step: int, device: torch.device) -> torch.Tensor:
    """32 bits per element that look random: a hash of its number and the step. int64 [elements]."""
    h = torch.arange(elements, dtype=torch.int64, device=device) ^ (step * 0x9E3779B9 & MASK32)
    h = (h ^ (h >> 16)) * 0x7FEB352D & MASK32
    h = (h ^ (h >> 15)) * 0x846CA68B & MASK32
    return h ^ (h >> 16)


def encode(values: torch.Tensor, scales: torch.Tensor, random: torch.Tensor, largest: int) -> torch.Tensor:
    """Codes of magnitudes relative to their blocks' scales. `random`: below 2^DROPPED_BITS. All [blocks, MOMENT_BLOCK]."""
    relative = torch.where(scales > 0, values / scales, 0.0)
    kept = (relative.view(torch.int32).to(torch.int64) + random) >> DROPPED_BITS
    return (kept - (ONE - largest)).clamp(0, largest)


def decode(codes: torch.Tensor, scales: torch.Tensor, largest: int) -> torch.Tensor:
    """Magnitudes of codes. [blocks, MOMENT_BLOCK]"""
    bits = ((codes + (ONE - largest)) << DROPPED_BITS).to(torch.int32)
    return torch.where(codes > 0, bits.view(torch.float32), 0.0) * scales


def update_8bit(
    weights: torch.Tensor,
    remainder: torch.Tensor,
    moments: torch.Tensor,
    gradient: torch.Tensor,
    settings: AdamW,
    step: int,
) -> None:
    """One AdamW step in place.

    weights: bf16 [n]; remainder: int16 [n]; gradient: bf16 or fp32 [n]; moments: uint8, codes of both [2, n], then
    fp32 scales of both [2, blocks].
    """
    n = weights.numel()
    codes, scales = moments[: 2 * n].view(2, n), moments[2 * n :].view(torch.float32).view(2, -1, 1)
    decay, w1, beta2, w2, root2, eps, step_size = (
        torch.tensor(value, dtype=torch.float32, device=weights.device) for value in settings.scalars(step)
    )
    g = _blocks(gradient.float())
    signed, unsigned = (_blocks(each.to(torch.int64)) for each in codes)
    m = decode(signed & 127, scales[0], CODES[0]) * torch.where(signed > 127, -1.0, 1.0)
    v = decode(unsigned, scales[1], CODES[1])
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    # Through fp64, since torch's own root in fp32 is off by one bit now and then; and by a tensor, since what it
    # divides by a scalar it may multiply by the inverse.
    denominator = v.double().sqrt().float() / root2.expand_as(v).contiguous() + eps
    p = _blocks(join(weights, remainder)) * decay - step_size * m / denominator
    split(p.view(-1)[:n], weights, remainder)
    scales[0], scales[1] = m.abs().amax(1, keepdim=True), v.amax(1, keepdim=True)
    random = _blocks(noise(n, step, weights.device))
    signed = encode(m.abs(), scales[0], random & (1 << DROPPED_BITS) - 1, CODES[0]) | torch.where(m < 0, 128, 0)
    unsigned = torch.where(v > 0, encode(v, scales[1], random >> (32 - DROPPED_BITS), CODES[1]).clamp(1), 0)
    codes[0], codes[1] = signed.view(-1)[:n], unsigned.view(-1)[:n]


def expand(codes: torch.Tensor, scales: torch.Tensor, moment: int) -> torch.Tensor:
    """fp32 values of a moment (0: the first, 1: the second) kept in 8 bits: codes uint8 [n], scales fp32 [blocks]."""
    found, scales = _blocks(codes.to(torch.int64)), scales.view(-1, 1)
    if moment:
        return decode(found, scales, CODES[1]).view(-1)[: codes.numel()]
    signs = torch.where(found > 127, -1.0, 1.0)
    return (decode(found & 127, scales, CODES[0]) * signs).view(-1)[: codes.numel()]


def compress(values: torch.Tensor, moment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n] and scales fp32 [blocks] of a moment's fp32 values, rounded to the nearest code."""
    found = _blocks(values)
    scales = found.abs().amax(1, keepdim=True)
    half = torch.full_like(found, 1 << (DROPPED_BITS - 1), dtype=torch.int64)
    codes = encode(found.abs(), scales, half, CODES[moment])
    codes = torch.where(found > 0, codes.clamp(1), 0) if moment else codes | torch.where(found < 0, 128, 0)
    return codes.view(-1)[: values.numel()].to(torch.uint8), scales.view(-1)


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """[n] as [blocks, MOMENT_BLOCK], the last one filled up with zeros."""
    padding = -flat.numel() % MOMENT_BLOCK
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, MOMENT_BLOCK)
