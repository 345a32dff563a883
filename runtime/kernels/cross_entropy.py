"""Cross-entropy with its gradient in the logits' own memory (Triton).

One pass finds a row's maximum and sum of exponentials together (Milakov and Gimelshein, "Online normalizer
calculation for softmax", 2018), a second replaces logits by gradients; nothing of their size is allocated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 8192


@triton.jit
def _cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits, labels, losses, width, scale, BLOCK: tl.constexpr  # noqa: N803 - Triton writes constants so
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    label = tl.load(labels + row)
    # The label's logit, before the second pass overwrites it.
    chosen = tl.load(logits + label).to(tl.float32)
    largest = -float("inf")
    total = 0.0
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, tl.max(value, 0))
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(value - higher), 0)
        largest = higher
    normaliser = largest + tl.log(total)
    tl.store(losses + row, (normaliser - chosen) * scale)
    tl.debug_barrier()
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < width, other=-float("inf")).to(tl.float32)
        gradient = (tl.exp(value - normaliser) - tl.where(column == label, 1.0, 0.0)) * scale
        tl.store(logits + column, gradient, mask=column < width)


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """As `operators.cross_entropy_in_place`."""
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(rows,)](logits, labels, losses, width, scale, BLOCK=BLOCK, num_warps=16)
    return losses
