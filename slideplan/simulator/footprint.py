"""GPU bytes that kernels decide, measured or estimated."""

from __future__ import annotations

from collections.abc import Callable

from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import MachineProfile
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.policy import ComputePolicy
from slideplan.plan.slots import LOGIT_BYTES, PRODUCT_BYTES, WEIGHT_BYTES, Footprint, loss_chunk_tokens
from slideplan.simulator.measured import measurements, nearest

EAGER_LOSS_BUFFERS = 3  # logits, log-softmax and gradient of a chunk in fp32


def footprint(model: ModelSpec, work: ComputePolicy, seq_len: int, machine: MachineProfile) -> Footprint:
    """Bytes of inner activations of one layer, and the largest transient need of any task.

    inner_bytes: saved_bytes measured for the layer's FORWARD_KEEP, else `model.saved_bytes(tokens)`.
    workspace_bytes: the largest need of any kind and role, by measurement where there is one, of

        eager  backward of a layer with recompute  saved_bytes(tokens) + 8 (ffn + hidden) tokens + 2 largest parameter
               loss                                16 bytes x chunk tokens x vocabulary + PRODUCT_BYTES at most + sums
        fused  backward of a layer with recompute  saved_bytes(tokens) + 2 ffn tokens
               loss                                2 bytes x chunk tokens x vocabulary + 4 hidden tokens + sums

    where sums = 4 vocabulary hidden, if there are several chunks and gradients are not in fp32 themselves.
    Eager, the first holds the recomputed activations, bf16 gradients of the feed-forward's four tensors and
    of the hidden state's four, and one weight gradient; the second a chunk's logits and their gradient in
    bf16 and three times in fp32, and a block of the projection's gradient. Fused, most happens in place.
    Captured tasks, layers' and the head's, take capture_bytes of the profile each.
    Inner activations measured at another size are scaled by tokens; a workspace is moved by what its
    formula differs by, since much of it does not depend on tokens.
    """
    tokens = work.micro_batch * seq_len
    formulas: dict[tuple[UnitRole, TaskKind], Callable[[ModelSpec, ComputePolicy, int], int]] = {
        (UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE): _recompute_bytes,
        (UnitRole.HEAD, TaskKind.LOSS): _loss_bytes,
    }
    needs = []
    for role in UnitRole:
        for kind in TaskKind:
            formula = formulas.get((role, kind))
            cost = nearest(measurements(machine, model, role, kind, work, accumulate=False), work.micro_batch, seq_len)
            if cost is None or cost.workspace_bytes is None:
                needs.append(formula(model, work, tokens) if formula else 0)
                continue
            measured_tokens = cost.micro_batch * cost.seq_len
            if formula:
                needs.append(cost.workspace_bytes + formula(model, work, tokens) - formula(model, work, measured_tokens))
            else:
                needs.append(-(-cost.workspace_bytes * tokens // measured_tokens))
    captured = work.micro_batches * (2 * model.layers + 1) if work.kernels == "graphed" else 0
    workspace_bytes = max(needs) + captured * machine.gpu.capture_bytes
    return Footprint(inner_bytes=_inner_bytes(model, work, seq_len, machine), workspace_bytes=workspace_bytes)


def _inner_bytes(model: ModelSpec, work: ComputePolicy, seq_len: int, machine: MachineProfile) -> int:
    tokens = work.micro_batch * seq_len
    costs = measurements(machine, model, UnitRole.LAYER, TaskKind.FORWARD_KEEP, work, accumulate=False)
    cost = nearest(costs, work.micro_batch, seq_len)
    if cost is None or cost.saved_bytes is None:
        return model.saved_bytes(tokens, work.kernels == "eager")
    return -(-cost.saved_bytes * tokens // (cost.micro_batch * cost.seq_len))


def _recompute_bytes(model: ModelSpec, work: ComputePolicy, tokens: int) -> int:
    saved = model.saved_bytes(tokens, work.kernels == "eager")
    if work.kernels != "eager":
        return saved + 2 * model.ffn * tokens
    largest = max(parameter.elements for parameter in model.parameters(UnitRole.LAYER))
    return saved + 8 * (model.ffn + model.hidden) * tokens + WEIGHT_BYTES * largest


def _loss_bytes(model: ModelSpec, work: ComputePolicy, tokens: int) -> int:
    chunk = min(tokens, loss_chunk_tokens(model.vocabulary, work.kernels))
    projection = model.vocabulary * model.hidden
    logits, sums = chunk * model.vocabulary, 4 * projection if tokens > chunk else 0
    if work.gradient_dtype == "fp32":
        sums = 0
    if work.kernels != "eager":
        return LOGIT_BYTES[work.kernels] * logits + 4 * model.hidden * tokens + sums
    return (LOGIT_BYTES["eager"] * EAGER_LOSS_BUFFERS + 4) * logits + min(PRODUCT_BYTES, 2 * projection) + sums
