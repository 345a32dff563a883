"""Rotary position embedding in place (Triton).

Su et al., "RoFormer", 2021, in the layout of Hugging Face models: the two halves of a head are the pairs
that are turned. The backward is the turn the other way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rope_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, seq_len, heads, half, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr,  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, HALF)
    angle = (token % seq_len) * 2 * half + lane
    c = tl.load(cos + angle, mask=lane < half, other=0).to(tl.float32)[None, :]
    s = tl.load(sin + angle, mask=lane < half, other=0).to(tl.float32)[None, :] * sign
    head = tl.arange(0, HEADS)
    inside = (head < heads)[:, None] & (lane < half)[None, :]
    first = x + (token * heads + head)[:, None] * 2 * half + lane[None, :]
    a = tl.load(first, mask=inside, other=0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0).to(tl.float32)
    tl.store(first, a * c - b * s, mask=inside)
    tl.store(first + half, b * c + a * s, mask=inside)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> None:
    """As `operators.rotate`."""
    tokens, heads, width = x.shape
    _rope_kernel[(tokens,)](
        x, cos, sin, cos.shape[0], heads, width // 2, -1.0 if backward else 1.0,
        HEADS=triton.next_power_of_2(heads), HALF=triton.next_power_of_2(width // 2),
    )  # fmt: skip
