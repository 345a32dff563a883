"""Moments of 8 bits, in torch's operations: their format. Lossy, by choice.

A moment is rounded to a small float: the top 11 bits of its magnitude's fp32 pattern, three of them mantissa ("short
pattern" below). Blocks of elements share a scale in fp32 (Dettmers et al., "8-bit Optimizers via Block-wise Quantization",
2022), here the power of two that is no smaller than any of them. A code counts short patterns down from the scale's, so
that coding and decoding are sums of integers. The first moment has a sign and 16 octaves, the second none and 32. What
lies below is zero, but a second moment that is not zero stays the smallest there is, so that no step explodes. Rounding
is stochastic: what changes by a thousandth a step would otherwise never change.
"""

from __future__ import annotations

import torch

from slideplan.policy import MOMENT_BLOCK

DROPPED_BITS = 20  # of an fp32 pattern: what is left is exponent and three bits of mantissa
OCTAVE = 8  # short patterns in an octave
CODES = (127, 255)  # the largest code of each moment: that of the scale
# The smallest scale of each moment, as a short pattern: code 1 is then no subnormal number, which processors treat apart.
LEAST_SCALE = tuple(-(-(largest - 1 + OCTAVE) // OCTAVE) * OCTAVE for largest in CODES)
INFINITE = 255 * OCTAVE
MAGNITUDE = (1 << 31) - 1  # bits of an fp32 pattern that are not its sign


def shortened(values: torch.Tensor, random: torch.Tensor | int) -> torch.Tensor:
    """Short patterns of fp32 values' magnitudes, rounded up or down by bits below 2^DROPPED_BITS. int64, any shape."""
    return ((values.view(torch.int32).to(torch.int64) & MAGNITUDE) + random) >> DROPPED_BITS


def scale_of(patterns: torch.Tensor, moment: int) -> torch.Tensor:
    """Short patterns of the scales of blocks: [blocks, MOMENT_BLOCK] gives [blocks, 1]."""
    largest = patterns.amax(1, keepdim=True)
    return ((largest + OCTAVE - 1) & -OCTAVE).clamp(LEAST_SCALE[moment], INFINITE)


def encode(patterns: torch.Tensor, scales: torch.Tensor, moment: int) -> torch.Tensor:
    """Codes of magnitudes, without signs: of short patterns [blocks, MOMENT_BLOCK], and of scales [blocks, 1] as such."""
    codes = (patterns - (scales - CODES[moment])).clamp(moment, CODES[moment])
    return torch.where(patterns > 0, codes, 0)


def decode(codes: torch.Tensor, scales: torch.Tensor, moment: int) -> torch.Tensor:
    """fp32 magnitudes of codes without signs [blocks, MOMENT_BLOCK], with scales [blocks, 1] as short patterns."""
    patterns = torch.where(codes > 0, codes + (scales - CODES[moment]), 0)
    return (patterns << DROPPED_BITS).to(torch.int32).view(torch.float32)


def short_scales(scales: torch.Tensor, moment: int) -> torch.Tensor:
    """Short patterns [blocks, 1] of scales as they are kept, fp32 [blocks]; 0, of moments never written, is the least."""
    return (scales.view(torch.int32).to(torch.int64) >> DROPPED_BITS).clamp(LEAST_SCALE[moment]).view(-1, 1)


def kept_scales(scales: torch.Tensor) -> torch.Tensor:
    """The inverse of `short_scales`."""
    return (scales.view(-1) << DROPPED_BITS).to(torch.int32).view(torch.float32)


def expand(codes: torch.Tensor, scales: torch.Tensor, moment: int) -> torch.Tensor:
    """fp32 values of a moment (0: the first, 1: the second) kept in 8 bits: codes uint8 [n], scales fp32 [blocks]."""
    found, short = blocks_of(codes.to(torch.int64)), short_scales(scales, moment)
    if moment:
        return decode(found, short, moment).view(-1)[: codes.numel()]
    signs = torch.where(found > 127, -1.0, 1.0)
    return (decode(found & 127, short, moment) * signs).view(-1)[: codes.numel()]


def compress(
    values: torch.Tensor, moment: int, random: torch.Tensor | int = 1 << (DROPPED_BITS - 1)
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [n] and scales fp32 [blocks] of a moment's fp32 values [n], rounded by bits [n], or else to the nearest."""
    patterns = blocks_of(shortened(values, random))
    scales = scale_of(patterns, moment)
    codes = encode(patterns, scales, moment).view(-1)[: values.numel()]
    if moment == 0:
        codes = codes | torch.where(values.signbit(), 128, 0)
    return codes.to(torch.uint8), kept_scales(scales)


def blocks_of(flat: torch.Tensor) -> torch.Tensor:
    """[n] as [blocks, MOMENT_BLOCK], the last one filled up with zeros."""
    padding = -flat.numel() % MOMENT_BLOCK
    return torch.nn.functional.pad(flat, (0, padding)).view(-1, MOMENT_BLOCK)
