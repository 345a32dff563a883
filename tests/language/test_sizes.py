"""Bytes of tensors, in numbers: what a wrong factor would change everywhere at once, and so nowhere show."""

from __future__ import annotations

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.footprint import Footprint
from slideplan.lowering.lower import lower
from slideplan.lowering.sizes import (
    MASTER_BYTES,
    TRAINING_BYTES,
    UPDATE_STATE_TRAFFIC_BYTES,
    Sizes,
    loss_chunk_tokens,
    moment_bytes,
    state_bytes,
    update_bytes,
)
from slideplan.model import UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.policy import chunk_elements
from slideplan.quantities import MIB


def test_twelve_bytes_a_parameter_of_exact_state() -> None:
    assert TRAINING_BYTES == 12
    assert MASTER_BYTES == {"split": 4, "fp32": 4, "bf16": 2}
    assert state_bytes(1000, "exact") == 10_000  # remainder 2, moments 8; the weights' 2 are not in it


def test_lossy_state_takes_eight_or_four_bytes_a_parameter_with_its_weights() -> None:
    assert 2 * 1024 + state_bytes(1024, "bf16-moments") == 8 * 1024
    assert 2 * 1024 + state_bytes(1024, "lean") == 4 * 1024 + 2 * 4 * 4  # and two scales for each of four blocks


def test_moments_of_8_bits_have_two_scales_a_block() -> None:
    assert moment_bytes(512, "fp32") == 8 * 512
    assert moment_bytes(512, "8bit") == 2 * 512 + 2 * 8
    assert moment_bytes(513, "8bit") == 2 * 513 + 3 * 8


@pytest.mark.parametrize(
    ("master", "gradient", "expected"),
    [("split", "bf16", 26), ("split", "fp32", 28), ("fp32", "bf16", 26), ("bf16", "fp32", 24), ("bf16", "bf16", 22)],
)
def test_an_update_reads_and_writes_state_and_reads_the_gradient(master: str, gradient: str, expected: int) -> None:
    assert update_bytes(100, master, "exact", gradient) == 100 * expected  # type: ignore[arg-type]
    assert UPDATE_STATE_TRAFFIC_BYTES == 24


def test_lossy_state_is_read_and_written_as_it_is_kept() -> None:
    assert update_bytes(256, "split", "lean", "bf16") == 2 * (2 * 256 + 2 * 256 + 8) + 2 * 256
    assert update_bytes(256, "split", "bf16-moments", "bf16") == (2 * 8 + 2) * 256


@pytest.mark.parametrize(("kernels", "tokens"), [("eager", 256 * MIB // 4000), ("fused", 512 * MIB // 2000)])
def test_logits_of_a_chunk_stay_within_their_bytes(kernels: str, tokens: int) -> None:
    assert loss_chunk_tokens(1000, kernels) == tokens  # type: ignore[arg-type]
    assert loss_chunk_tokens(10**10, kernels) == 1  # type: ignore[arg-type]


def test_sizes_of_a_units_tensors() -> None:
    model = tiny_model()
    policy = tiny_policy(model, gradient_dtype="fp32", state="lean")  # micro-batches of 2 x 32 tokens
    sizes = Sizes(model, policy, 32, Footprint(inner_bytes=10**6, workspace_bytes=0))
    assert sizes.elements[UnitRole.LAYER] == 36_992
    of_layer = {tensor: sizes.of(tensor, 256) for tensor in (TensorClass.WEIGHTS, TensorClass.REMAINDER, TensorClass.GRADIENT)}
    assert list(of_layer.values()) == [512, 0, 1024]
    assert sizes.of(TensorClass.MOMENTS, 256) == 2 * 256 + 8
    assert sizes.of(TensorClass.BOUNDARY, 1) == 2 * 64 * 64
    assert sizes.of(TensorClass.FEED_FORWARD, 1) == 2 * 2 * 64 * 128  # gate and up
    with pytest.raises(ValueError, match="workspace has no size of its own"):
        sizes.of(TensorClass.WORKSPACE, 1)
    assert sizes.held_bytes(None, None) == 0
    assert sizes.held_bytes(Tier.GPU, Tier.GPU) == 10**6
    assert sizes.held_bytes(Tier.GPU, Tier.HOST) == 10**6 - 2 * 2 * 64 * 128


def test_what_belongs_to_no_unit_takes_a_few_bytes() -> None:
    """The counter that a step's first load waits for, and the norm of gradients."""
    model = tiny_model()
    nothing = Footprint(inner_bytes=1, workspace_bytes=1)
    plain = lower(model, tiny_policy(model), tiny_workload(), nothing).pool
    for knobs, name, size in (({"step_barrier": True}, "host.barrier", 8), ({"gradient_norms": True}, "gpu.norm", 4 * 6)):
        pool = lower(model, tiny_policy(model, **knobs), tiny_workload(), nothing).pool[name]
        assert (pool.slot_bytes, pool.count) == (size, 1)
        assert name not in plain


def test_chunks_are_of_whole_blocks() -> None:
    assert chunk_elements(36_992, 1) == 37_120  # 145 blocks of 256
    assert chunk_elements(36_992, 3) == 49 * 256
    assert chunk_elements(512, 2) == 256
