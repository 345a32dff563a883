"""Time of compute tasks that were not measured, from a machine's rates. All durations in nanoseconds."""

from __future__ import annotations

from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import Efficiency
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.slots import loss_chunk_tokens

# Memory traffic of an eager layer beside its matrix products, in units of the activations it saves:
# every saved tensor is written once and read by the next operation, and half of them pass through
# an intermediate that is not saved; backward reads each again, reads and writes its gradient.
FORWARD_PASSES = 2.5
BACKWARD_PASSES = 5.0

# Bytes per logit beside the products: bf16 -> fp32 (2 + 4), log-sum-exp (4), probabilities minus
# target in place (4 + 4), fp32 -> bf16 (4 + 2).
LOGIT_TRAFFIC_BYTES = 24


def compute_ns(model: ModelSpec, role: UnitRole, kind: TaskKind, micro_batch: int, seq_len: int, rates: Efficiency) -> int:
    """Time of one compute task, at least 1 ns: forward, backward (twice the products), or both.

    BACKWARD_RECOMPUTE is forward plus backward; LOSS is the head's forward and backward in one.
    """
    tokens = micro_batch * seq_len
    if role is UnitRole.HEAD:
        assert kind is TaskKind.LOSS, f"the head runs {TaskKind.LOSS} only, not {kind}"
        duration = _loss_ns(model, tokens, rates)
    elif role is UnitRole.EMBEDDING:
        duration = _embedding_ns(model, kind, tokens, rates)
    else:
        duration = _layer_ns(model, kind, tokens, seq_len, rates)
    return max(1, round(duration))


def _layer_ns(model: ModelSpec, kind: TaskKind, tokens: int, seq_len: int, rates: Efficiency) -> float:
    """Forward: sum of gemm(2 tokens in out) over the seven products + attention_flops / rate + 2.5 saved_bytes / rate.

    Backward: two products per forward product (one per operand), 2.5 times the attention, 5 saved_bytes / rate.
    """
    hidden, q, kv, ffn = model.hidden, model.q_width, model.kv_width, model.ffn
    products = sum(count * rates.gemm.duration_ns(2 * tokens * hidden * width) for count, width in ((2, q), (2, kv), (3, ffn)))
    attention = model.attention_flops(tokens, seq_len) * 1e9 / rates.attention_flops_per_s
    saved = model.saved_bytes(tokens) * 1e9 / rates.elementwise_bytes_per_s
    forward = products + attention + FORWARD_PASSES * saved
    if kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP):
        return forward
    backward = 2 * products + 2.5 * attention + BACKWARD_PASSES * saved
    return backward if kind is TaskKind.BACKWARD else forward + backward


def _embedding_ns(model: ModelSpec, kind: TaskKind, tokens: int, rates: Efficiency) -> float:
    """Forward: rows read and written, 4 bytes x tokens x hidden.

    Backward: the vocabulary matrix zeroed, 2 bytes an element; then gradients read and added to
    their rows (read, write), 6 bytes x tokens x hidden.
    """
    if kind is TaskKind.FORWARD:
        traffic = 4 * tokens * model.hidden
    else:
        traffic = 2 * model.vocabulary * model.hidden + 6 * tokens * model.hidden
    return traffic * 1e9 / rates.elementwise_bytes_per_s


def _loss_ns(model: ModelSpec, tokens: int, rates: Efficiency) -> float:
    """Three products (logits, gradient of the input, gradient of the weights) + 24 bytes per logit / rate.

    The products run in chunks of tokens whose fp32 logits stay within LOSS_CHUNK_BYTES, so each is
    priced at its chunk's size. The final norm is left out: one part in vocabulary / 8 of the rest.
    """
    chunk = min(tokens, loss_chunk_tokens(model.vocabulary))
    product = rates.gemm.duration_ns(model.matmul_flops(UnitRole.HEAD, chunk)) * tokens / chunk
    return 3 * product + LOGIT_TRAFFIC_BYTES * tokens * model.vocabulary * 1e9 / rates.elementwise_bytes_per_s
