"""A unit's master weights and moments as one object, wherever its placement has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch

from runtime.inputs.weights import Piece
from runtime.memory.buffers import Buffers, Slot, parameter_views, state_elements
from runtime.memory.parts import Part
from runtime.optimizer.split_master import join, split
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import COPIED_AS, TaskGraph
from slideplan.lowering.sizes import REMAINDER_BYTES, WEIGHT_BYTES
from slideplan.model import ModelSpec, Parameter
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.policy import MOMENT_BLOCK

# From which tier tensors come to another that they pass through.
_BEYOND = {Tier.GPU: Tier.HOST, Tier.HOST: Tier.SSD}
# Stored names of both moments; where a moment is kept in 8 bits, what the names of its two tensors end with.
MOMENTS, CODES, SCALES = ("exp_avg", "exp_avg_sq"), ".codes", ".scales"
# By that ending: dtype, and bytes of an element.
_DTYPES = {"": ("F32", 4), CODES: ("U8", 1), SCALES: ("F32", 4)}


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

    def __init__(self, graph: TaskGraph, model: ModelSpec, buffers: Buffers, unit: int) -> None:
        self._buffers = buffers
        self._layout = model.parameters(model.role(unit))
        # Of each of its tensors, alignment between parameters included.
        self.elements = model.flat_elements(model.role(unit))
        update = next(task for task in graph.tasks if task.kind is TaskKind.UPDATE and task.unit == unit)
        copies = [task for task in graph.tasks if task.kind is TaskKind.COPY and task.unit == unit]
        self._slots: dict[TensorClass, list[Slot]] = {}
        self._passes_by: dict[TensorClass, Slot] = {}  # what its update uses
        for tensor in (TensorClass.WEIGHTS, *STATE):
            # What passes through the tier that updates it lies where its copies come from, state chunk by chunk.
            role, tier = COPIED_AS[tensor], update.operation.target
            slots = [here := update.slot(role, tier)]
            while tier in _BEYOND:
                way = _BEYOND[tier], tier
                came = [
                    task
                    for task in copies
                    if tensor in task.operation.tensors and (task.operation.source, task.operation.target) == way
                ]
                if not came:
                    break
                tier = _BEYOND[tier]
                slots = list(dict.fromkeys(task.slot(role, tier) for task in came))
            self._slots[tensor] = slots
            self._passes_by[tensor] = here

    def weights(self) -> list[StoredTensor]:
        """bf16 weights, one tensor a parameter."""
        return [StoredTensor(each.name, "BF16", each.shape, [self._parameter(each)]) for each in self._layout]

    def optimizer(self) -> list[StoredTensor]:
        """Remainder and moments, flat over the unit, alignment between parameters included.

        remainder int16 [n]; of each moment, exp_avg and exp_avg_sq, fp32 [n]; or where it is kept in 8 bits its codes,
        uint8 [n], and scales, fp32 [blocks].
        """
        found = [StoredTensor("remainder", "I16", (self.elements,), self._remainder())]
        moments = [self._moments(slot, n) for slot, n in self._chunks(TensorClass.MOMENTS)]
        for moment, name in enumerate(MOMENTS):
            for kind, (dtype, element_bytes) in _DTYPES.items():
                parts = [chunk[kind][moment] for chunk in moments if kind in chunk]
                if parts:
                    elements = sum(part.nbytes for part in parts) // element_bytes
                    found.append(StoredTensor(name + kind, dtype, (elements,), parts))
        return found

    def place(self, piece: Piece) -> None:
        """Write some rows of a parameter, given in any floating dtype, as master weights."""
        high, remainder = (torch.empty_like(piece.values, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
        split(piece.values, high, remainder)
        parameter = next(each for each in self._layout if each.name == piece.name)
        before = piece.rows.start * prod(parameter.shape[1:])
        self._parameter(parameter).write(WEIGHT_BYTES * before, high.view(-1).view(torch.uint8))
        first = REMAINDER_BYTES * (parameter.offset + before)
        for part, start in _placed(self._remainder()):
            _write(part, start, first, remainder.view(-1).view(torch.uint8))

    def master(self) -> dict[str, torch.Tensor]:
        """fp32 master weights by parameter name, as new tensors on the host."""
        low, high = (torch.empty(self.elements, dtype=dtype) for dtype in (torch.int16, torch.bfloat16))
        for part, start in _placed(self._remainder()):
            part.read(0, low.view(torch.uint8)[start : start + part.nbytes])
        remainder, weights = (parameter_views(flat, self._layout) for flat in (low, high))
        for parameter in self._layout:
            self._parameter(parameter).read(0, weights[parameter.name].view(-1).view(torch.uint8))
        return {name: join(weights[name], remainder[name]).view(weights[name].shape) for name in weights}

    def _parameter(self, parameter: Parameter) -> Part:
        """Weights of a parameter."""
        (slot,) = self._slots[TensorClass.WEIGHTS]
        return self._buffers.part(slot, WEIGHT_BYTES * parameter.offset, WEIGHT_BYTES * parameter.elements)

    def _remainder(self) -> list[Part]:
        return [self._buffers.part(slot, 0, REMAINDER_BYTES * n) for slot, n in self._chunks(TensorClass.REMAINDER)]

    def _moments(self, slot: Slot, n: int) -> dict[str, list[Part]]:
        """Both moments of `n` elements in a slot; of moments of 8 bits both moments' codes and both moments' scales."""
        part, blocks = self._buffers.part, -(-n // MOMENT_BLOCK)
        if self._buffers.pool(slot).tensor_class is TensorClass.MOMENTS:
            return {"": [part(slot, 4 * n * moment, 4 * n) for moment in range(2)]}
        return {
            CODES: [part(slot, n * moment, n) for moment in range(2)],
            SCALES: [part(slot, 2 * n + 4 * blocks * moment, 4 * blocks) for moment in range(2)],
        }

    def _chunks(self, tensor: TensorClass) -> list[tuple[Slot, int]]:
        """Slots of a class, each with the number of the unit's elements in it."""
        slots = self._slots[tensor]
        each = self.elements if len(slots) == 1 else state_elements(self._buffers.pool(self._passes_by[tensor]))
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
