"""A unit's master weights and moments as one object, wherever its placement has them."""

from __future__ import annotations

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


class UnitState:
    """Weights, remainder and moments of one unit between two steps. Nothing may be running while it is read or written.

    What is read is the same for every placement, and what is written may come from any other.
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

    def read(self, tensor: TensorClass) -> torch.Tensor:
        """A copy in CPU memory, the same whatever the placement.

        Weights bf16 [n], remainder int16 [n], moments fp32 [2, n]. Moments of 8 bits are uint8: codes of both [2, n], then
        fp32 scales of both [2, blocks], flat.
        """
        if tensor is TensorClass.WEIGHTS:
            return self._weights.cpu().clone()
        parts = [[part.cpu() for part in _parts(slot, n)] for slot, n in self._chunks(tensor)]
        whole = [torch.cat(pieces, dim=-1) for pieces in zip(*parts, strict=True)]
        if len(whole) == 1:
            return whole[0]
        return torch.cat([part.reshape(-1).view(torch.uint8) for part in whole])

    def write(self, tensor: TensorClass, values: torch.Tensor) -> None:
        """Put back what `read` gave. Raises ValueError where shape or dtype differ; nothing is written then."""
        if tensor is TensorClass.WEIGHTS:
            _check(values, self._weights.dtype, (self.elements,), tensor)
            self._weights.copy_(values)
            return
        chunks = self._chunks(tensor)
        dtype, blocks = chunks[0][0].dtype, -(-self.elements // MOMENT_BLOCK)
        shapes = {torch.int16: (self.elements,), torch.uint8: (2 * self.elements + 8 * blocks,)}
        _check(values, dtype, shapes.get(dtype, (2, self.elements)), tensor)
        whole = _parts(values, self.elements)
        first = [0] * len(whole)
        for slot, n in chunks:
            for place, part in enumerate(_parts(slot, n)):
                size = part.shape[-1]
                part.copy_(whole[place][..., first[place] : first[place] + size])
                first[place] += size

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


def _parts(slot: torch.Tensor, n: int) -> list[torch.Tensor]:
    """Views of what a slot holds for `n` elements, along the last dimension; moments of 8 bits have codes and scales."""
    if slot.dtype is torch.int16:
        return [slot[:n]]
    if slot.dtype is not torch.uint8:
        return [slot.reshape(-1)[: 2 * n].view(2, n)]
    blocks = -(-n // MOMENT_BLOCK)
    scales = slot[2 * n : 2 * n + 8 * blocks].view(torch.float32).view(2, blocks)
    return [slot[: 2 * n].view(2, n), scales]


def _check(values: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], tensor: TensorClass) -> None:
    if tuple(values.shape) != shape or values.dtype is not dtype:
        raise ValueError(
            f"{tensor} of a unit: {values.dtype} {list(values.shape)} does not go where {dtype} {list(shape)} lies"
        )
