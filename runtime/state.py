"""A unit's master weights and moments as one object, wherever its placement has them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from msgspec import UNSET

from runtime.inputs.weights import Piece
from runtime.memory.buffers import Buffers, parameter_views
from runtime.optimizer.split_master import join, split
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import COPIED_AS, Role, TaskGraph
from slideplan.model import ModelSpec
from slideplan.placement import STATE, TensorClass
from slideplan.policy import MOMENT_BLOCK

# Stored names of both moments; where a moment is kept in 8 bits, what the names of its two tensors end with.
MOMENTS, CODES, SCALES = ("exp_avg", "exp_avg_sq"), ".codes", ".scales"
_DTYPES = {"": "F32", CODES: "U8", SCALES: "F32"}


class StoredTensor(NamedTuple):
    """A tensor of a unit as checkpoints store it. dtype: in safetensors' words.

    parts: flat views of the slots that hold it. One after the other they are its elements; what is written there is its new
    value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: list[torch.Tensor]


class UnitState:
    """Weights, remainder and moments of one unit between two steps. Nothing may be running while it is read or written.

    Its stored tensors are the same for every placement; only how the moments are kept may differ.
    """

    def __init__(self, graph: TaskGraph, model: ModelSpec, buffers: Buffers, unit: int) -> None:
        self._layout = model.parameters(model.role(unit))
        update = next(task for task in graph.tasks if task.kind is TaskKind.UPDATE and task.unit == unit)
        tier = update.operation.target
        self._weights = buffers[update.slot(Role.WEIGHTS, tier)]
        self._slots = {tensor: [buffers[update.slot(COPIED_AS[tensor], tier)]] for tensor in STATE}
        # State that passes through the tier that updates it lies where its copies come from, chunk by chunk.
        loads = [
            task for task in graph.tasks if task.kind is TaskKind.COPY and task.unit == unit and task.operation.target is tier
        ]
        for tensor in STATE:
            chunks = [task for task in loads if tensor in task.operation.tensors and task.chunk is not UNSET]
            if chunks:
                self._slots[tensor] = [buffers[task.slot(COPIED_AS[tensor], task.operation.source)] for task in chunks]

    @property
    def elements(self) -> int:
        """Of each of its tensors, alignment between parameters included."""
        return self._weights.numel()

    def weights(self) -> list[StoredTensor]:
        """bf16 weights, one tensor a parameter."""
        views = parameter_views(self._weights, self._layout)
        return [StoredTensor(each.name, "BF16", each.shape, [views[each.name].reshape(-1)]) for each in self._layout]

    def optimizer(self) -> list[StoredTensor]:
        """Remainder and moments, flat over the unit, alignment between parameters included.

        remainder int16 [n]; of each moment, exp_avg and exp_avg_sq, fp32 [n]; or where it is kept in 8 bits its codes,
        uint8 [n], and scales, fp32 [blocks].
        """
        remainder = [slot[:n] for slot, n in self._chunks(TensorClass.REMAINDER)]
        found = [StoredTensor("remainder", "I16", (self.elements,), remainder)]
        moments = [_moments(slot, n) for slot, n in self._chunks(TensorClass.MOMENTS)]
        for moment, name in enumerate(MOMENTS):
            for kind, dtype in _DTYPES.items():
                parts = [chunk[kind][moment] for chunk in moments if kind in chunk]
                if parts:
                    found.append(StoredTensor(name + kind, dtype, (sum(map(len, parts)),), parts))
        return found

    def place(self, piece: Piece) -> None:
        """Write some rows of a parameter, given in any floating dtype, as master weights."""
        high, remainder = self._halves()
        split(piece.values, high[piece.name][piece.rows], remainder[piece.name][piece.rows])

    def master(self) -> dict[str, torch.Tensor]:
        """fp32 master weights by parameter name, as new tensors where the bf16 halves lie."""
        high, remainder = self._halves()
        return {name: join(high[name], remainder[name]).view(high[name].shape) for name in high}

    def _halves(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """bf16 weights and remainders per parameter, as views."""
        # Chunks lie one after the other, and only the last slot is not full.
        first = self._slots[TensorClass.REMAINDER][0]
        return parameter_views(self._weights, self._layout), parameter_views(
            first.as_strided((self.elements,), (1,)), self._layout
        )

    def _chunks(self, tensor: TensorClass) -> list[tuple[torch.Tensor, int]]:
        """Slots of a class, each with the number of the unit's elements in it."""
        slots = self._slots[tensor]
        each = self._slots[TensorClass.REMAINDER][0].numel()
        return [(slot, min(each, self.elements - each * place)) for place, slot in enumerate(slots)]


def _moments(slot: torch.Tensor, n: int) -> dict[str, torch.Tensor]:
    """Views of both moments of `n` elements in a slot, [2, n]; of moments of 8 bits codes [2, n] and scales [2, blocks]."""
    if slot.dtype is not torch.uint8:
        return {"": slot.reshape(-1)[: 2 * n].view(2, n)}
    blocks = -(-n // MOMENT_BLOCK)
    scales = slot[2 * n : 2 * n + 8 * blocks].view(torch.float32).view(2, blocks)
    return {CODES: slot[: 2 * n].view(2, n), SCALES: scales}
