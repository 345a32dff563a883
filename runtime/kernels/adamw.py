"""AdamW on split master weights on the GPU (Triton), bit for bit the host's update."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from runtime.optimizer.adamw import AdamW

BLOCK = 1024


@triton.jit
def step_elements(high, low, g, m, v, decay, w1, beta2, w2, root2, eps, step_size):  # type: ignore[no-untyped-def]
    """One step of elements in registers, as `AdamW.scalars` writes it: halves of the weight and both moments, new."""
    p = ((high << 16) + low).to(tl.float32, bitcast=True) * decay
    m = m + w1 * (g - m)
    v = v * beta2 + w2 * g * g
    denominator = tl.div_rn(tl.sqrt_rn(v), root2) + eps
    p = p - tl.div_rn(step_size * m, denominator)
    bits = p.to(tl.int32, bitcast=True)
    # In a NaN the carry would run into the sign and leave a zero weight: see `split_master.split`.
    rounded = (bits + tl.where(p == p, 0x8000, 0)) >> 16  # noqa: PLR0124 - false for NaN alone
    return rounded.to(tl.int16), (bits - (rounded << 16)).to(tl.int16), m, v


@triton.jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    weights, remainder, moments, gradient, n,
    decay, w1, beta2, w2, root2, eps, step_size,
    BLOCK: tl.constexpr,  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    high = tl.load(weights + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(remainder + i, mask=inside, other=0).to(tl.int32)
    g = tl.load(gradient + i, mask=inside, other=0).to(tl.float32)
    m = tl.load(moments + i, mask=inside, other=0)
    v = tl.load(moments + n + i, mask=inside, other=0)
    new_high, new_low, m, v = step_elements(high, low, g, m, v, decay, w1, beta2, w2, root2, eps, step_size)
    tl.store(weights + i, new_high, mask=inside)
    tl.store(remainder + i, new_low, mask=inside)
    tl.store(moments + i, m, mask=inside)
    tl.store(moments + n + i, v, mask=inside)


def update_gpu(
    weights: torch.Tensor,
    remainder: torch.Tensor,
    moments: torch.Tensor,
    gradient: torch.Tensor,
    settings: AdamW,
    step: int,
) -> None:
    """One AdamW step in place, on the current stream. Shapes and dtypes as in `optimizer.HostUpdate`."""
    n = weights.numel()
    # Fused multiply-adds round once where the host rounds twice: off, so that where a unit is updated
    # never shows in its weights.
    _adamw_kernel[(triton.cdiv(n, BLOCK),)](
        weights.view(torch.int16), remainder, moments, gradient, n, *settings.scalars(step),
        BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
