"""Moments of 8 bits, in torch's operations: their format. Lossy, by choice.

Blocks of elements share a scale in fp32 (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022): the
power of two that is no smaller than the largest magnitude, so that a product with it, or its inverse, is exact. Relative
to it a moment is a small float: the top bits of its fp32 pattern, three of them mantissa, counted down from 1. The first
moment has a sign and 16 octaves, the second none and 32. What lies below is zero, but a second moment that is not zero
stays the smallest there is, so that no step explodes. Rounding is stochastic: what changes by a thousandth a step would
otherwise never change.
"""

from __future__ import annotations

import torch

from slideplan.policy import MOMENT_BLOCK

DROPPED_BITS = 20  # of an fp32 pattern: what is left is exponent and three bits of mantissa
ONE = 127 << 3  # the pattern of 1.0, so shortened
CODES = (127, 255)  # the largest code of each moment: that of 1.0
# Bits of fp32 patterns: below the exponent; of an exponent alone; of the exponents of a number and its inverse, together.
MANTISSA, EXPONENT, INVERSE = (1 << 23) - 1, 255 << 23, 254 << 23


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """The scale of blocks with these largest magnitudes: the next power of two. fp32, any shape."""
    return ((largest.view(torch.int32) + MANTISSA) & EXPONENT).view(torch.float32)


def encode(values: torch.Tensor, scales: torch.Tensor, random: torch.Tensor, largest: int) -> torch.Tensor:
    """Codes of magnitudes relative to their blocks' scales. `random`: below 2^DROPPED_BITS. All [blocks, MOMENT_BLOCK]."""
    relative = values * (INVERSE - scales.view(torch.int32)).view(torch.float32)
    kept = (relative.view(torch.int32).to(torch.int64) + random) >> DROPPED_BITS
    return (kept - (ONE - largest)).clamp(0, largest)


def decode(codes: torch.Tensor, scales: torch.Tensor, largest: int) -> torch.Tensor:
    """Magnitudes of codes. [blocks, MOMENT_BLOCK]"""
    bits = ((codes + (ONE - largest)) << DROPPED_BITS).to(torch.int32)
    return torch.where(codes > 0, bits.view(torch.float32), 0.0) * scales


def expand(codes: torch.Tensor, scales: torch.Tensor, moment: int) -> torch.Tensor:
    """fp32 values of a moment (0: the first, 1: the second) kept in 8 bits: codes uint8 [n], scales fp32 [blocks]."""
    found, scales = blocks_of(codes.to(torch.int64)), scales.view(-1, 1)
    if moment:
        return decode(found, scales, CODES[1]).view(-1)[: codes.numel()]
    signs = torch.where(found > 127, -1.0, 1.0)
    return (decode(found & 127, scales, CODES[0]) * signs).view(-1)[: codes.numel()]


def compress(values: torch.Tensor, moment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n] and scales fp32 [blocks] of a moment's fp32 values, rounded to the nearest code."""
    found = blocks_of(values)
    scales = scale_of(found.abs().amax(1, keepdim=True))
    half = torch.full_like(found, 1 << (DROPPED_BITS - 1), dtype=torch.int64)
    codes = encode(found.abs(), scales, half, CODES[moment])
    codes = torch.where(found > 0, codes.clamp(1), 0) if moment else codes | torch.where(found < 0, 128, 0)
    return codes.view(-1)[: values.numel()].to(torch.uint8), scales.view(-1)


def blocks_of(flat: torch.Tensor) -> torch.Tensor:
    """[n] as [blocks, MOMENT_BLOCK], the last one filled up with zeros."""
    padding = -flat.numel() % MOMENT_BLOCK
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, MOMENT_BLOCK)
