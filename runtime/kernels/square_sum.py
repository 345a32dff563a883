"""Sum of squares of a gradient slot on the GPU (Triton)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096
MOST_PROGRAMS = 1024  # each adds up the blocks of its stride, so that as many partial sums are left


@triton.jit
def _square_sum_kernel(  # type: ignore[no-untyped-def]
    values, partial, n,
    BLOCK: tl.constexpr, PROGRAMS: tl.constexpr,  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(n, PROGRAMS * BLOCK)):
        i = (program + turn * PROGRAMS) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(values + i, mask=i < n, other=0).to(tl.float32)
        total += value * value
    tl.store(partial + program, tl.sum(total, 0))


def square_sum(values: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of squares of bf16 or fp32 `values` [n] into `out`, one fp32 element, in fp32 and always in the same order."""
    n = values.numel()
    programs = min(MOST_PROGRAMS, triton.cdiv(n, BLOCK))
    partial = torch.empty(programs, dtype=torch.float32, device=values.device)
    _square_sum_kernel[(programs,)](values, partial, n, BLOCK=BLOCK, PROGRAMS=programs)
    torch.sum(partial, 0, out=out)
