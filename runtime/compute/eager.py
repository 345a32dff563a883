"""Units as Hugging Face modules run by autograd, bound once to the weight slots that they compute with.

A slot has one address for the whole run, so each weight slot gets a module of its own whose parameters
are views of it: which layer computes depends only on what was last copied into the slot. This is the
reference that `fused_layer` is held against, and what runs where a plan says kernels "eager".
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from runtime.compute.gradients import GradientSink, GradientSlot
from runtime.compute.head import Head, NormBackward
from runtime.memory.buffers import parameter_views
from slideplan.hf_config import config_of
from slideplan.lowering.sizes import PRODUCT_BYTES
from slideplan.model import ModelSpec, Parameter, UnitRole


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

    layer: EagerLayer
    entered: torch.Tensor
    left: torch.Tensor


class EagerLayer:
    """A decoder layer whose weights are one weight slot. Boundary activations are [batch, sequence, hidden]."""

    def __init__(self, prototype: nn.Module, flat: torch.Tensor, layout: tuple[Parameter, ...], positions: Any) -> None:
        self._sink = GradientSink(layout)
        self._module = bind(prototype, "", parameter_views(flat, layout), self._sink)
        self._flat = flat
        self._backward_flat = flat
        self._positions = positions

    def _run(self, entered: torch.Tensor) -> torch.Tensor:
        left = self._module(entered, attention_mask=None, position_embeddings=self._positions)
        return left if isinstance(left, torch.Tensor) else left[0]

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> None:
        """Output of the layer into `left`."""
        left.copy_(self._run(entered))

    def forward_keep(self, entered: torch.Tensor, left: torch.Tensor, wide: torch.Tensor | None = None) -> Kept:
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
            result = self._run(entered)
        left.copy_(result.detach())
        # Backward starts from the graph behind `result`, not from its values: the boundary slot has those.
        result.untyped_storage().resize_(0)
        return Kept(self, entered, result)

    def backward(
        self, kept: Kept, entered: torch.Tensor, gradient: torch.Tensor, into: GradientSlot, wide: torch.Tensor | None = None
    ) -> None:
        """Backward of a kept forward. `gradient`: of the output, replaced by that of the input."""
        assert wide is None, "autograd keeps its tensors where they are"
        kept.layer._backward_flat = self._flat
        kept.layer._sink.aim(into)
        torch.autograd.backward(kept.left, gradient)
        assert kept.entered.grad is not None
        gradient.copy_(kept.entered.grad)

    def backward_recompute(self, entered: torch.Tensor, gradient: torch.Tensor, into: GradientSlot) -> None:
        """Backward from the input alone. `gradient`: of the output, replaced by that of the input."""
        self._sink.aim(into)
        with torch.enable_grad():
            entered = entered.detach().requires_grad_()
            left = self._run(entered)
        torch.autograd.backward(left, gradient)
        assert entered.grad is not None
        gradient.copy_(entered.grad)


class EagerHead(Head):
    """The head with the norm's module and torch's cross-entropy."""

    def __init__(self, prototype: nn.Module, flat: torch.Tensor, layout: tuple[Parameter, ...], chunk_tokens: int) -> None:
        super().__init__(layout, flat, chunk_tokens, _cross_entropy, _add_rounded)
        self._norm = bind(prototype, "model.norm.", self._views, self._sink)

    def _normalise(self, entered: torch.Tensor) -> tuple[torch.Tensor, NormBackward]:
        with torch.enable_grad():
            leaf = entered.detach().requires_grad_()
            normed = self._norm(leaf)

        def backward(of_normal: torch.Tensor, gradient: torch.Tensor) -> None:
            torch.autograd.backward(normed, of_normal)
            assert leaf.grad is not None
            gradient.copy_(leaf.grad)

        return normed.detach(), backward


def _add_rounded(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor, accumulate: bool) -> None:
    """Sums (+)= left^T right, the product rounded as autograd does; by blocks of rows, so that it never exists whole."""
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
