"""A decoder layer as explicit products and kernels, forward and backward, on a weight slot.

Beside the Hugging Face module run by autograd it saves what autograd cannot know: normalised inputs and the
feed-forward's product are made again in backward, so that a token keeps 2 (2 q + 2 kv + hidden + 2 ffn) bytes;
weight gradients are written or added by the product that makes them; residuals are added by the products
and kernels beside them; recomputing stops before the last product, whose result backward does not need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from runtime.compute.gradients import GradientSink, GradientSlot
from runtime.compute.operators import rms_norm, rms_norm_backward, rotate, swiglu, swiglu_backward
from runtime.memory.buffers import parameter_views
from slideplan.model import ModelSpec, UnitRole

ATTENTION_NORM, FEED_FORWARD_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"

# cuDNN's attention took 0.57 to 0.66 of the time of torch's own flash attention on an H100 (forward and backward of
# 32 heads over 1024 to 4096 tokens). Where a backend does not exist or cannot do it, the next is taken.
ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass
class OwnNorm:
    """Queries or keys before their own norm and rotation, with the norm's factors. [tokens * heads, head_dim]"""

    raw: torch.Tensor
    scale: torch.Tensor


@dataclass
class Saved:
    """What backward needs beside the layer's input; it may overwrite all of it.

    leaves:   q, k, v as they enter attention, [batch, heads, seq_len, head_dim]
    attended: what leaves attention, with its autograd graph
    middle:   input of the feed-forward's norm, [tokens, hidden]
    """

    input_scale: torch.Tensor
    normed: dict[str, OwnNorm]
    leaves: list[torch.Tensor]
    attended: torch.Tensor
    middle: torch.Tensor
    middle_scale: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention, [batch, heads, seq_len, head_dim]; keys and values may have fewer heads."""
    with sdpa_kernel(ATTENTION, set_priority=True):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=key.shape[1] < query.shape[1]
        )


class FusedLayer:
    """A decoder layer whose weights are one weight slot. Boundary activations are [batch, sequence, hidden]."""

    def __init__(self, model: ModelSpec, flat: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        self._model = model
        self._weights = parameter_views(flat, model.parameters(UnitRole.LAYER))
        self._cos, self._sin = cos, sin  # [seq_len, head_dim]
        self._sink = GradientSink(model.parameters(UnitRole.LAYER))

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> None:
        """Output of the layer into `left`."""
        self._leave(self._inner(entered), left, reuse=True)

    def forward_keep(self, entered: torch.Tensor, left: torch.Tensor, wide: torch.Tensor | None = None) -> Saved:
        """Forward; what it returns is for `backward` of a layer bound to the slot that then holds the weights.

        wide: where gate and up go, [2, tokens, ffn]; they may be elsewhere by then.
        """
        saved = self._inner(entered, wide)
        self._leave(saved, left, reuse=False)
        return saved

    def backward_recompute(self, entered: torch.Tensor, gradient: torch.Tensor, into: GradientSlot) -> None:
        """Backward from the input alone. `gradient`: of the output, replaced by that of the input."""
        self.backward(self._inner(entered), entered, gradient, into)

    # -- forward -------------------------------------------------------------------------------

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _inner(self, entered: torch.Tensor, wide: torch.Tensor | None = None) -> Saved:
        """All of forward but the last product. `wide`: takes gate and up."""
        model, x = self._model, entered.reshape(-1, self._model.hidden)
        normal, input_scale = rms_norm(x, self._weights[ATTENTION_NORM], model.rms_norm_eps)
        normed: dict[str, OwnNorm] = {}
        heads = []
        for name in "qkv":
            value = self._linear(f"self_attn.{name}_proj", normal).view(-1, model.head_dim)
            if model.qk_norm and name != "v":
                raw = value
                value, scale = rms_norm(raw, self._weights[f"self_attn.{name}_norm.weight"], model.rms_norm_eps)
                normed[name] = OwnNorm(raw, scale)
            value = value.view(x.shape[0], -1, model.head_dim)
            if name != "v":
                rotate(value, self._cos, self._sin)
            heads.append(value.view(*entered.shape[:2], -1, model.head_dim).transpose(1, 2))
        del normal
        with torch.enable_grad():
            leaves = [head.detach().requires_grad_() for head in heads]
            query, key, value = leaves
            attended = attend(query, key, value)
        out = self._weights["self_attn.o_proj.weight"]
        middle = torch.addmm(x, _rows(attended.detach()), out.t())
        if "self_attn.o_proj.bias" in self._weights:
            middle += self._weights["self_attn.o_proj.bias"]
        normal, middle_scale = rms_norm(middle, self._weights[FEED_FORWARD_NORM], model.rms_norm_eps)
        names = ("mlp.gate_proj", "mlp.up_proj")
        if wide is None:
            gate, up = (self._linear(name, normal) for name in names)
        else:
            gate, up = (
                torch.mm(normal, self._weights[f"{name}.weight"].t(), out=out) for name, out in zip(names, wide, strict=True)
            )
        return Saved(input_scale, normed, leaves, attended, middle, middle_scale, gate, up)

    def _leave(self, saved: Saved, left: torch.Tensor, reuse: bool) -> None:
        """The last product and the residual into `left`. `reuse`: nobody needs the gate any more."""
        product = saved.gate if reuse else torch.empty_like(saved.gate)
        swiglu(saved.gate, saved.up, product)
        out = left.view_as(saved.middle)
        torch.addmm(saved.middle, product, self._weights["mlp.down_proj.weight"].t(), out=out)

    # -- backward ------------------------------------------------------------------------------

    def backward(
        self,
        saved: Saved,
        entered: torch.Tensor,
        gradient: torch.Tensor,
        into: GradientSlot,
        wide: torch.Tensor | None = None,
    ) -> None:
        """Backward of a kept forward. `gradient`: of the output, replaced by that of the input.

        wide: gate and up, where they are not where the forward put them.
        """
        model, weights, sink = self._model, self._weights, self._sink
        if wide is not None:
            saved.gate, saved.up = wide
        sink.aim(into)
        x, g = entered.reshape(-1, model.hidden), gradient.view(-1, model.hidden)
        product = torch.mm(g, weights["mlp.down_proj.weight"])
        swiglu_backward(saved.gate, saved.up, product)
        of_gate, of_up = saved.gate, saved.up
        self._linear_gradients("mlp.down_proj", g, product)
        del product
        normal, _ = rms_norm(saved.middle, weights[FEED_FORWARD_NORM], model.rms_norm_eps, saved.middle_scale)
        self._linear_gradients("mlp.gate_proj", of_gate, normal)
        self._linear_gradients("mlp.up_proj", of_up, normal)
        # The normalised rows are done with: their memory takes their gradient. So are gate and up after it.
        torch.mm(of_gate, weights["mlp.gate_proj.weight"], out=normal).addmm_(of_up, weights["mlp.up_proj.weight"])
        del of_gate, of_up, saved.gate, saved.up
        of_norm = rms_norm_backward(saved.middle, weights[FEED_FORWARD_NORM], saved.middle_scale, normal, g, residual=g)
        sink.add(FEED_FORWARD_NORM, of_norm)
        self._linear_gradients("self_attn.o_proj", g, _rows(saved.attended.detach()))
        of_attended = torch.mm(g, weights["self_attn.o_proj.weight"], out=normal if model.q_width == model.hidden else None)
        of_attended = of_attended.view(*entered.shape[:2], model.heads, model.head_dim).transpose(1, 2)
        of_heads = torch.autograd.grad(saved.attended, saved.leaves, of_attended)
        del of_attended
        normal, _ = rms_norm(x, weights[ATTENTION_NORM], model.rms_norm_eps, saved.input_scale)
        of_normal: torch.Tensor | None = None
        for name, of_head in zip("qkv", of_heads, strict=True):
            of_linear = self._through_head(name, saved, of_head)
            self._linear_gradients(f"self_attn.{name}_proj", of_linear, normal)
            weight = weights[f"self_attn.{name}_proj.weight"]
            of_normal = torch.mm(of_linear, weight) if of_normal is None else of_normal.addmm_(of_linear, weight)
        assert of_normal is not None
        sink.add(ATTENTION_NORM, rms_norm_backward(x, weights[ATTENTION_NORM], saved.input_scale, of_normal, g, residual=g))

    def _linear_gradients(self, name: str, of_out: torch.Tensor, x: torch.Tensor) -> None:
        """Gradients of a projection's weight and bias from those of its output and from its input."""
        self._sink.add_product(f"{name}.weight", of_out, x)
        if f"{name}.bias" in self._weights:
            self._sink.add(f"{name}.bias", of_out.sum(0, dtype=torch.float32))

    def _through_head(self, name: str, saved: Saved, of_head: torch.Tensor) -> torch.Tensor:
        """Gradient of a projection's output, [tokens, width], from that of what enters attention."""
        rows = _rows(of_head)
        if name != "v":
            rotate(rows.view(rows.shape[0], -1, self._model.head_dim), self._cos, self._sin, backward=True)
        if name in saved.normed:
            head, weight = saved.normed[name], f"self_attn.{name}_norm.weight"
            each = rows.view(-1, self._model.head_dim)
            self._sink.add(weight, rms_norm_backward(head.raw, self._weights[weight], head.scale, each, each))
        return rows


def _rows(heads: torch.Tensor) -> torch.Tensor:
    """[batch, heads, sequence, head_dim] as [tokens, heads * head_dim], contiguous; a view where memory lies so."""
    batch, count, length, width = heads.shape
    # A reshape alone may be a strided view, if all heads' gradients lie in one buffer; kernels take rows that touch.
    return heads.transpose(1, 2).reshape(batch * length, count * width).contiguous()
