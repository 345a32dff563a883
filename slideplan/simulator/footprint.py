"""GPU bytes that kernels decide, measured or estimated."""

from __future__ import annotations

from collections.abc import Callable

from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import LayerShape, MachineProfile
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.slots import PRODUCT_BYTES, WEIGHT_BYTES, Footprint, loss_chunk_tokens
from slideplan.simulator.measured import nearest

LOSS_BUFFERS = 3  # logits, log-softmax and gradient of a chunk in fp32


def footprint(model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> Footprint:
    """Bytes of inner activations of one layer, and the largest transient need of any task.

    inner_bytes: saved_bytes measured for the layer's FORWARD_KEEP, else `model.saved_bytes(tokens)`.
    workspace_bytes: the largest need of any kind and role, by measurement where there is one, of

        backward of a layer with recompute   saved_bytes(tokens) + 8 (ffn + hidden) tokens + 2 largest parameter
        loss                                 16 bytes x chunk tokens x vocabulary + PRODUCT_BYTES at most,
                                             + 4 vocabulary hidden where there are several chunks

    The first holds the recomputed activations, bf16 gradients of the feed-forward's four tensors and of
    the hidden state's four, and one weight gradient. The second holds a chunk's logits and their
    gradient in bf16 and three times in fp32, a block of the projection's gradient, and its fp32 sum.
    Inner activations measured at another size are scaled by tokens; a workspace is moved by what its
    formula differs by, since much of it does not depend on tokens.
    """
    tokens = micro_batch * seq_len
    formulas: dict[tuple[UnitRole, TaskKind], Callable[[ModelSpec, int], int]] = {
        (UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE): _recompute_bytes,
        (UnitRole.HEAD, TaskKind.LOSS): _loss_bytes,
    }
    needs = []
    for role in UnitRole:
        for kind in TaskKind:
            formula = formulas.get((role, kind))
            cost = nearest(machine, LayerShape.of(model, role), kind, micro_batch, seq_len)
            if cost is None or cost.workspace_bytes is None:
                needs.append(formula(model, tokens) if formula else 0)
                continue
            measured_tokens = cost.micro_batch * cost.seq_len
            if formula:
                needs.append(cost.workspace_bytes + formula(model, tokens) - formula(model, measured_tokens))
            else:
                needs.append(-(-cost.workspace_bytes * tokens // measured_tokens))
    return Footprint(inner_bytes=_inner_bytes(model, micro_batch, seq_len, machine), workspace_bytes=max(needs))


def _inner_bytes(model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> int:
    tokens = micro_batch * seq_len
    cost = nearest(machine, LayerShape.of(model, UnitRole.LAYER), TaskKind.FORWARD_KEEP, micro_batch, seq_len)
    if cost is None or cost.saved_bytes is None:
        return model.saved_bytes(tokens)
    return -(-cost.saved_bytes * tokens // (cost.micro_batch * cost.seq_len))


def _recompute_bytes(model: ModelSpec, tokens: int) -> int:
    largest = max(parameter.elements for parameter in model.parameters(UnitRole.LAYER))
    return model.saved_bytes(tokens) + 8 * (model.ffn + model.hidden) * tokens + WEIGHT_BYTES * largest


def _loss_bytes(model: ModelSpec, tokens: int) -> int:
    chunk = min(tokens, loss_chunk_tokens(model.vocabulary))
    projection = model.vocabulary * model.hidden
    sums = 4 * projection if tokens > chunk else 0
    return (4 * LOSS_BUFFERS + 4) * chunk * model.vocabulary + min(PRODUCT_BYTES, 2 * projection) + sums
