"""Loss and its gradients a chunk of tokens at a time, so that logits of all tokens never exist."""

from __future__ import annotations

from collections.abc import Callable

import torch

from runtime.compute.gradients import GradientSink, GradientSlot, Projection, add_product
from runtime.compute.operators import cross_entropy_in_place, rms_norm, rms_norm_backward
from runtime.memory.buffers import parameter_views
from slideplan.model import ModelSpec, Parameter, UnitRole

# (logits [tokens, vocabulary], labels, scale) -> scaled sum of the cross-entropy, gradient of the logits.
CrossEntropy = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
AddProduct = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None]
# (gradient of the norm's output, where that of its input goes); the weight's goes to the head's slot.
NormBackward = Callable[[torch.Tensor, torch.Tensor], None]


def chunked_loss(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    projection: Projection,
    scale: float,
    chunk_tokens: int,
    cross_entropy: CrossEntropy,
    add_product: AddProduct,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and the gradient of `hidden`; the projection's gradient goes to its slot.

    hidden: [tokens, hidden] bf16; labels: [tokens]. The loss is the sum over tokens of the cross-entropy
    times `scale`. Logits are bf16 products with fp32 softmax, as in Hugging Face models, and exist for
    `chunk_tokens` tokens at a time. With one chunk every value is that of the unchunked computation; with
    several, the projection's gradient is their sum in fp32, rounded once where the slot is bf16.
    """
    hidden_gradient = torch.empty_like(hidden)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    several = hidden.shape[0] > chunk_tokens
    rounds = several and projection.gradient.dtype is not torch.float32
    sums = torch.empty_like(projection.gradient, dtype=torch.float32) if rounds else projection.gradient
    for first in range(0, hidden.shape[0], chunk_tokens):
        rows = slice(first, first + chunk_tokens)
        logits = torch.nn.functional.linear(hidden[rows], projection.weight)
        chunk_loss, logits_gradient = cross_entropy(logits, labels[rows], scale)
        del logits
        total += chunk_loss
        torch.mm(logits_gradient, projection.weight, out=hidden_gradient[rows])
        add_product(sums, logits_gradient, hidden[rows], first > 0 or (projection.accumulate and not rounds))
        del logits_gradient  # before the next chunk's logits are made: memory for one chunk is reserved
    if rounds:
        if projection.accumulate:
            projection.gradient.add_(sums)
        else:
            projection.gradient.copy_(sums)
    return total, hidden_gradient


class Head:
    """Final norm, output projection and loss on the head's weight slot; kinds of kernels fill in what differs."""

    def __init__(
        self,
        layout: tuple[Parameter, ...],
        flat: torch.Tensor,
        chunk_tokens: int,
        cross_entropy: CrossEntropy,
        add_product: AddProduct,
    ) -> None:
        self._views = parameter_views(flat, layout)
        self._sink = GradientSink(layout)
        self._chunk_tokens = chunk_tokens
        self._cross_entropy = cross_entropy
        self._add_product = add_product

    def loss(
        self,
        entered: torch.Tensor,
        labels: torch.Tensor,
        tied: Projection | None,
        into: GradientSlot,
        gradient: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Loss; weight gradients go `into` the head's slot, that of the input [tokens, hidden] to `gradient`.

        `tied`: the projection where the embedding owns it.
        """
        sink = self._sink
        sink.aim(into)
        own = tied or Projection(self._views["lm_head.weight"], sink.view("lm_head.weight"), into.accumulate)
        normal, backward = self._normalise(entered)
        total, of_normal = chunked_loss(normal, labels, own, scale, self._chunk_tokens, self._cross_entropy, self._add_product)
        backward(of_normal, gradient)
        return total

    def _normalise(self, entered: torch.Tensor) -> tuple[torch.Tensor, NormBackward]:
        """The final norm, and its backward."""
        raise NotImplementedError


class FusedHead(Head):
    """The head by kernels."""

    def __init__(self, model: ModelSpec, flat: torch.Tensor, chunk_tokens: int) -> None:
        super().__init__(model.parameters(UnitRole.HEAD), flat, chunk_tokens, _in_place, add_product)
        self._eps = model.rms_norm_eps

    def _normalise(self, entered: torch.Tensor) -> tuple[torch.Tensor, NormBackward]:
        weight = self._views["model.norm.weight"]
        normal, factor = rms_norm(entered, weight, self._eps)

        def backward(of_normal: torch.Tensor, gradient: torch.Tensor) -> None:
            self._sink.add("model.norm.weight", rms_norm_backward(entered, weight, factor, of_normal, gradient))

        return normal, backward


def _in_place(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return cross_entropy_in_place(logits, labels, scale).sum(), logits
