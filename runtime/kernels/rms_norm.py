"""RMSNorm and its backward (Triton): y = weight * x / sqrt(mean(x^2) + eps).

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. As in Hugging Face models the normalised
row is rounded to the activation's dtype before it meets the weight; everything else is fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 4096  # of one program at a time: rows that are short share one
BACKWARD_PROGRAMS = 512  # each keeps a partial sum of the weight's gradient


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, scale, rows, width, eps, known: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0).to(tl.float32)
    if known:
        factor = tl.load(scale + row, mask=row < rows, other=0)
    else:
        factor = tl.rsqrt(tl.sum(value * value, 1) / width + eps)
        tl.store(scale + row, factor, mask=row < rows)
    normal = (value * factor[:, None]).to(y.dtype.element_ty).to(tl.float32)
    gain = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    tl.store(y + place, normal * gain[None, :], mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, gradient, residual, result, partial, rows, width, added: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < width, other=0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        factor = tl.load(scale + row, mask=row < rows, other=0)[:, None]
        normal = tl.load(x + place, mask=inside, other=0).to(tl.float32) * factor
        g = tl.load(gradient + place, mask=inside, other=0).to(tl.float32)
        total += tl.sum(g * normal, 0)
        g = g * gain[None, :]
        g = factor * (g - normal * (tl.sum(g * normal, 1) / width)[:, None])
        if added:
            g += tl.load(residual + place, mask=inside, other=0).to(tl.float32)
        tl.store(result + place, g, mask=inside)
    tl.store(partial + tl.program_id(0) * width + column, total, mask=column < width)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a tile, and its warps."""
    block = triton.next_power_of_2(width)
    rows = max(1, TILE_ELEMENTS // block)
    return rows, block, min(16, max(4, rows * block // 512))


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `operators.rms_norm`."""
    rows, width = x.shape
    y = torch.empty_like(x)
    factor = torch.empty(rows, dtype=torch.float32, device=x.device) if scale is None else scale
    tile_rows, block, warps = _tile(width)
    _forward_kernel[(triton.cdiv(rows, tile_rows),)](
        x, weight, y, factor, rows, width, eps, scale is not None, ROWS=tile_rows, BLOCK=block, num_warps=warps
    )
    return y, factor


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    gradient: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `operators.rms_norm_backward`."""
    rows, width = x.shape
    tile_rows, block, warps = _tile(width)
    programs = min(BACKWARD_PROGRAMS, triton.cdiv(rows, tile_rows))
    partial = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    _backward_kernel[(programs,)](
        x, weight, scale, gradient, x if residual is None else residual, out, partial, rows, width, residual is not None,
        ROWS=tile_rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return partial.sum(0)
