"""Units as Hugging Face modules, bound once to the weight slots that they compute with.

A slot has one address for the whole run, so each weight slot gets a module of its own whose parameters
are views of it: which layer computes depends only on what was last copied into the slot.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slideplan.plan.hf_config import config_of
from slideplan.plan.model import ModelSpec, Parameter, UnitRole
from slideplan.plan.slots import PRODUCT_BYTES
from slideplan.runtime.buffers import padding_views, parameter_views


@dataclass(frozen=True)
class Skeleton:
    """The model's module classes without weights: one decoder layer, the final norm, the rotary embedding."""

    layer: nn.Module
    norm: nn.Module
    rotary: nn.Module


def skeleton(model: ModelSpec) -> Skeleton:
    """Build the modules of a model on the meta device, and its rotary embedding on the CPU.

    Raises ValueError where the Hugging Face modules have other parameters than the specification.
    """
    arguments = {**config_of(model), "num_hidden_layers": 1, "attn_implementation": "sdpa", "dtype": torch.bfloat16}
    # Per-layer lists would contradict the single layer that is built.
    arguments.pop("layer_types", None)
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    layer, norm = whole.model.layers[0], whole.model.norm
    rotary = type(whole.model.rotary_emb)(config)
    expected = {parameter.name: parameter.shape for parameter in model.parameters(UnitRole.LAYER)}
    found = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    if expected != found:
        raise ValueError(f"model {model.name}: transformers builds a layer with {found}, the specification says {expected}")
    return Skeleton(layer=layer.train(), norm=norm.train(), rotary=rotary)


class GradientSink:
    """Takes the gradients that autograd produces for a module's parameters into a flat gradient slot.

    Each gradient is added or copied and freed as soon as it is complete, so that a layer's gradients
    never exist twice.
    """

    def __init__(self, layout: tuple[Parameter, ...]) -> None:
        self._layout = layout
        self._views: dict[str, torch.Tensor] = {}
        self._accumulate = False

    def aim(self, flat: torch.Tensor, accumulate: bool) -> dict[str, torch.Tensor]:
        """Direct what comes next into this slot; returns its views per parameter."""
        self._views = parameter_views(flat, self._layout)
        self._accumulate = accumulate
        if not accumulate:
            for gap in padding_views(flat, self._layout):
                gap.zero_()
        return self._views

    def take(self, name: str, parameter: torch.Tensor) -> None:
        """Hook after a parameter's gradient is complete."""
        assert parameter.grad is not None
        if self._accumulate:
            self._views[name].add_(parameter.grad)
        else:
            self._views[name].copy_(parameter.grad)
        parameter.grad = None


def bind(module: nn.Module, prefix: str, views: dict[str, torch.Tensor], sink: GradientSink) -> nn.Module:
    """A copy of a meta module whose parameters are the views named prefix + their own name."""
    module = copy.deepcopy(module)
    for name, _ in list(module.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        parameter = nn.Parameter(views[prefix + name])
        parameter.register_post_accumulate_grad_hook(partial(sink.take, prefix + name))
        setattr(module.get_submodule(owner), leaf, parameter)
    return module


@dataclass
class Kept:
    """What FORWARD_KEEP leaves for BACKWARD: the ends of the unit's autograd graph."""

    layer: BoundLayer
    entered: torch.Tensor
    left: torch.Tensor


class BoundLayer:
    """A decoder layer whose weights are one weight slot."""

    def __init__(self, prototype: nn.Module, flat: torch.Tensor, layout: tuple[Parameter, ...], positions: Any) -> None:
        self.sink = GradientSink(layout)
        self.module = bind(prototype, "", parameter_views(flat, layout), self.sink)
        self._flat = flat
        self._backward_flat = flat
        self._positions = positions

    def forward(self, entered: torch.Tensor) -> torch.Tensor:
        """Output of [batch, sequence, hidden] input; differentiable where gradients are enabled."""
        left = self.module(entered, attention_mask=None, position_embeddings=self._positions)
        return left if isinstance(left, torch.Tensor) else left[0]

    def forward_keep(self, entered: torch.Tensor) -> Kept:
        """Forward with the graph kept, though the weights may have left the slot when backward comes.

        Saved weights are remembered by their place in the unit, and found again in the slot that holds
        the unit in backward; all other saved tensors are kept as they are.
        """
        start = self._flat.data_ptr()
        end = start + self._flat.nbytes

        def pack(tensor: torch.Tensor) -> Any:
            address = tensor.data_ptr()
            if not start <= address < end:
                return tensor
            return (address - start) // tensor.element_size(), tuple(tensor.shape), tensor.stride()

        def unpack(packed: Any) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            offset, shape, stride = packed
            return self._backward_flat.as_strided(shape, stride, self._backward_flat.storage_offset() + offset)

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            entered = entered.detach().requires_grad_()
            left = self.forward(entered)
        return Kept(self, entered, left)

    def backward(self, kept: Kept, flat: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Backward of a kept forward with the unit's weights in `flat`; returns the input's gradient."""
        self._backward_flat = flat
        torch.autograd.backward(kept.left, gradient)
        assert kept.entered.grad is not None
        return kept.entered.grad


class BoundHead:
    """Final norm, output projection and cross-entropy, a chunk of tokens at a time."""

    def __init__(self, prototype: nn.Module, flat: torch.Tensor, layout: tuple[Parameter, ...]) -> None:
        self.sink = GradientSink(layout)
        self.views = parameter_views(flat, layout)
        self.norm = bind(prototype, "model.norm.", self.views, self.sink)

    def loss(
        self,
        entered: torch.Tensor,
        labels: torch.Tensor,
        projection: torch.Tensor,
        projection_gradient: torch.Tensor,
        accumulate: bool,
        scale: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and the gradient of the input; weight gradients go to the sink and `projection_gradient`.

        entered: [tokens, hidden] bf16; labels: [tokens]; projection and its gradient: [vocabulary, hidden].
        The loss is the sum over tokens of the cross-entropy times `scale`. Logits are bf16 products with
        fp32 softmax, as in Hugging Face models, and exist for `chunk_tokens` tokens at a time. With one
        chunk every value is that of the unchunked computation; with several, the projection's gradient
        is their sum in fp32, rounded once where the slot is bf16.
        """
        with torch.enable_grad():
            leaf = entered.detach().requires_grad_()
            normed = self.norm(leaf)
        hidden = normed.detach()
        hidden_gradient = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=entered.device)
        several = hidden.shape[0] > chunk_tokens
        rounds = several and projection_gradient.dtype is not torch.float32
        sums = torch.zeros_like(projection_gradient, dtype=torch.float32) if rounds else projection_gradient
        for first in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(first, first + chunk_tokens)
            chunk_loss, logits_gradient = _cross_entropy(nn.functional.linear(hidden[rows], projection), labels[rows], scale)
            total += chunk_loss
            torch.mm(logits_gradient, projection, out=hidden_gradient[rows])
            _add_product(sums, logits_gradient, hidden[rows], accumulate or first > 0)
        if rounds:
            if accumulate:
                projection_gradient.add_(sums.to(projection_gradient.dtype))
            else:
                projection_gradient.copy_(sums)
        torch.autograd.backward(normed, hidden_gradient)
        assert leaf.grad is not None
        return total, leaf.grad


def _add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor, accumulate: bool) -> None:
    """Sums (+)= left^T right, a block of rows at a time, so that the product never exists whole."""
    block = max(1, PRODUCT_BYTES // (right.element_size() * right.shape[1]))
    for first in range(0, sums.shape[0], block):
        rows = slice(first, first + block)
        product = torch.mm(left[:, rows].t(), right)
        if accumulate:
            sums[rows].add_(product)
        else:
            sums[rows].copy_(product)


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scaled sum of the cross-entropy, and its gradient in the dtype of the logits."""
    with torch.enable_grad():
        upcast = logits.float().requires_grad_()
        loss = nn.functional.cross_entropy(upcast, labels, reduction="sum") * scale
    (gradient,) = torch.autograd.grad(loss, upcast)
    return loss.detach(), gradient.to(logits.dtype)


def rotary_positions(parts: Skeleton, seq_len: int, hidden: int, device: torch.device) -> Any:
    """Rotary cos and sin of positions 0..seq_len - 1, as the decoder layers take them."""
    like = torch.empty(1, 1, hidden, dtype=torch.bfloat16, device=device)
    return parts.rotary.to(device)(like, torch.arange(seq_len, device=device)[None])
