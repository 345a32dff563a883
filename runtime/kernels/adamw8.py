"""AdamW on split master weights with moments of 8 bits (Triton), bit for bit `runtime.moments8`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.kernels.adamw import step_elements
from runtime.optimizer.adamw import AdamW
from runtime.optimizer.moments8 import CODES, DROPPED_BITS, ONE
from slideplan.policy import MOMENT_BLOCK

BLOCKS = 4  # of moments, per program


@triton.jit(do_not_specialize=["seed"])  # type: ignore[untyped-decorator, unused-ignore]
def _adamw8_kernel(  # type: ignore[no-untyped-def]
    weights, remainder, signed, unsigned, scales, gradient, n, blocks,
    decay, w1, beta2, w2, root2, eps, step_size, seed,
    M: tl.constexpr, V: tl.constexpr, ONE: tl.constexpr, DROPPED: tl.constexpr,  # noqa: N803 - Triton writes constants so
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = row.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = i < n
    high = tl.load(weights + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(remainder + i, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + i, mask=inside, other=0).to(tl.float32)
    code_m = tl.load(signed + i, mask=inside, other=0).to(tl.int32)
    code_v = tl.load(unsigned + i, mask=inside, other=0).to(tl.int32)
    scale_m = tl.load(scales + row, mask=row < blocks, other=0)[:, None]
    scale_v = tl.load(scales + blocks + row, mask=row < blocks, other=0)[:, None]
    size = code_m & 127
    m = ((size + (ONE - M)) << DROPPED).to(tl.float32, bitcast=True)
    m = tl.where(size > 0, m, 0.0) * scale_m
    m = tl.where(code_m > 127, -m, m)
    v = ((code_v + (ONE - V)) << DROPPED).to(tl.float32, bitcast=True)
    v = tl.where(code_v > 0, v, 0.0) * scale_v
    new_high, new_low, m, v = step_elements(high, low, g, m, v, decay, w1, beta2, w2, root2, eps, step_size)
    tl.store(weights + i, new_high, mask=inside)
    tl.store(remainder + i, new_low, mask=inside)

    scale_m, scale_v = tl.max(tl.abs(m), 1)[:, None], tl.max(v, 1)[:, None]
    tl.store(scales + row[:, None], scale_m, mask=(row < blocks)[:, None])
    tl.store(scales + blocks + row[:, None], scale_v, mask=(row < blocks)[:, None])
    h = i.to(tl.uint32) ^ seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    h = h ^ (h >> 16)
    noise_m, noise_v = (h & ((1 << DROPPED) - 1)).to(tl.int32), (h >> (32 - DROPPED)).to(tl.int32)
    part = tl.where(scale_m > 0, tl.div_rn(tl.abs(m), tl.where(scale_m > 0, scale_m, 1.0)), 0.0)
    size = ((part.to(tl.int32, bitcast=True) + noise_m) >> DROPPED) - (ONE - M)
    size = tl.minimum(tl.maximum(size, 0), M)
    tl.store(signed + i, (size | tl.where(m < 0, 128, 0)).to(tl.uint8), mask=inside)
    part = tl.where(scale_v > 0, tl.div_rn(v, tl.where(scale_v > 0, scale_v, 1.0)), 0.0)
    size = ((part.to(tl.int32, bitcast=True) + noise_v) >> DROPPED) - (ONE - V)
    size = tl.where(v > 0, tl.minimum(tl.maximum(size, 1), V), 0)
    tl.store(unsigned + i, size.to(tl.uint8), mask=inside)


def update_gpu_8bit(
    weights: torch.Tensor,
    remainder: torch.Tensor,
    moments: torch.Tensor,
    gradient: torch.Tensor,
    settings: AdamW,
    step: int,
) -> None:
    """One AdamW step in place, on the current stream. Shapes and dtypes as in `moments8.update_8bit`."""
    n = weights.numel()
    blocks = triton.cdiv(n, MOMENT_BLOCK)
    seed = step * 0x9E3779B9 & 0xFFFFFFFF
    _adamw8_kernel[(triton.cdiv(blocks, BLOCKS),)](
        weights.view(torch.int16), remainder, moments[:n], moments[n : 2 * n], moments[2 * n :].view(torch.float32), gradient,
        n, blocks, *settings.scalars(step), seed - (1 << 32) if seed >> 31 else seed,
        M=CODES[0], V=CODES[1], ONE=ONE, DROPPED=DROPPED_BITS, ROWS=BLOCKS, BLOCK=MOMENT_BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
