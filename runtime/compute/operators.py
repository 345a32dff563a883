"""What the fused layer and head compute beside matrix products and attention: kernels on a GPU, torch elsewhere.

Values are rounded where Hugging Face modules round them, but for the rotation, whose products they round one by one;
everything between is fp32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Triton is imported where there is a GPU only: it does not exist for every system.


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight * x / sqrt(mean(x^2) + eps), [rows, width], and the rows' factors 1 / sqrt(...), [rows] in fp32.

    A known `scale` is used, not computed.
    """
    if x.is_cuda:
        from runtime.kernels import rms_norm as kernel

        return kernel.rms_norm(x, weight, eps, scale)
    value = x.float()
    factor = torch.rsqrt(value.square().mean(1) + eps) if scale is None else scale
    return weight * (value * factor[:, None]).to(x.dtype), factor


def rms_norm_backward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    gradient: torch.Tensor,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of x, plus `residual`, into `out`; returns the weight's gradient [width] in fp32.

    x, gradient, out, residual: [rows, width], contiguous; out may be gradient or residual.
    """
    if x.is_cuda:
        from runtime.kernels import rms_norm as kernel

        return kernel.rms_norm_backward(x, weight, scale, gradient, out, residual)
    normal = x.float() * scale[:, None]
    g = gradient.float()
    of_weight = (g * normal).sum(0)
    g = g * weight.float()
    of_x = scale[:, None] * (g - normal * (g * normal).mean(1, keepdim=True))
    out.copy_(of_x if residual is None else of_x + residual.float())
    return of_weight


def square_sum(values: torch.Tensor, out: torch.Tensor) -> None:
    """Sum of squares of bf16 or fp32 `values` [n] into `out`, one fp32 element, added up in fp32."""
    if values.is_cuda:
        from runtime.kernels import square_sum as kernel

        kernel.square_sum(values, out)
    else:
        out.copy_(torch.linalg.vector_norm(values, dtype=torch.float32).square())


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backward: bool = False) -> None:
    """Rotary embedding of x, [batch * seq_len, heads, head_dim], in place; its backward is the turn the other way.

    cos, sin: [seq_len, head_dim], both halves alike. The two halves of a head are the pairs that are turned.
    """
    if x.is_cuda:
        from runtime.kernels import rope as kernel

        kernel.rotate(x, cos, sin, backward)
        return
    half = x.shape[2] // 2
    turns = x.shape[0] // cos.shape[0]
    c = cos[:, None, :half].float().repeat(turns, 1, 1)
    s = sin[:, None, :half].float().repeat(turns, 1, 1) * (-1 if backward else 1)
    a, b = x[..., :half].float(), x[..., half:].float()
    x[..., :half] = a * c - b * s
    x[..., half:] = b * c + a * s


def swiglu(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """silu(gate) * up into out, which may be either. All contiguous, of one shape and dtype."""
    if gate.is_cuda:
        from runtime.kernels import swiglu as kernel

        kernel.swiglu(gate, up, out)
        return
    torch.mul(functional.silu(gate), up, out=out)


def swiglu_backward(gate: torch.Tensor, up: torch.Tensor, gradient: torch.Tensor) -> None:
    """All in place: gate and up become their gradients, the gradient of the product becomes the product."""
    if gate.is_cuda:
        from runtime.kernels import swiglu as kernel

        kernel.swiglu_backward(gate, up, gradient)
        return
    g, u, d = gate.float(), up.float(), gradient.float()
    sigmoid = torch.sigmoid(g)
    silu = (g * sigmoid).to(gate.dtype).float()
    gate.copy_(d * u * sigmoid * (1 + g * (1 - sigmoid)))
    up.copy_(d * silu)
    gradient.copy_(silu * u)


def cross_entropy_in_place(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
    """Cross-entropy of each row times `scale`, [rows] in fp32; `logits` [rows, classes] become its gradient."""
    if logits.is_cuda:
        from runtime.kernels import cross_entropy as kernel

        return kernel.cross_entropy_in_place(logits, labels, scale)
    value = logits.float()
    normaliser = torch.logsumexp(value, 1)
    losses = (normaliser - value.gather(1, labels[:, None])[:, 0]) * scale
    gradient = torch.exp(value - normaliser[:, None])
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    logits.copy_(gradient * scale)
    return losses
