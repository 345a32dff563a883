"""A unit's state is read and written alike wherever its placement has it."""

from __future__ import annotations

import tempfile
from itertools import permutations
from pathlib import Path

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import bytes_of
from runtime.inputs.weights import RandomWeights
from runtime.lanes.backend import CpuBackend
from runtime.memory.buffers import Buffers, padding_views
from runtime.memory.drive import Drive
from runtime.state import StoredTensor, UnitState
from runtime.storage.disk import Disk
from slideplan.footprint import Footprint
from slideplan.lowering.lower import lower
from slideplan.placement import STATE, TensorClass
from slideplan.policy import MOMENT_BLOCK

MODEL = tiny_model()
LAYERS = tuple(range(1, MODEL.head_unit))
UNITS = tuple(range(MODEL.units))
CLASSES = (TensorClass.WEIGHTS, *STATE)
ON_HOST = {
    "on the host": {},
    "on the host, weights on the GPU": {"resident_weights": LAYERS},
}
# Updated by the GPU: layers of 144 blocks and a half, which three and ten chunks do not divide.
ON_GPU = {
    "on the GPU": {"resident_state": UNITS},
    "passing in one chunk": {"stream_state": LAYERS, "resident_state": (0, 5), "state_chunks": 1, "state_slots": 1},
    "passing in three chunks": {"stream_state": LAYERS, "resident_state": (0, 5), "state_chunks": 3},
    "passing in ten chunks": {"stream_state": LAYERS, "resident_state": (0, 5), "state_chunks": 10, "state_slots": 4},
}
# Chunks of 2048 elements and more, in whole pages; the last ones are not full.
ON_SSD = {
    "on the SSD": {"ssd_state": UNITS},
    "on the SSD in one chunk": {"ssd_state": UNITS, "ssd_chunks": 1},
    "moments on the SSD": {"ssd_moments": UNITS},
    "some of both": {"ssd_state": (0, 2, 5), "ssd_moments": (1, 3), "ssd_chunks": 10},
}
PLACEMENTS = {"fp32": ON_HOST | ON_GPU | ON_SSD, "8bit": ON_GPU}
DTYPES = {"BF16": torch.bfloat16, "I16": torch.int16, "F32": torch.float32, "U8": torch.uint8}


class Memory:
    """Slots of a placement that nothing has been written to, with the state of each unit in them."""

    def __init__(self, knobs: dict, moments: str) -> None:
        policy = tiny_policy(MODEL, **knobs, gpu_moments=moments)
        graph = lower(MODEL, policy, tiny_workload(), Footprint(inner_bytes=1, workspace_bytes=1))
        drive = Drive.for_graph(Disk(), [Path(tempfile.gettempdir())], graph)
        self.buffers = Buffers(graph, CpuBackend(), policy.gradient_dtype, drive=drive)
        self.of = [UnitState(graph, MODEL, self.buffers, unit) for unit in UNITS]

    def copy(self) -> dict[str, list[torch.Tensor]]:
        return {name: [slot.clone() for slot in slots] for name, slots in self.buffers.slots.items()}


def stored(state: UnitState, tensor: TensorClass) -> list[StoredTensor]:
    if tensor is TensorClass.WEIGHTS:
        return state.weights()
    is_remainder = tensor is TensorClass.REMAINDER
    return [each for each in state.optimizer() if (each.name == "remainder") is is_remainder]


def read(state: UnitState, tensor: TensorClass) -> torch.Tensor:
    """A copy of what is stored, flat: of moments one after the other, in 8 bits as bytes."""
    tensors = stored(state, tensor)
    content = torch.cat([bytes_of(part) for each in tensors for part in each.parts])
    (dtype, *others) = {DTYPES[each.dtype] for each in tensors}
    return content if others else content.view(dtype)


def write(state: UnitState, tensor: TensorClass, values: torch.Tensor) -> None:
    done, content = 0, values.view(torch.uint8)
    for each in stored(state, tensor):
        for part in each.parts:
            size = part.nbytes
            part.write(0, content[done : done + size])
            done += size
    assert done == len(content)


def elements_of(unit: int, tensor: TensorClass) -> int:
    """Weights are stored without what aligns them."""
    role = MODEL.role(unit)
    return MODEL.unit_parameter_count(role) if tensor is TensorClass.WEIGHTS else MODEL.flat_elements(role)


def values(tensor: TensorClass, elements: int, moments: str, seed: int) -> torch.Tensor:
    """Any, in the form in which state is read."""
    generator = torch.Generator().manual_seed(seed)
    if tensor is TensorClass.WEIGHTS:
        return torch.randn(elements, generator=generator).bfloat16()
    if tensor is TensorClass.REMAINDER:
        return torch.randint(-(1 << 15), 1 << 15, (elements,), generator=generator, dtype=torch.int16)
    if moments == "fp32":
        return torch.randn(2 * elements, generator=generator)
    codes = torch.randint(0, 256, (2, elements), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, -(-elements // MOMENT_BLOCK), generator=generator).view(torch.uint8)
    return torch.cat([codes[0], scales[0], codes[1], scales[1]])


@pytest.mark.parametrize("moments", PLACEMENTS)
def test_what_is_written_anywhere_is_read_there_and_can_go_anywhere_else(moments: str) -> None:
    memories = {name: Memory(knobs, moments) for name, knobs in PLACEMENTS[moments].items()}
    for seed, (source, target) in enumerate(permutations(memories, 2)):
        expected = {}
        for unit in UNITS:
            state = memories[source].of[unit]
            assert state.elements == MODEL.flat_elements(MODEL.role(unit))
            for tensor in CLASSES:
                expected[unit, tensor] = values(tensor, elements_of(unit, tensor), moments, 100 * seed + unit)
                write(state, tensor, expected[unit, tensor])
        before = memories[source].copy()
        for (unit, tensor), written in expected.items():  # after all are written: no unit lies in the slots of another
            found = read(memories[source].of[unit], tensor)
            assert found.dtype is written.dtype
            assert torch.equal(found, written), (source, unit, tensor)
            write(memories[target].of[unit], tensor, found)
        for (unit, tensor), written in expected.items():
            assert torch.equal(read(memories[target].of[unit], tensor), written), (source, target, unit, tensor)
        for name, slots in memories[source].copy().items():
            assert all(map(torch.equal, slots, before[name])), (source, name)


@pytest.mark.parametrize("name", PLACEMENTS["fp32"])
def test_master_weights_are_placed_and_found_by_parameter(name: str) -> None:
    """Piece by piece, across chunks and across placements; what belongs to no parameter is left alone."""
    memory, source = Memory(PLACEMENTS["fp32"][name], "fp32"), RandomWeights(MODEL, seed=3, device=torch.device("cpu"))
    for unit in UNITS:
        state, layout = memory.of[unit], MODEL.parameters(MODEL.role(unit))
        expected = {parameter.name: torch.zeros(parameter.shape) for parameter in layout}
        for piece in source.pieces(unit):
            expected[piece.name][piece.rows] = piece.values
            state.place(piece)
        found = state.master()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[each], value) for each, value in expected.items())
        assert not any(padding.any() for padding in padding_views(read(state, TensorClass.REMAINDER), layout))
        # The halves are read as they are placed: joined again they are the master.
        flat = {each: read(state, each) for each in (TensorClass.WEIGHTS, TensorClass.REMAINDER)}
        other = Memory(ON_HOST["on the host"], "fp32").of[unit]
        for tensor, whole in flat.items():
            write(other, tensor, whole)
        assert all(torch.equal(value, expected[each]) for each, value in other.master().items())
