"""Derived times, added up by hand: at 10^9 FLOP/s and 10^9 bytes/s a nanosecond is a FLOP or a byte."""

from __future__ import annotations

import pytest

from builders import flat_curve, tiny_model
from simulator.formulas import attention_ns, compute_ns, gradient_bytes, square_sum_ns
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import Efficiency
from slideplan.model import UnitRole
from slideplan.policy import ComputeKnobs

MODEL = tiny_model()  # hidden 64, q 64, kv 32, feed-forward 128, vocabulary 256
UNIT_RATES = Efficiency(gemm=flat_curve(10**9), attention_flops_per_s=10**9, elementwise_bytes_per_s=10**9)
SEQ_LEN = 8
FORWARD, BACKWARD, AGAIN = TaskKind.FORWARD, TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE
ATTENTION = 2 * 8 * 9 * 64  # 2 products, 2 FLOPs each, 8 queries, 4.5 keys each on average, 64 wide
GRADIENT = 2 * 36_992  # bf16, of a layer's flat buffer


def knobs(kernels: str, dtype: str = "bf16") -> ComputeKnobs:
    return ComputeKnobs(
        micro_batch=1, micro_batches=2, gradient_dtype=dtype, kernels=kernels, gradient_norms=False, state="exact"
    )  # type: ignore[arg-type]


def ns(role: UnitRole, kind: TaskKind, kernels: str = "fused", accumulate: bool = False) -> int:
    return compute_ns(MODEL, role, kind, knobs(kernels), SEQ_LEN, accumulate, UNIT_RATES)


class TestLayer:
    PRODUCTS = 2 * 8 * 64 * (64 + 32 + 32 + 64 + 3 * 128)  # q, k, v, o and the feed-forward's three
    LAST = 2 * 8 * 64 * 128
    FUSED = 8 * (12 * 64 + 4 * (64 + 32) + 6 * 128)
    FUSED_BACKWARD = 8 * (24 * 64 + 4 * (64 + 32) + 12 * 128)
    SAVED = 8 * 2576  # eager, see below

    @pytest.mark.parametrize("kind", [FORWARD, TaskKind.FORWARD_KEEP])
    def test_forward(self, kind: TaskKind) -> None:
        assert ns(UnitRole.LAYER, kind) == self.PRODUCTS + self.FUSED + ATTENTION
        assert ns(UnitRole.LAYER, kind, "graphed") == self.PRODUCTS + self.FUSED + ATTENTION
        assert ns(UnitRole.LAYER, kind, "eager") == self.PRODUCTS + self.SAVED * 5 // 2 + ATTENTION

    @pytest.mark.parametrize(("accumulate", "written"), [(False, GRADIENT), (True, 2 * GRADIENT)])
    def test_backward_has_two_products_for_each_of_forwards_and_writes_gradients(self, accumulate: bool, written: int) -> None:
        attention = ATTENTION * 5 // 2
        fused = 2 * self.PRODUCTS + self.FUSED_BACKWARD + attention + written
        assert ns(UnitRole.LAYER, BACKWARD, accumulate=accumulate) == fused
        eager = 2 * self.PRODUCTS + 5 * self.SAVED + attention + written
        assert ns(UnitRole.LAYER, BACKWARD, "eager", accumulate) == eager

    def test_recompute_is_forward_once_more_without_the_last_product_where_kernels_are_ours(self) -> None:
        fused = self.PRODUCTS + self.FUSED + ATTENTION - self.LAST - 8 * 6 * 128
        assert ns(UnitRole.LAYER, AGAIN) - ns(UnitRole.LAYER, BACKWARD) == fused
        eager = self.PRODUCTS + self.SAVED * 5 // 2 + ATTENTION
        assert ns(UnitRole.LAYER, AGAIN, "eager") - ns(UnitRole.LAYER, BACKWARD, "eager") == eager


class TestEnds:
    def test_the_embedding_moves_rows(self) -> None:
        assert ns(UnitRole.EMBEDDING, FORWARD) == 4 * 8 * 64
        assert ns(UnitRole.EMBEDDING, BACKWARD) == 6 * 8 * 64 + 2 * 256 * 64  # and zeroes its gradient once
        assert ns(UnitRole.EMBEDDING, BACKWARD, accumulate=True) == 6 * 8 * 64

    @pytest.mark.parametrize(("kernels", "bytes_per_logit"), [("eager", 24), ("fused", 6), ("graphed", 6)])
    def test_the_loss_has_three_products_and_the_traffic_of_its_logits(self, kernels: str, bytes_per_logit: int) -> None:
        products, logits = 3 * 2 * 8 * 64 * 256, 8 * 256
        expected = products + bytes_per_logit * logits + 2 * 256 * 64
        assert ns(UnitRole.HEAD, TaskKind.LOSS, kernels) == expected
        assert ns(UnitRole.HEAD, TaskKind.LOSS, kernels, accumulate=True) == expected + 2 * 256 * 64

    @pytest.mark.parametrize("role", [UnitRole.EMBEDDING, UnitRole.HEAD])
    def test_attention_is_the_layers_alone(self, role: UnitRole) -> None:
        assert attention_ns(MODEL, role, FORWARD, 8, 8, UNIT_RATES) == 0
        assert attention_ns(MODEL, UnitRole.LAYER, FORWARD, 8, 8, UNIT_RATES) == ATTENTION


def test_gradients_are_written_by_what_makes_them() -> None:
    for role, kind, accumulate, expected in (
        (UnitRole.LAYER, FORWARD, False, 0),
        (UnitRole.LAYER, TaskKind.FORWARD_KEEP, False, 0),
        (UnitRole.LAYER, AGAIN, False, 4 * 36_992),
        (UnitRole.LAYER, AGAIN, True, 8 * 36_992),
        (UnitRole.HEAD, TaskKind.LOSS, False, 4 * 256 * 64),  # of the projection: the final norm's are left out
        (UnitRole.EMBEDDING, BACKWARD, False, 4 * 256 * 64),
        (UnitRole.EMBEDDING, BACKWARD, True, 0),
    ):
        assert gradient_bytes(MODEL, role, kind, "fp32", accumulate) == expected, (role, kind, accumulate)


def test_a_norm_is_one_pass_over_the_gradient() -> None:
    assert square_sum_ns(MODEL, UnitRole.LAYER, knobs("fused"), UNIT_RATES) == GRADIENT
    assert square_sum_ns(MODEL, UnitRole.LAYER, knobs("fused", "fp32"), UNIT_RATES) == 2 * GRADIENT


def test_what_a_layer_saves() -> None:
    assert MODEL.saved_bytes(1, eager=True) == 16 * 64 + 6 * 64 + 4 * 32 + 4 * 4 + 8 * 128 == 2576
    assert MODEL.saved_bytes(3, eager=False) == 3 * (8 + 4 * (64 + 32) + 4 * 4 + 2 * 64 + 4 * 128) == 3 * 1048
    normed = tiny_model(qk_norm=True)
    assert normed.saved_bytes(1, eager=False) == 1048 + 2 * (64 + 32) + 4 * (4 + 2)
    assert normed.saved_bytes(1, eager=True) == 2576
