"""State that passes through the GPU in chunks: what each chunk's tasks move."""

from __future__ import annotations

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.operations import LOAD_STATE, OFFLOAD_STATE, UPDATE_GPU
from slideplan.lowering.lower import lower
from strategies import FOOTPRINT

MODEL = tiny_model()
ELEMENTS = 36_992  # of a layer: 144 blocks of 256, and half a block


@pytest.mark.parametrize(
    ("chunks", "parts"),
    [
        (1, [ELEMENTS]),
        (2, [73 * 256, ELEMENTS - 73 * 256]),
        (3, [49 * 256, 49 * 256, ELEMENTS - 2 * 49 * 256]),
        (5, [29 * 256] * 4 + [ELEMENTS - 4 * 29 * 256]),
    ],
)
@pytest.mark.parametrize(("gradient", "gradient_bytes"), [("bf16", 2), ("fp32", 4)])
def test_updates_of_chunks_move_what_an_update_of_the_whole_does(
    chunks: int, parts: list[int], gradient: str, gradient_bytes: int
) -> None:
    policy = tiny_policy(MODEL, stream_state=(2,), state_chunks=chunks, gradient_dtype=gradient)
    graph = lower(MODEL, policy, tiny_workload(), FOOTPRINT)
    moved = {
        operation: [task.bytes_moved for task in graph.tasks if task.operation == operation]
        for operation in (UPDATE_GPU, LOAD_STATE, OFFLOAD_STATE)
    }
    assert moved[UPDATE_GPU] == [(24 + gradient_bytes) * part for part in parts]
    assert sum(moved[UPDATE_GPU]) == (24 + gradient_bytes) * ELEMENTS
    # Copies take whole slots, of as many whole blocks as the first chunk needs: remainder and moments, 10 bytes an element.
    slot_bytes = 10 * 256 * -(-parts[0] // 256)
    assert moved[LOAD_STATE] == moved[OFFLOAD_STATE] == [slot_bytes] * chunks
