"""What a report says about the order of the CPU's updates."""

from __future__ import annotations

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from planner.reports.answer import policy_in_words

MODEL = tiny_model()  # units: embedding, layers 0-3, head
DEFERRED = "after backward, in the order in which the next step needs them"


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((5, 4, 3, 2, 1, 0), "as gradients arrive"),
        ((0, 1, 2, 3, 4, 5), f"all units {DEFERRED}"),
        ((5, 0, 1, 2, 3, 4), f"head as gradients arrive; embedding, all 4 layers {DEFERRED}"),
        ((5, 4, 3, 0, 1, 2), f"layers 2-3, head as gradients arrive; embedding, layers 0-1 {DEFERRED}"),
        ((5, 4, 3, 2, 0, 1), f"layers 1-3, head as gradients arrive; embedding, layer 0 {DEFERRED}"),
        # Units of the GPU are not spoken of.
        ((4, 1, 2, 3), f"layer 3 as gradients arrive; layers 0-2 {DEFERRED}"),
        ((4, 0, 2), f"layer 3 as gradients arrive; embedding, layer 1 {DEFERRED}"),
        ((1, 2), f"layers 0-1 {DEFERRED}"),
        ((2, 1), "as gradients arrive"),
        ((3,), "as gradients arrive"),
    ],
)
def test_first_those_whose_gradients_arrive_then_those_that_wait(order: tuple[int, ...], words: str) -> None:
    on_gpu = tuple(unit for unit in range(MODEL.units) if unit not in order)
    policy = tiny_policy(MODEL, resident_state=on_gpu, update_order=order)
    policy.check(MODEL, tiny_workload())
    assert dict(policy_in_words(MODEL, policy))["CPU updates"] == words


def test_nothing_is_said_where_the_cpu_updates_nothing() -> None:
    policy = tiny_policy(MODEL, resident_state=tuple(range(MODEL.units)))
    assert "CPU updates" not in dict(policy_in_words(MODEL, policy))
