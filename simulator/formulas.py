"""Time of compute tasks that were not measured, from a machine's rates. All durations in nanoseconds."""

from __future__ import annotations

from slideplan.graph.operations import GRADIENT_KINDS, TaskKind
from slideplan.lowering.sizes import loss_chunk_tokens
from slideplan.machine.profile import Efficiency
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import GRADIENT_BYTES, ComputePolicy, GradientDtype, Kernels

# Memory traffic of an eager layer beside its matrix products, in units of the activations it saves:
# every saved tensor is written once and read by the next operation, and half of them pass through
# an intermediate that is not saved; backward reads each again, reads and writes its gradient.
FORWARD_PASSES = 2.5
BACKWARD_PASSES = 5.0

# Attention in a layer's task, in forwards: flash attention's backward takes 5 products to the forward's 2.
ATTENTION_FORWARDS = {
    TaskKind.FORWARD: 1.0,
    TaskKind.FORWARD_KEEP: 1.0,
    TaskKind.BACKWARD: 2.5,
    TaskKind.BACKWARD_RECOMPUTE: 3.5,
}

# Bytes per logit beside the products. Eager: bf16 -> fp32 (2 + 4), log-sum-exp (4), probabilities minus
# target in place (4 + 4), fp32 -> bf16 (4 + 2). Fused: read for the normaliser, read and replaced by the gradient.
LOGIT_TRAFFIC_BYTES: dict[Kernels, int] = {"eager": 24, "fused": 6, "graphed": 6}


def compute_ns(
    model: ModelSpec, role: UnitRole, kind: TaskKind, knobs: ComputePolicy, seq_len: int, accumulate: bool, rates: Efficiency
) -> int:
    """Time of one compute task, at least 1 ns: forward, backward (twice the products), or both.

    LOSS is the head's forward and backward in one. What writes weight gradients takes `gradient_bytes`
    at the element-wise rate, too.
    """
    tokens = knobs.micro_batch * seq_len
    if role is UnitRole.HEAD:
        assert kind is TaskKind.LOSS, f"the head runs {TaskKind.LOSS} only, not {kind}"
        duration = _loss_ns(model, tokens, knobs, rates)
    elif role is UnitRole.EMBEDDING:
        # Rows read and written; backward reads gradients and adds them to their rows (read, write).
        traffic = (4 if kind is TaskKind.FORWARD else 6) * tokens * model.hidden
        duration = traffic * 1e9 / rates.elementwise_bytes_per_s
    else:
        layer_ns = _eager_layer_ns if knobs.kernels == "eager" else _fused_layer_ns
        duration = layer_ns(model, kind, tokens, rates) + attention_ns(model, role, kind, tokens, seq_len, rates)
    written = gradient_bytes(model, role, kind, knobs.gradient_dtype, accumulate)
    return max(1, round(duration + written * 1e9 / rates.elementwise_bytes_per_s))


def attention_ns(model: ModelSpec, role: UnitRole, kind: TaskKind, tokens: int, seq_len: int, rates: Efficiency) -> float:
    """What of a task grows with tokens x seq_len: attention_flops / rate, as often as ATTENTION_FORWARDS says."""
    if role is not UnitRole.LAYER:
        return 0.0
    return ATTENTION_FORWARDS[kind] * model.attention_flops(tokens, seq_len) * 1e9 / rates.attention_flops_per_s


def gradient_bytes(model: ModelSpec, role: UnitRole, kind: TaskKind, dtype: GradientDtype, accumulate: bool) -> int:
    """Traffic of a task's weight gradients: each written once, where they add to a sum read too.

    The embedding's are zeroed once; what is added to them then is as small as the batch.
    """
    if kind not in GRADIENT_KINDS or (role is UnitRole.EMBEDDING and accumulate):
        return 0
    elements = model.vocabulary * model.hidden if role is UnitRole.HEAD else model.flat_elements(role)
    return elements * GRADIENT_BYTES[dtype] * (2 if accumulate else 1)


def square_sum_ns(model: ModelSpec, role: UnitRole, knobs: ComputePolicy, rates: Efficiency) -> int:
    """One pass over a unit's gradient: its bytes at the rate of element-wise passes."""
    return model.flat_elements(role) * GRADIENT_BYTES[knobs.gradient_dtype] * 1_000_000_000 // rates.elementwise_bytes_per_s


def _products_ns(model: ModelSpec, tokens: int, rates: Efficiency) -> tuple[float, float]:
    """All seven products of a layer's forward, gemm(2 tokens in out) each, and the last of them alone."""
    hidden, q, kv, ffn = model.hidden, model.q_width, model.kv_width, model.ffn

    def product(width: int) -> int:
        return rates.gemm.duration_ns(2 * tokens * hidden * width)

    return 2 * product(q) + 2 * product(kv) + 3 * product(ffn), product(ffn)


def _eager_layer_ns(model: ModelSpec, kind: TaskKind, tokens: int, rates: Efficiency) -> float:
    """Beside attention. Forward: products + 2.5 saved_bytes / rate.

    Backward: two products per forward product (one per operand), 5 saved_bytes / rate. Recomputing is all of forward.
    """
    products, _ = _products_ns(model, tokens, rates)
    saved = model.saved_bytes(tokens, eager=True) * 1e9 / rates.elementwise_bytes_per_s
    forward = products + FORWARD_PASSES * saved
    if kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP):
        return forward
    backward = 2 * products + BACKWARD_PASSES * saved
    return backward if kind is TaskKind.BACKWARD else forward + backward


def _fused_layer_ns(model: ModelSpec, kind: TaskKind, tokens: int, rates: Efficiency) -> float:
    """Products as eager, beside the traffic of the kernels; recomputing leaves out the last product.

    Bytes per token, forward: two norms (read, write) and two residuals 12 hidden, rotation 4 (q + kv), gated
    SiLU 6 ffn. Backward: two norms again and their backward 24 hidden, rotation 4 (q + kv), gated SiLU 12 ffn.
    """
    products, last = _products_ns(model, tokens, rates)
    rotation = 4 * (model.q_width + model.kv_width)
    per_byte = tokens * 1e9 / rates.elementwise_bytes_per_s
    forward = products + (12 * model.hidden + rotation + 6 * model.ffn) * per_byte
    if kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP):
        return forward
    backward = 2 * products + (24 * model.hidden + rotation + 12 * model.ffn) * per_byte
    return backward if kind is TaskKind.BACKWARD else forward - last - 6 * model.ffn * per_byte + backward


def _loss_ns(model: ModelSpec, tokens: int, knobs: ComputePolicy, rates: Efficiency) -> float:
    """Three products (logits, gradient of the input, gradient of the weights) + the logits' traffic.

    The products run in chunks of tokens, so each is priced at its chunk's size; with several, each but the
    first reads and writes an fp32 sum of the projection's gradient. The final norm is left out: one part in
    vocabulary / 8 of the rest.
    """
    chunk = min(tokens, loss_chunk_tokens(model.vocabulary, knobs.kernels))
    product = rates.gemm.duration_ns(model.matmul_flops(UnitRole.HEAD, chunk)) * tokens / chunk
    traffic = LOGIT_TRAFFIC_BYTES[knobs.kernels] * tokens * model.vocabulary
    traffic += (-(-tokens // chunk) - 1) * 8 * model.vocabulary * model.hidden
    return 3 * product + traffic * 1e9 / rates.elementwise_bytes_per_s
