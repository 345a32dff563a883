from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_graphs import CAPACITIES, demands
from slideplan.simulator import Resource, fair_speeds

PCIE, DRAM = Resource.PCIE, Resource.HOST_DRAM


def test_alone_and_idle_flows_run_at_full_speed() -> None:
    assert fair_speeds([], {}) == []
    assert fair_speeds([{}], {}) == [1.0]
    assert fair_speeds([{PCIE: 60}, {}, {DRAM: 100}], {PCIE: 60, DRAM: 100}) == [1.0, 1.0, 1.0]


def test_three_flows_on_two_resources() -> None:
    # h2d and d2h fill PCIe at 88 / 110 = 4/5. DRAM then carries 88 of 170, and the optimizer gets the
    # remaining 82 of the 100 it wants.
    demands = [{PCIE: 55, DRAM: 55}, {PCIE: 55, DRAM: 55}, {DRAM: 100}]
    assert fair_speeds(demands, {PCIE: 88, DRAM: 170}) == pytest.approx([0.8, 0.8, 0.82])
    # With a thirstier optimizer DRAM fills first, at 170 / 270, and nobody reaches PCIe's limit.
    demands[2] = {DRAM: 160}
    assert fair_speeds(demands, {PCIE: 88, DRAM: 170}) == pytest.approx([170 / 270] * 3)


def test_optimizer_and_one_copy_share_dram_as_measured() -> None:
    update, copy = fair_speeds([{DRAM: 158}, {PCIE: 54, DRAM: 54}], {PCIE: 88, DRAM: 170})
    assert 158 * update == pytest.approx(127, abs=1)
    assert 54 * copy == pytest.approx(43, abs=1)


@given(st.lists(demands, max_size=6))
def test_max_min_fairness(drawn: list[dict[Resource, int]]) -> None:
    """Feasible; and each flow is at full speed or on a full resource where no flow is faster."""
    speeds = fair_speeds(drawn, CAPACITIES)
    used = {r: sum(demand.get(r, 0) * speed for demand, speed in zip(drawn, speeds, strict=True)) for r in Resource}
    for resource, capacity in CAPACITIES.items():
        assert used[resource] <= capacity * (1 + 1e-9)
    for demand, speed in zip(drawn, speeds, strict=True):
        assert 0 < speed <= 1
        if speed < 1:
            assert any(
                used[resource] >= CAPACITIES[resource] * (1 - 1e-9)
                and speed >= max(s for d, s in zip(drawn, speeds, strict=True) if resource in d) * (1 - 1e-9)
                for resource in demand
            )


@given(st.lists(demands, max_size=6), st.randoms(use_true_random=False))
def test_order_of_flows_does_not_matter(drawn: list[dict[Resource, int]], random) -> None:
    order = list(range(len(drawn)))
    random.shuffle(order)
    speeds = fair_speeds(drawn, CAPACITIES)
    assert fair_speeds([drawn[flow] for flow in order], CAPACITIES) == pytest.approx([speeds[flow] for flow in order])
