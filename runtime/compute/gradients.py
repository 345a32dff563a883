"""Gradients of a unit's parameters on their way into its gradient slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.memory.buffers import padding_views, parameter_views
from slideplan.lowering.sizes import PRODUCT_BYTES
from slideplan.model import Parameter


@dataclass(frozen=True)
class GradientSlot:
    """A flat gradient slot; `accumulate`: it holds the sum over earlier micro-batches."""

    flat: torch.Tensor
    accumulate: bool


class GradientSink:
    """Writes gradients into the slot that it is aimed at, or adds them, parameter by parameter."""

    def __init__(self, layout: tuple[Parameter, ...]) -> None:
        self._layout = layout
        self._views: dict[str, torch.Tensor] = {}
        self._accumulate = False

    def aim(self, slot: GradientSlot) -> None:
        """Direct what comes next into this slot."""
        self._views = parameter_views(slot.flat, self._layout)
        self._accumulate = slot.accumulate
        if not slot.accumulate:
            for gap in padding_views(slot.flat, self._layout):
                gap.zero_()

    def view(self, name: str) -> torch.Tensor:
        """A parameter's part of the slot."""
        return self._views[name]

    def add(self, name: str, value: torch.Tensor) -> None:
        """A whole gradient."""
        if self._accumulate:
            self._views[name].add_(value)
        else:
            self._views[name].copy_(value)

    def add_product(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        """A gradient that is left^T right, by the product itself. left: [tokens, out], right: [tokens, in]."""
        add_product(self._views[name], left, right, self._accumulate)

    def take(self, name: str, parameter: torch.Tensor) -> None:
        """Hook after autograd has completed a parameter's gradient, which is freed: it never exists twice."""
        assert parameter.grad is not None
        self.add(name, parameter.grad)
        parameter.grad = None


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, accumulate: bool) -> None:
    """Total (+)= left^T right, rounded once. total: [out, in] in the factors' dtype or fp32."""
    beta = 1 if accumulate else 0
    if total.dtype is left.dtype:
        torch.addmm(total, left.t(), right, beta=beta, out=total)
    elif total.is_cuda and torch.version.hip is None:  # some builds for AMD refuse such a product
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, torch.float32, beta=beta, out=total)
    else:  # without such a product: a block of rows at a time, so that the upcast factor stays small
        block = max(1, PRODUCT_BYTES // (4 * max(1, left.shape[0])))
        for first in range(0, total.shape[0], block):
            rows = slice(first, first + block)
            torch.addmm(total[rows], left[:, rows].t().float(), right.float(), beta=beta, out=total[rows])


@dataclass(frozen=True)
class Projection:
    """The output projection, [vocabulary, hidden], with its part of a gradient slot."""

    weight: torch.Tensor
    gradient: torch.Tensor
    accumulate: bool
