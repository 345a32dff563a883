"""Which slot of the window a load takes: by Belady's rule, the one whose unit is needed farthest in the future."""

from __future__ import annotations

from functools import cache

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.operations import READ_WEIGHTS, WRITE_WEIGHTS
from slideplan.lowering.lower import lower
from slideplan.lowering.order import WindowUse, compute_order, visits, window_slots
from slideplan.policy import Policy
from strategies import FOOTPRINT


def policy_of(layers: int, window: int, depth: int, interval: int, **knobs: object) -> Policy:
    """Boundary activations are kept every `interval` layers; above 1, weights pass three times a step."""
    return tiny_policy(
        tiny_model(layers=layers), window=window, prefetch_depth=depth, checkpoint_interval=interval,
        boundary_slots=2 * (interval + 1) + 1 if interval > 1 else 0, gradient_slots=2, **knobs,
    )  # fmt: skip


def slots_of(policy: Policy, layers: int) -> list[WindowUse | None]:
    model = tiny_model(layers=layers)
    policy.check(model, tiny_workload())
    return window_slots(model, policy, visits(compute_order(model, policy)))


def fewest_loads(policy: Policy, needs: list[int | None]) -> int:
    """By trying every slot that is free for each load."""

    @cache
    def loads_from(now: int, holds: tuple[int | None, ...], used_at: tuple[int, ...]) -> int:
        if now == len(needs):
            return 0
        unit = needs[now]
        if unit is None:
            return loads_from(now + 1, holds, used_at)

        def taking(slot: int) -> int:
            put = lambda values, value: (*values[:slot], value, *values[slot + 1 :])  # noqa: E731
            return loads_from(now + 1, put(holds, unit), put(used_at, now))

        if unit in holds:
            return taking(holds.index(unit))
        return 1 + min(taking(slot) for slot in range(policy.window) if used_at[slot] < now - policy.prefetch_depth)

    return loads_from(0, (None,) * policy.window, (-len(needs),) * policy.window)


def test_three_passes_by_hand() -> None:
    """Four layers in three slots, the middle layers of the block computed twice before its backward."""
    found = slots_of(policy_of(4, 3, 1, 3), 4)
    # Forward 1 2 3 4, then backward of 4; then 1 2 forward once more, and backward of 3 2 1.
    assert [use and (use.unit, use.slot, use.load) for use in found] == [
        None,  # the embedding has a slot of its own
        (1, 0, True),
        (2, 1, True),
        (3, 2, True),
        (4, 1, True),  # issued while 3 computes; of the others, 1 was used longest ago but is needed first
        None,
        (4, 1, False),
        (1, 0, False),
        (2, 1, True),
        (3, 2, False),
        (2, 1, False),
        (1, 0, False),
        None,
    ]


@pytest.mark.parametrize("interval", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [4, 6])
@pytest.mark.parametrize("unit_slots", ["sized", "uniform"])
def test_no_choice_of_slots_takes_fewer_loads(layers: int, interval: int, unit_slots: str) -> None:
    for window in (2, 3, 4):
        for depth in range(1, window):
            policy = policy_of(layers, window, depth, interval, unit_slots=unit_slots)
            found = slots_of(policy, layers)
            assert sum(use.load for use in found if use) == fewest_loads(policy, [use and use.unit for use in found])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_load_takes_no_slot_that_the_visits_before_it_read(depth: int) -> None:
    """It is issued that many visits ahead, while these compute."""
    found = slots_of(policy_of(7, 4, depth, 3), 7)
    loads = [now for now, use in enumerate(found) if use and use.load]
    assert len(loads) > 7
    for now in loads:
        assert found[now].slot not in {use.slot for use in found[max(0, now - depth) : now] if use}


@pytest.mark.parametrize(("slots", "expected"), [(1, 15), (2, 14), (3, 9), (4, 8), (5, 7), (6, 6), (9, 6)])
def test_weights_on_the_ssd_are_read_where_no_host_slot_has_them(slots: int, expected: int):
    """Before forward, backward and update of six layers, two of which turn around in the window.

    From three slots on, updates find what backward was loaded from, and slots save one read each at the turn.
    """
    model = tiny_model(layers=6)
    policy = tiny_policy(model, ssd_weights=tuple(range(1, 7)), host_weight_slots=slots, micro_batches=1, micro_batch=4)
    operations = [task.operation for task in lower(model, policy, tiny_workload(), FOOTPRINT).tasks]
    assert operations.count(READ_WEIGHTS) == expected
    assert operations.count(WRITE_WEIGHTS) == 6
