"""Gated SiLU, silu(gate) * up, and its backward with the product again (Triton).

Shazeer, "GLU Variants Improve Transformer", 2020. As in Hugging Face models silu(gate) is rounded to the
activation's dtype before the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _forward_kernel(gate, up, out, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803 - Triton's way
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
    u = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
    silu = (g * tl.sigmoid(g)).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + i, silu * u, mask=i < n)


@triton.jit
def _backward_kernel(gate, up, gradient, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < n, other=0).to(tl.float32)
    u = tl.load(up + i, mask=i < n, other=0).to(tl.float32)
    d = tl.load(gradient + i, mask=i < n, other=0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    silu = (g * sigmoid).to(gate.dtype.element_ty).to(tl.float32)
    tl.store(gate + i, d * u * sigmoid * (1 + g * (1 - sigmoid)), mask=i < n)
    tl.store(up + i, d * silu, mask=i < n)
    tl.store(gradient + i, silu * u, mask=i < n)


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """As `operators.swiglu`."""
    _forward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK)


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> None:
    """As `operators.swiglu_backward`."""
    _backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, gradient, gate.numel(), BLOCK=BLOCK)
