"""GPU bytes that kernels decide, measured or estimated."""

from __future__ import annotations

from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import LayerShape, MachineProfile
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.slots import WEIGHT_BYTES, Footprint
from slideplan.simulator.formulas import loss_chunk_tokens
from slideplan.simulator.measured import nearest

LOSS_BUFFERS = 3  # logits, their gradient, and one temporary of the softmax


def footprint(model: ModelSpec, micro_batch: int, seq_len: int, machine: MachineProfile) -> Footprint:
    """Bytes of inner activations of one layer, and the largest transient need of any task.

    inner_bytes: saved_bytes measured for the layer's FORWARD_KEEP, else `model.saved_bytes(tokens)`.
    workspace_bytes: the largest of what was measured for any kind and role of this model, and of two
    formulas where those tasks were not measured:

        backward of a layer with recompute   saved_bytes(tokens) + 8 (ffn + hidden) tokens + 2 largest parameter
        loss                                 3 fp32 buffers of one chunk of logits

    The first holds the recomputed activations, bf16 gradients of the feed-forward's four tensors and of
    the hidden state's four, and one weight gradient. A measurement at another size is scaled by tokens.
    """
    tokens = micro_batch * seq_len

    def scaled(role: UnitRole, kind: TaskKind, field: str) -> int | None:
        cost = nearest(machine, LayerShape.of(model, role), kind, micro_batch, seq_len)
        measured: int | None = getattr(cost, field, None)
        if cost is None or measured is None:
            return None
        return -(-measured * tokens // (cost.micro_batch * cost.seq_len))

    inner = scaled(UnitRole.LAYER, TaskKind.FORWARD_KEEP, "saved_bytes")
    needs = {(role, kind): scaled(role, kind, "workspace_bytes") for role in UnitRole for kind in TaskKind}
    formulas = {
        (UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE): _recompute_bytes(model, tokens),
        (UnitRole.HEAD, TaskKind.LOSS): LOSS_BUFFERS * 4 * model.vocabulary * min(tokens, loss_chunk_tokens(model)),
    }
    measured_or_formula = (formulas.get(key, 0) if need is None else need for key, need in needs.items())
    return Footprint(
        inner_bytes=model.saved_bytes(tokens) if inner is None else inner,
        workspace_bytes=max(measured_or_formula),
    )


def _recompute_bytes(model: ModelSpec, tokens: int) -> int:
    largest = max(parameter.elements for parameter in model.parameters(UnitRole.LAYER))
    return model.saved_bytes(tokens) + 8 * (model.ffn + model.hidden) * tokens + WEIGHT_BYTES * largest
