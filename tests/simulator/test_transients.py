"""What tasks take of the GPU beside slots where nobody measured it, added up by hand."""

from __future__ import annotations

import msgspec
import pytest

from builders import tiny_machine, tiny_model
from simulator import footprint
from slideplan.policy import ComputeKnobs

MODEL = tiny_model()  # hidden 64, feed-forward 128, vocabulary 256; the largest parameter of a layer has 128 x 64 elements
TOKENS = 2 * 32
SAVED = {"eager": 2576 * TOKENS, "fused": 1048 * TOKENS, "graphed": 1048 * TOKENS}
LOGITS = TOKENS * 256
BACKWARD = {"eager": 8 * (128 + 64) * TOKENS + 2 * 128 * 64, "fused": 2 * 128 * TOKENS}


def knobs(kernels: str) -> ComputeKnobs:
    return ComputeKnobs(
        micro_batch=2, micro_batches=3, gradient_dtype="bf16", kernels=kernels, gradient_norms=False, state="exact"
    )  # type: ignore[arg-type]


def test_eager() -> None:
    found = footprint(MODEL, knobs("eager"), 32, tiny_machine())
    assert found.inner_bytes == SAVED["eager"]
    assert found.workspace_bytes == 0
    assert found.transient_bytes == {
        "layer/forward": 8 * 128 * TOKENS,
        "layer/forward_keep": 6 * 64 * TOKENS,
        "layer/backward": BACKWARD["eager"],
        "layer/backward_recompute": SAVED["eager"] + BACKWARD["eager"],
        "head/loss": 16 * LOGITS + 2 * 256 * 64,
    }


@pytest.mark.parametrize(("kernels", "captured"), [("fused", 0), ("graphed", 3 * (2 * 4 + 1))])
def test_our_kernels(kernels: str, captured: int) -> None:
    at = tiny_machine(gpu=msgspec.structs.replace(tiny_machine().gpu, capture_bytes=1000))
    found = footprint(MODEL, knobs(kernels), 32, at)
    assert found.inner_bytes == SAVED[kernels]
    assert found.workspace_bytes == captured * 1000
    assert found.transient_bytes == {
        "layer/forward": SAVED[kernels] + 2 * 64 * TOKENS,
        "layer/forward_keep": 2 * 128 * TOKENS,
        "layer/backward": BACKWARD["fused"],
        "layer/backward_recompute": SAVED[kernels] + BACKWARD["fused"],
        "head/loss": 2 * LOGITS + 4 * 64 * TOKENS,
    }
