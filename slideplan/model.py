"""What is trained: published shapes, the units they fall into, parameters, FLOPs and bytes of each."""

from __future__ import annotations

from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Literal

from slideplan.codec import Spec

# Every parameter starts at a multiple of this many elements in its unit's flat buffer, so that
# views are aligned to 128 bytes in bf16 and vector loads never straddle two parameters.
ALIGN_ELEMENTS = 64
# fp32 moments of an element that lie a multiple of 256 MiB apart are slow to stream on some machines, as if they met in
# one bank of memory: on an AMD EPYC the host's AdamW is 15 to 27 % slower over them (benchmarks/host_update.py).
COLLIDING_ELEMENTS = (256 << 20) // 4

Architecture = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeValue = str | float | int | bool | list[float] | None


class UnitRole(StrEnum):
    """The three kinds of unit; all layers of a model are alike."""

    EMBEDDING = "embedding"
    LAYER = "layer"
    HEAD = "head"


class Parameter(Spec, frozen=True):
    """One weight tensor inside a unit's flat buffer; `name` is the Hugging Face name within the unit."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def elements(self) -> int:
        return prod(self.shape)


class ModelSpec(Spec, frozen=True, dict=True):
    """Shape of a decoder-only model with RMSNorm, rotary attention and a gated SiLU feed-forward.

    Units are numbered 0 (embedding), 1..layers, layers + 1 (head: final norm, output projection and
    loss). With tied embeddings the vocabulary matrix belongs to unit 0 and the head borrows it.
    """

    name: str
    architecture: Architecture
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tied_embeddings: bool
    attention_bias: Literal["none", "qkv", "qkvo"] = "none"
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, RopeValue] | None = None
    max_positions: int = 4096
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "vocabulary", "max_positions"):
            if getattr(self, field) < 1:
                raise ValueError(f"model {self.name}: {field} is {getattr(self, field)}, must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"model {self.name}: heads ({self.heads}) is not a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ValueError(f"model {self.name}: head_dim is {self.head_dim}, rotary embedding needs an even one")

    @property
    def units(self) -> int:
        return self.layers + 2

    @property
    def head_unit(self) -> int:
        return self.layers + 1

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    def feed_forward_bytes(self, tokens: int) -> int:
        """What a layer's two wide products, gate and up, take for so many tokens in bf16."""
        return 2 * 2 * self.ffn * tokens

    def role(self, unit: int) -> UnitRole:
        """Role of a unit number. Raises IndexError outside 0..layers + 1."""
        if not 0 <= unit < self.units:
            raise IndexError(f"unit {unit} of a model with {self.units} units")
        if unit == 0:
            return UnitRole.EMBEDDING
        return UnitRole.HEAD if unit == self.head_unit else UnitRole.LAYER

    def unit_name(self, unit: int) -> str:
        role = self.role(unit)
        return f"layer{unit - 1:03d}" if role is UnitRole.LAYER else role.value

    def unit_prefix(self, unit: int) -> str:
        """What stands before a unit's parameter names in a Hugging Face state dict."""
        return f"model.layers.{unit - 1}." if self.role(unit) is UnitRole.LAYER else ""

    @cached_property
    def _layouts(self) -> dict[UnitRole, tuple[Parameter, ...]]:
        h, q, kv, f = self.hidden, self.q_width, self.kv_width, self.ffn
        vocabulary = (self.vocabulary, h)
        layer: list[tuple[str, tuple[int, ...]]] = []
        for name, shape, biased in (
            ("q", (q, h), ("qkv", "qkvo")),
            ("k", (kv, h), ("qkv", "qkvo")),
            ("v", (kv, h), ("qkv", "qkvo")),
            ("o", (h, q), ("qkvo",)),
        ):
            layer.append((f"self_attn.{name}_proj.weight", shape))
            if self.attention_bias in biased:
                layer.append((f"self_attn.{name}_proj.bias", shape[:1]))
        if self.qk_norm:
            layer += [("self_attn.q_norm.weight", (self.head_dim,)), ("self_attn.k_norm.weight", (self.head_dim,))]
        layer += [
            ("mlp.gate_proj.weight", (f, h)),
            ("mlp.up_proj.weight", (f, h)),
            ("mlp.down_proj.weight", (h, f)),
            ("input_layernorm.weight", (h,)),
            ("post_attention_layernorm.weight", (h,)),
        ]
        head: list[tuple[str, tuple[int, ...]]] = [("model.norm.weight", (h,))]
        if not self.tied_embeddings:
            head.append(("lm_head.weight", vocabulary))
        return {
            UnitRole.EMBEDDING: _lay_out([("model.embed_tokens.weight", vocabulary)]),
            UnitRole.LAYER: _lay_out(layer),
            UnitRole.HEAD: _lay_out(head),
        }

    def parameters(self, role: UnitRole) -> tuple[Parameter, ...]:
        """Parameters of a unit with their place in its flat buffer."""
        return self._layouts[role]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each parameter by its name in a Hugging Face state dict."""
        units = [(self.unit_prefix(unit), self.parameters(self.role(unit))) for unit in range(self.units)]
        return {prefix + each.name: each.shape for prefix, parameters in units for each in parameters}

    def flat_elements(self, role: UnitRole) -> int:
        """Elements of a unit's flat buffer, alignment included: what is moved and updated."""
        last = self._layouts[role][-1]
        elements = _aligned(last.offset + last.elements)
        return elements if elements % COLLIDING_ELEMENTS else elements + ALIGN_ELEMENTS

    def unit_parameter_count(self, role: UnitRole) -> int:
        """Trainable elements of a unit, alignment excluded."""
        return sum(parameter.elements for parameter in self._layouts[role])

    @property
    def parameter_count(self) -> int:
        """Trainable elements of the model; tied weights count once."""
        return (
            self.unit_parameter_count(UnitRole.EMBEDDING)
            + self.layers * self.unit_parameter_count(UnitRole.LAYER)
            + self.unit_parameter_count(UnitRole.HEAD)
        )

    def matmul_flops(self, role: UnitRole, tokens: int) -> int:
        """Forward FLOPs of a unit's matrix products over `tokens` tokens: 2 x tokens x weight elements.

        A layer has the four attention projections (true head_dim: heads x head_dim need not be
        hidden) and the three of the gated feed-forward; the head has the output projection; the
        embedding is a gather. Backward costs twice the forward (one product per operand).
        """
        if role is UnitRole.EMBEDDING:
            return 0
        if role is UnitRole.HEAD:
            return 2 * tokens * self.hidden * self.vocabulary
        weights = self.hidden * (2 * self.q_width + 2 * self.kv_width + 3 * self.ffn)
        return 2 * tokens * weights

    def attention_flops(self, tokens: int, seq_len: int) -> int:
        """Forward FLOPs of causal attention in one layer: 2 products x 2 x tokens x (seq_len + 1) / 2 x q_width.

        Query i attends to i + 1 keys, (seq_len + 1) / 2 on average; Q K^T and P V each take 2 FLOPs a
        multiply-add over head_dim for every query head. Backward takes 5 such products to forward's 2
        in flash attention (S is computed again), here counted as 2.5 times the forward.
        """
        return 2 * tokens * (seq_len + 1) * self.q_width

    def saved_bytes(self, tokens: int, eager: bool) -> int:
        """Estimate of a layer's inner activations in bf16, kept for backward. Bytes.

        Per token, fused: two norms' factors in fp32; attention's rotated q and k, v and output, its fp32
        log-sum-exp, and with norms of their own q and k once more, with fp32 factors; the input of the second
        norm; gate and up. Eager: each of two RMSNorms keeps its input in fp32, its normalised value and its output in
        bf16 (8 x hidden); attention keeps rotated q and k, v, its output twice (own and projection
        input) and fp32 log-sum-exp; the feed-forward keeps gate, SiLU(gate), up and their product.
        """
        if not eager:
            own_norms = 2 * (self.q_width + self.kv_width) + 4 * (self.heads + self.kv_heads) if self.qk_norm else 0
            attention = 4 * (self.q_width + self.kv_width) + 4 * self.heads + own_norms
            return tokens * (8 + attention + 2 * self.hidden + 4 * self.ffn)
        qkv = 6 * self.q_width + 4 * self.kv_width + 4 * self.heads
        return tokens * (16 * self.hidden + qkv + 8 * self.ffn)

    def boundary_bytes(self, tokens: int) -> int:
        """bf16 activations that pass from one unit to the next. Bytes."""
        return 2 * tokens * self.hidden


def _aligned(elements: int) -> int:
    return -(-elements // ALIGN_ELEMENTS) * ALIGN_ELEMENTS


def _lay_out(shapes: list[tuple[str, tuple[int, ...]]]) -> tuple[Parameter, ...]:
    parameters = []
    offset = 0
    for name, shape in shapes:
        parameters.append(Parameter(name=name, shape=shape, offset=offset))
        offset = _aligned(offset + prod(shape))
    return tuple(parameters)
