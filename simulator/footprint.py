"""GPU bytes that kernels decide, measured or estimated."""

from __future__ import annotations

from collections.abc import Callable

from simulator.measured import measurements, nearest
from slideplan.footprint import Footprint, transient_key
from slideplan.graph.operations import TaskKind
from slideplan.lowering.sizes import LOGIT_BYTES, PRODUCT_BYTES, WEIGHT_BYTES, loss_chunk_tokens
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import ComputePolicy

EAGER_LOSS_BUFFERS = 3  # logits, log-softmax and gradient of a chunk in fp32


def footprint(model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile) -> Footprint:
    """Bytes of inner activations of one layer, and the transient needs of tasks.

    inner_bytes: saved_bytes measured for the layer's FORWARD_KEEP, else `model.saved_bytes(tokens)`.
    transient_bytes: of each role and kind that was measured, and else of

        eager  forward             8 ffn tokens
               forward that keeps  6 hidden tokens
               backward            8 (ffn + hidden) tokens + 2 largest parameter
               loss                16 bytes x chunk tokens x vocabulary + PRODUCT_BYTES at most + sums
        fused  forward             saved_bytes(tokens) + 2 hidden tokens
               forward that keeps  2 ffn tokens
               backward            2 ffn tokens
               loss                2 bytes x chunk tokens x vocabulary + 4 hidden tokens + sums

    where sums = 4 vocabulary hidden, if there are several chunks and gradients are not in fp32 themselves;
    backward with recompute has the recomputed activations beside, saved_bytes(tokens). Eager, backward holds
    bf16 gradients of the feed-forward's four tensors and of the hidden state's four, and one weight gradient;
    the loss a chunk's logits and their gradient in bf16 and three times in fp32, and a block of the
    projection's gradient. Fused, most happens in place.
    workspace_bytes: captured tasks, layers' and the head's, take capture_bytes of the profile each.
    Inner activations measured at another size are scaled by tokens; a workspace is moved by what its
    formula differs by, since much of it does not depend on tokens.
    """
    tokens = knobs.micro_batch * seq_len
    formulas: dict[tuple[UnitRole, TaskKind], Callable[[ModelSpec, ComputePolicy, int], int]] = {
        (UnitRole.LAYER, TaskKind.FORWARD): _forward_bytes,
        (UnitRole.LAYER, TaskKind.FORWARD_KEEP): _forward_keep_bytes,
        (UnitRole.LAYER, TaskKind.BACKWARD): _backward_bytes,
        (UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE): _recompute_bytes,
        (UnitRole.HEAD, TaskKind.LOSS): _loss_bytes,
    }
    transient: dict[str, int] = {}
    for role in UnitRole:
        for kind in TaskKind:
            formula = formulas.get((role, kind))
            cost = nearest(measurements(model, role, kind, knobs, False, machine).costs, knobs.micro_batch, seq_len)
            if cost is None or cost.workspace_bytes is None:
                if formula:
                    transient[transient_key(role, kind)] = formula(model, knobs, tokens)
                continue
            measured_tokens = cost.micro_batch * cost.seq_len
            if formula:
                moved = formula(model, knobs, tokens) - formula(model, knobs, measured_tokens)
                transient[transient_key(role, kind)] = cost.workspace_bytes + moved
            else:
                transient[transient_key(role, kind)] = -(-cost.workspace_bytes * tokens // measured_tokens)
    captured = knobs.micro_batches * (2 * model.layers + 1) if knobs.kernels == "graphed" else 0
    return Footprint(
        inner_bytes=_inner_bytes(model, knobs, seq_len, machine),
        workspace_bytes=captured * machine.gpu.capture_bytes,
        transient_bytes=transient,
    )


def _inner_bytes(model: ModelSpec, knobs: ComputePolicy, seq_len: int, machine: MachineProfile) -> int:
    tokens = knobs.micro_batch * seq_len
    costs = measurements(model, UnitRole.LAYER, TaskKind.FORWARD_KEEP, knobs, False, machine).costs
    cost = nearest(costs, knobs.micro_batch, seq_len)
    if cost is None or cost.saved_bytes is None:
        return model.saved_bytes(tokens, knobs.kernels == "eager")
    return -(-cost.saved_bytes * tokens // (cost.micro_batch * cost.seq_len))


def _forward_bytes(model: ModelSpec, knobs: ComputePolicy, tokens: int) -> int:
    if knobs.kernels == "eager":
        return 8 * model.ffn * tokens
    return model.saved_bytes(tokens, eager=False) + 2 * model.hidden * tokens


def _forward_keep_bytes(model: ModelSpec, knobs: ComputePolicy, tokens: int) -> int:
    return (6 * model.hidden if knobs.kernels == "eager" else 2 * model.ffn) * tokens


def _backward_bytes(model: ModelSpec, knobs: ComputePolicy, tokens: int) -> int:
    if knobs.kernels != "eager":
        return 2 * model.ffn * tokens
    largest = max(parameter.elements for parameter in model.parameters(UnitRole.LAYER))
    return 8 * (model.ffn + model.hidden) * tokens + WEIGHT_BYTES * largest


def _recompute_bytes(model: ModelSpec, knobs: ComputePolicy, tokens: int) -> int:
    return model.saved_bytes(tokens, knobs.kernels == "eager") + _backward_bytes(model, knobs, tokens)


def _loss_bytes(model: ModelSpec, knobs: ComputePolicy, tokens: int) -> int:
    chunk = min(tokens, loss_chunk_tokens(model.vocabulary, knobs.kernels))
    projection = model.vocabulary * model.hidden
    logits, sums = chunk * model.vocabulary, 4 * projection if tokens > chunk else 0
    if knobs.gradient_dtype == "fp32":
        sums = 0
    if knobs.kernels != "eager":
        return LOGIT_BYTES[knobs.kernels] * logits + 4 * model.hidden * tokens + sums
    return (LOGIT_BYTES["eager"] * EAGER_LOSS_BUFFERS + 4) * logits + min(PRODUCT_BYTES, 2 * projection) + sums
