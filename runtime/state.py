"""A unit's master weights and moments as one object, wherever its placement has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from msgspec import UNSET

from runtime.inputs.weights import Piece
from runtime.memory.buffers import Buffers, Slot, parameter_views
from runtime.memory.parts import MemoryPart, Part
from runtime.optimizer.split_master import join, split
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import COPIED_AS, Role, TaskGraph
from slideplan.lowering.sizes import REMAINDER_BYTES
from slideplan.model import ModelSpec
from slideplan.placement import STATE, TensorClass
from slideplan.policy import MOMENT_BLOCK, Policy, passage

# Stored names of both moments; where a moment is kept in 8 bits, what the names of its two tensors end with.
MOMENTS, CODES, SCALES = ("exp_avg", "exp_avg_sq"), ".codes", ".scales"
REMAINDER = "remainder"
# By that ending and dtype, bytes of an element.
_ELEMENT_BYTES = {("", "F32"): 4, ("", "BF16"): 2, (CODES, "U8"): 1, (SCALES, "F32"): 4}


class StoredTensor(NamedTuple):
    """A tensor of a unit as checkpoints store it. dtype: in safetensors' words.

    parts: of the slots that hold it. One after the other they are its elements; what is written there is its new value.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Sequence[Part]


class UnitState:
    """Weights, remainder and moments of one unit between two steps. Nothing may be running while it is read or written.

    Its stored tensors are the same for every placement; only how the moments are kept may differ.
    """

    def __init__(self, graph: TaskGraph, model: ModelSpec, policy: Policy, buffers: Buffers, unit: int) -> None:
        self._buffers = buffers
        self._layout = model.parameters(model.role(unit))
        update = next(task for task in graph.tasks if task.kind is TaskKind.UPDATE and task.unit == unit)
        tier = update.operation.target
        self._weights = buffers[update.slot(Role.WEIGHTS, tier)]
        self._chunk_elements = passage(policy, tier).chunk_elements(model)
        self._slots = {tensor: [update.slot(COPIED_AS[tensor], tier)] for tensor in STATE if update.has(COPIED_AS[tensor])}
        # State that passes through the tier that updates it lies where its copies come from, chunk by chunk.
        loads = [
            task for task in graph.tasks if task.kind is TaskKind.COPY and task.unit == unit and task.operation.target is tier
        ]
        for tensor in self._slots:
            chunks = [task for task in loads if tensor in task.operation.tensors and task.chunk is not UNSET]
            if chunks:
                self._slots[tensor] = [task.slot(COPIED_AS[tensor], task.operation.source) for task in chunks]

    @property
    def elements(self) -> int:
        """Of each of its tensors, alignment between parameters included."""
        return self._weights.numel()

    def weights(self) -> list[StoredTensor]:
        """bf16 weights, one tensor a parameter."""
        views = parameter_views(self._weights, self._layout)
        return [StoredTensor(each.name, "BF16", each.shape, [MemoryPart(views[each.name])]) for each in self._layout]

    def optimizer(self) -> list[StoredTensor]:
        """Remainder and moments, flat over the unit, alignment between parameters included.

        remainder int16 [n], of all but lean state; of each moment, exp_avg and exp_avg_sq, fp32 or bf16 [n]; or where it is
        kept in 8 bits its codes, uint8 [n], and scales, fp32 [blocks].
        """
        found = [StoredTensor(REMAINDER, "I16", (self.elements,), self._remainder())] if self._has_remainder else []
        moments = [self._moments(slot, n) for slot, n in self._chunks(TensorClass.MOMENTS)]
        for moment, name in enumerate(MOMENTS):
            for (ending, dtype), element_bytes in _ELEMENT_BYTES.items():
                parts = [chunk[ending, dtype][moment] for chunk in moments if (ending, dtype) in chunk]
                if parts:
                    elements = sum(part.nbytes for part in parts) // element_bytes
                    found.append(StoredTensor(name + ending, dtype, (elements,), parts))
        return found

    def place(self, piece: Piece) -> None:
        """Write some rows of a parameter, given in any floating dtype, as master weights; lean ones round to the nearest."""
        high = parameter_views(self._weights, self._layout)[piece.name][piece.rows]
        remainder = torch.empty(high.shape, dtype=torch.int16, device=piece.values.device)
        split(piece.values, high, remainder)
        if not self._has_remainder:
            return
        parameter = next(each for each in self._layout if each.name == piece.name)
        first = REMAINDER_BYTES * (parameter.offset + piece.rows.start * prod(parameter.shape[1:]))
        for part, start in _placed(self._remainder()):
            _write(part, start, first, remainder.view(-1).view(torch.uint8))

    def master(self) -> dict[str, torch.Tensor]:
        """fp32 master weights by parameter name, as new tensors where the bf16 halves lie."""
        low = torch.zeros(self.elements, dtype=torch.int16)
        for part, start in _placed(self._remainder()):
            part.read(0, low.view(torch.uint8)[start : start + part.nbytes])
        high, remainder = (parameter_views(flat, self._layout) for flat in (self._weights, low))
        return {name: join(high[name], remainder[name]).view(high[name].shape) for name in high}

    @property
    def _has_remainder(self) -> bool:
        return TensorClass.REMAINDER in self._slots

    def _remainder(self) -> list[Part]:
        chunks = self._chunks(TensorClass.REMAINDER) if self._has_remainder else []
        return [self._buffers.part(slot, 0, REMAINDER_BYTES * n) for slot, n in chunks]

    def _moments(self, slot: Slot, n: int) -> dict[tuple[str, str], list[Part]]:
        """Both moments of `n` elements in a slot; of moments of 8 bits both moments' codes and both moments' scales."""
        part, blocks = self._buffers.part, -(-n // MOMENT_BLOCK)
        match self._buffers.pool(slot).tensor_class:
            case TensorClass.MOMENTS:
                return {("", "F32"): [part(slot, 4 * n * moment, 4 * n) for moment in range(2)]}
            case TensorClass.MOMENTS_BF16:
                return {("", "BF16"): [part(slot, 2 * n * moment, 2 * n) for moment in range(2)]}
        return {
            (CODES, "U8"): [part(slot, n * moment, n) for moment in range(2)],
            (SCALES, "F32"): [part(slot, 2 * n + 4 * blocks * moment, 4 * blocks) for moment in range(2)],
        }

    def _chunks(self, tensor: TensorClass) -> list[tuple[Slot, int]]:
        """Slots of a class, each with the number of the unit's elements in it."""
        slots = self._slots[tensor]
        each = self.elements if len(slots) == 1 else self._chunk_elements
        return [(slot, min(each, self.elements - each * place)) for place, slot in enumerate(slots)]


def _placed(parts: Sequence[Part]) -> Iterator[tuple[Part, int]]:
    """Parts, each with where it begins among all of them."""
    start = 0
    for part in parts:
        yield part, start
        start += part.nbytes


def _write(part: Part, start: int, first: int, values: torch.Tensor) -> None:
    """Write what a part that begins at `start` has of values that begin at `first`."""
    low, high = max(start, first), min(start + part.nbytes, first + len(values))
    if low < high:
        part.write(low - start, values[low - first : high - first])
