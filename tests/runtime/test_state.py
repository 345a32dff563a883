"""A unit's state is read and written alike wherever its placement has it."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import masters, plan_for, session_for, train
from runtime.inputs.weights import RandomWeights
from runtime.lanes.backend import CpuBackend
from runtime.memory.buffers import Buffers, padding_views
from runtime.session import Session
from runtime.state import UnitState
from slideplan.footprint import Footprint
from slideplan.lowering.lower import lower
from slideplan.model import UnitRole
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
PLACEMENTS = {"fp32": ON_HOST | ON_GPU, "8bit": ON_GPU}


class Memory:
    """Slots of a placement that nothing has been written to, with the state of each unit in them."""

    def __init__(self, knobs: dict, moments: str) -> None:
        policy = tiny_policy(MODEL, **knobs, gpu_moments=moments)
        graph = lower(MODEL, policy, tiny_workload(), Footprint(inner_bytes=1, workspace_bytes=1))
        self.buffers = Buffers(graph, CpuBackend(), policy.gradient_dtype)
        self.of = [UnitState(graph, MODEL, self.buffers, unit) for unit in UNITS]

    def copy(self) -> dict[str, list[torch.Tensor]]:
        return {name: [slot.clone() for slot in slots] for name, slots in self.buffers.slots.items()}


def values(tensor: TensorClass, elements: int, moments: str, seed: int) -> torch.Tensor:
    """Any, in the form in which state is read."""
    generator = torch.Generator().manual_seed(seed)
    if tensor is TensorClass.WEIGHTS:
        return torch.randn(elements, generator=generator).bfloat16()
    if tensor is TensorClass.REMAINDER:
        return torch.randint(-(1 << 15), 1 << 15, (elements,), generator=generator, dtype=torch.int16)
    if moments == "fp32":
        return torch.randn(2, elements, generator=generator)
    codes = torch.randint(0, 256, (2, elements), generator=generator, dtype=torch.uint8)
    scales = torch.rand(2, -(-elements // MOMENT_BLOCK), generator=generator)
    return torch.cat([codes.reshape(-1), scales.reshape(-1).view(torch.uint8)])


@pytest.mark.parametrize("moments", PLACEMENTS)
def test_what_is_written_anywhere_is_read_there_and_can_go_anywhere_else(moments: str) -> None:
    memories = {name: Memory(knobs, moments) for name, knobs in PLACEMENTS[moments].items()}
    for seed, (source, target) in enumerate(permutations(memories, 2)):
        expected = {}
        for unit in UNITS:
            state = memories[source].of[unit]
            assert state.elements == MODEL.flat_elements(MODEL.role(unit))
            for tensor in CLASSES:
                expected[unit, tensor] = values(tensor, state.elements, moments, 100 * seed + unit)
                state.write(tensor, expected[unit, tensor])
        before = memories[source].copy()
        for (unit, tensor), written in expected.items():  # after all are written: no unit lies in the slots of another
            read = memories[source].of[unit].read(tensor)
            assert read.dtype is written.dtype
            assert torch.equal(read, written), (source, unit, tensor)
            memories[target].of[unit].write(tensor, read)
            read.zero_()  # a copy, whatever becomes of it
        for (unit, tensor), written in expected.items():
            assert torch.equal(memories[target].of[unit].read(tensor), written), (source, target, unit, tensor)
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
        for tensor in (TensorClass.WEIGHTS, TensorClass.REMAINDER):
            assert not any(padding.any() for padding in padding_views(state.read(tensor), layout))
        # The halves are read as they are placed: joined again they are the master.
        flat = {each: state.read(each) for each in (TensorClass.WEIGHTS, TensorClass.REMAINDER)}
        other = Memory(ON_HOST["on the host"], "fp32").of[unit]
        for tensor, whole in flat.items():
            other.write(tensor, whole)
        assert all(torch.equal(value, expected[each]) for each, value in other.master().items())


def session_of(knobs: dict, moments: str) -> Session:
    backend = CpuBackend()
    policy = tiny_policy(MODEL, **knobs, gpu_moments=moments, kernels="fused")
    return session_for(plan_for(MODEL, policy, tiny_workload(), backend), backend)


@pytest.mark.parametrize(
    ("source", "target", "moments"),
    [
        ("on the host", "passing in three chunks", "fp32"),
        ("passing in ten chunks", "on the host, weights on the GPU", "fp32"),
        ("passing in three chunks", "on the GPU", "fp32"),
        ("on the GPU", "passing in three chunks", "8bit"),
        ("passing in ten chunks", "passing in one chunk", "8bit"),
    ],
)
def test_training_goes_on_under_another_placement_bit_for_bit(source: str, target: str, moments: str) -> None:
    """Moments of 8 bits are rounded by an element's place in its chunk: then weights agree for the next update alone."""
    exact = moments == "fp32"
    first, second = (session_of(PLACEMENTS[moments][name], moments) for name in (source, target))
    train(first, 2)
    for unit in UNITS:
        for tensor in CLASSES:
            second.state(unit).write(tensor, first.state(unit).read(tensor))
    second._steps_done = first._steps_done
    assert all(torch.equal(masters(second)[name], value) for name, value in masters(first).items())
    steps = 2 if exact else 1
    losses, weights = train(first, steps)
    assert train(second, steps)[0] == losses
    assert all(torch.equal(masters(second)[name], value) for name, value in weights.items())
    for unit in UNITS:
        for tensor in CLASSES:
            read = second.state(unit).read(tensor)
            assert read.any(), (unit, tensor)
            if exact or tensor is not TensorClass.MOMENTS:
                assert torch.equal(read, first.state(unit).read(tensor)), (unit, tensor)


# -- refusals ----------------------------------------------------------------------------------


ELEMENTS = MODEL.flat_elements(UnitRole.LAYER)


@pytest.mark.parametrize("placement", ["on the GPU", "passing in three chunks"])
@pytest.mark.parametrize(
    ("tensor", "wrong", "message"),
    [
        (TensorClass.WEIGHTS, torch.zeros(ELEMENTS), "weights of a unit: torch.float32"),
        (TensorClass.WEIGHTS, torch.zeros(ELEMENTS - 1, dtype=torch.bfloat16), "weights of a unit: torch.bfloat16"),
        (TensorClass.REMAINDER, torch.zeros(ELEMENTS, dtype=torch.int32), "master_remainder of a unit: torch.int32"),
        (TensorClass.REMAINDER, torch.zeros(ELEMENTS - 1, dtype=torch.int16), "master_remainder of a unit: torch.int16"),
        (TensorClass.REMAINDER, torch.zeros(ELEMENTS + 1, dtype=torch.int16), "master_remainder of a unit: torch.int16"),
        (TensorClass.MOMENTS, torch.zeros(2, ELEMENTS, dtype=torch.float64), "moments of a unit: torch.float64"),
        (TensorClass.MOMENTS, torch.zeros(2, ELEMENTS - 1), "moments of a unit: torch.float32"),
        (TensorClass.MOMENTS, torch.zeros(2, ELEMENTS + 1), "moments of a unit: torch.float32"),
        (TensorClass.MOMENTS, torch.zeros(2 * ELEMENTS), "moments of a unit: torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(placement: str, tensor: TensorClass, wrong: torch.Tensor, message: str) -> None:
    state = Memory(ON_GPU[placement], "fp32").of[1]
    with pytest.raises(ValueError, match=f"^{message}"):
        state.write(tensor, wrong)


@pytest.mark.parametrize("placement", ["on the GPU", "passing in three chunks"])
def test_moments_of_another_format_are_refused(placement: str) -> None:
    exact, lossy = (Memory(ON_GPU[placement], moments).of[1] for moments in ("fp32", "8bit"))
    with pytest.raises(ValueError, match=r"^moments of a unit: torch\.uint8 .* does not go where torch\.float32"):
        exact.write(TensorClass.MOMENTS, lossy.read(TensorClass.MOMENTS))
    with pytest.raises(ValueError, match=r"^moments of a unit: torch\.float32 .* does not go where torch\.uint8"):
        lossy.write(TensorClass.MOMENTS, exact.read(TensorClass.MOMENTS))
    for size in (-1, 1):
        wrong = torch.zeros(lossy.read(TensorClass.MOMENTS).numel() + size, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"^moments of a unit: "):
            lossy.write(TensorClass.MOMENTS, wrong)
