"""AdamW on lossy state on the GPU (Triton), bit for bit `runtime.optimizer.lossy`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.optimizer.adamw import AdamW
from runtime.optimizer.lossy import lean_parts, lossy_scalars
from runtime.optimizer.moments8 import CODES, DROPPED_BITS, INFINITE, LEAST_SCALE, OCTAVE
from runtime.optimizer.rounding import FIRST_FACTORS, SECOND_FACTOR, Draws
from slideplan.policy import MOMENT_BLOCK

BLOCK = 1024  # elements of a program, of moments in bf16
ROWS = 4  # blocks of a program, of moments of 8 bits


@triton.jit
def _noise(element, salt, A: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    h = element.to(tl.uint32) ^ salt.to(tl.uint32)
    h = (h ^ (h >> 16)) * A
    h = (h ^ (h >> 15)) * B
    return h ^ (h >> 16)


@triton.jit
def _step(p, g, m, v, decay, w1, beta2, w2, inverse_root2, eps, step_size):  # type: ignore[no-untyped-def]
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    denominator = tl.sqrt_rn(v) * inverse_root2 + eps
    return p * decay - tl.div_rn(step_size * m, denominator), m, v


@triton.jit
def _bf16(value, random):  # type: ignore[no-untyped-def]
    """bf16 bits of a float, up or down by 16 random bits."""
    # In a NaN the carry would run into the sign and leave a zero: see `split_master.split`.
    up = tl.where(value == value, random, 0)  # noqa: PLR0124 - false for NaN alone
    return ((value.to(tl.uint32, bitcast=True) + up) >> 16).to(tl.int16)


@triton.jit(do_not_specialize=["first", "salt"])  # type: ignore[untyped-decorator, unused-ignore]
def _bf16_kernel(  # type: ignore[no-untyped-def]
    weights, remainder, moments, gradient, n, first, salt,
    decay, w1, beta2, w2, inverse_root2, eps, step_size,
    A: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    high = tl.load(weights + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(remainder + i, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + i, mask=inside, other=0).to(tl.float32)
    m = tl.load(moments + i, mask=inside, other=0).to(tl.float32)
    v = tl.load(moments + n + i, mask=inside, other=0).to(tl.float32)
    p = ((high << 16) + low).to(tl.float32, bitcast=True)
    p, m, v = _step(p, g, m, v, decay, w1, beta2, w2, inverse_root2, eps, step_size)
    bits = p.to(tl.int32, bitcast=True)
    rounded = (bits + tl.where(p == p, 0x8000, 0)) >> 16  # noqa: PLR0124 - false for NaN alone
    tl.store(weights + i, rounded.to(tl.int16), mask=inside)
    tl.store(remainder + i, (bits - (rounded << 16)).to(tl.int16), mask=inside)
    h = _noise(i + first, salt, A, B)
    tl.store(moments + i, _bf16(m, h & 0xFFFF).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(moments + n + i, _bf16(v, h >> 16).to(tl.bfloat16, bitcast=True), mask=inside)


@triton.jit
def _short(value, random, DROPPED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The short pattern of a magnitude: see `runtime.optimizer.moments8`."""
    return (((value.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) + random) >> DROPPED).to(tl.int32)


@triton.jit
def _scale(patterns, least, OCTAVE: tl.constexpr, INFINITE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Short patterns of the scales of rows."""
    return tl.minimum(tl.maximum((tl.max(patterns, 1) + (OCTAVE - 1)) & -OCTAVE, least), INFINITE)


@triton.jit(do_not_specialize=["first", "salt"])  # type: ignore[untyped-decorator, unused-ignore]
def _lean_kernel(  # type: ignore[no-untyped-def]
    weights, signed, unsigned, scales, gradient, n, blocks, first, salt,
    decay, w1, beta2, w2, inverse_root2, eps, step_size,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,  # noqa: N803 - Triton writes constants so
    M: tl.constexpr, V: tl.constexpr, LEAST_M: tl.constexpr, LEAST_V: tl.constexpr,  # noqa: N803
    DROPPED: tl.constexpr, OCTAVE: tl.constexpr, INFINITE: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, known = i < n, row < blocks
    high = tl.load(weights + i, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + i, mask=inside, other=0).to(tl.float32)
    code_m = tl.load(signed + i, mask=inside, other=0).to(tl.int32)
    code_v = tl.load(unsigned + i, mask=inside, other=0).to(tl.int32)
    scale_m = tl.maximum(tl.load(scales + row, mask=known, other=0) >> DROPPED, LEAST_M)
    scale_v = tl.maximum(tl.load(scales + blocks + row, mask=known, other=0) >> DROPPED, LEAST_V)
    size = code_m & 127
    size = tl.where(size > 0, size + (scale_m - M)[:, None], 0)
    m = ((size << DROPPED) | ((code_m & 128) << 24)).to(tl.float32, bitcast=True)
    size = tl.where(code_v > 0, code_v + (scale_v - V)[:, None], 0)
    v = (size << DROPPED).to(tl.float32, bitcast=True)
    p = (high << 16).to(tl.float32, bitcast=True)
    p, m, v = _step(p, g, m, v, decay, w1, beta2, w2, inverse_root2, eps, step_size)
    h = _noise(i + first, salt, A, B)
    tl.store(weights + i, _bf16(p, (h * C) >> 16), mask=inside)

    size_m = _short(m, h & ((1 << DROPPED) - 1), DROPPED)
    size_v = _short(v, h >> (32 - DROPPED), DROPPED)
    scale_m, scale_v = _scale(size_m, LEAST_M, OCTAVE, INFINITE), _scale(size_v, LEAST_V, OCTAVE, INFINITE)
    tl.store(scales + row, scale_m << DROPPED, mask=known)
    tl.store(scales + blocks + row, scale_v << DROPPED, mask=known)
    size = tl.minimum(tl.maximum(size_m - (scale_m - M)[:, None], 0), M)
    sign = (m.to(tl.uint32, bitcast=True) >> 24).to(tl.int32) & 128
    tl.store(signed + i, (size | sign).to(tl.uint8), mask=inside)
    size = tl.minimum(tl.maximum(size_v - (scale_v - V)[:, None], 1), V)
    tl.store(unsigned + i, tl.where(size_v > 0, size, 0).to(tl.uint8), mask=inside)


def update_gpu_lossy(
    weights: torch.Tensor,
    remainder: torch.Tensor | None,
    moments: torch.Tensor,
    gradient: torch.Tensor,
    settings: AdamW,
    step: int,
    draws: Draws,
) -> None:
    """One AdamW step in place, on the current stream. Shapes and dtypes as in `lossy.update_lossy`."""
    n, scalars = weights.numel(), lossy_scalars(settings, step)
    a, b = FIRST_FACTORS
    # No fused multiply-adds, which round once where the host rounds twice: where a unit is updated must not show.
    if remainder is not None:
        _bf16_kernel[(triton.cdiv(n, BLOCK),)](
            weights.view(torch.int16), remainder, moments, gradient, n, draws.first, draws.signed_salt, *scalars,
            A=a, B=b, BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
        return
    blocks = triton.cdiv(n, MOMENT_BLOCK)
    codes, scales = lean_parts(moments, n)
    _lean_kernel[(triton.cdiv(blocks, ROWS),)](
        weights.view(torch.int16), codes[0], codes[1], scales.view(torch.int32), gradient, n, blocks,
        draws.first, draws.signed_salt, *scalars, A=a, B=b, C=SECOND_FACTOR,
        M=CODES[0], V=CODES[1], LEAST_M=LEAST_SCALE[0], LEAST_V=LEAST_SCALE[1],
        DROPPED=DROPPED_BITS, OCTAVE=OCTAVE, INFINITE=INFINITE, ROWS=ROWS, BLOCK=MOMENT_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
