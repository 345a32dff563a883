from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_graphs import CAPACITIES, demands, weights
from slideplan.simulator import Resource, fair_speeds

PCIE, DRAM, GPU = Resource.PCIE, Resource.HOST_DRAM, Resource.GPU

flows = st.lists(st.tuples(demands, weights), max_size=6)


def test_alone_and_idle_flows_run_at_full_speed() -> None:
    assert fair_speeds([], {}) == []
    assert fair_speeds([{}], {}) == [1.0]
    assert fair_speeds([{PCIE: 60}, {}, {DRAM: 100}], {PCIE: 60, DRAM: 100}, [0.1, 7, 3]) == [1.0, 1.0, 1.0]


def test_three_flows_on_two_resources() -> None:
    # h2d and d2h fill PCIe at 88 / 110 = 4/5. DRAM then carries 88 of 170, and the optimizer gets the
    # remaining 82 of the 100 it wants.
    demands = [{PCIE: 55, DRAM: 55}, {PCIE: 55, DRAM: 55}, {DRAM: 100}]
    assert fair_speeds(demands, {PCIE: 88, DRAM: 170}) == pytest.approx([0.8, 0.8, 0.82])
    # With a thirstier optimizer DRAM fills first, at 170 / 270, and nobody reaches PCIe's limit.
    demands[2] = {DRAM: 160}
    assert fair_speeds(demands, {PCIE: 88, DRAM: 170}) == pytest.approx([170 / 270] * 3)


def test_a_weight_buys_speed() -> None:
    # 100 wanted of 60 by each: 1 to 3 is 15 and 45; With 1 to 19 the second has all it wants, and the first the rest.
    assert fair_speeds([{DRAM: 100}, {DRAM: 100}], {DRAM: 60}, [1, 3]) == pytest.approx([0.15, 0.45])
    assert fair_speeds([{DRAM: 100}, {DRAM: 50}], {DRAM: 60}, [1, 19]) == pytest.approx([0.10, 1.0])


def test_compute_gives_way_to_copies_that_take_a_part_of_the_gpu() -> None:
    compute, copy = fair_speeds([{GPU: 1000}, {GPU: 40, PCIE: 54}], {GPU: 1000, PCIE: 88}, [0.1, 1])
    assert (compute, copy) == (pytest.approx(0.96), 1.0)


def test_optimizer_and_one_copy_share_dram_as_measured() -> None:
    update, copy = fair_speeds([{DRAM: 158}, {PCIE: 54, DRAM: 54}], {PCIE: 88, DRAM: 170})
    assert 158 * update == pytest.approx(127, abs=1)
    assert 54 * copy == pytest.approx(43, abs=1)


@given(flows)
def test_max_min_fairness(drawn: list[tuple[dict[Resource, int], float]]) -> None:
    """Feasible; and each flow is at full speed or on a full resource where no flow has more speed for its weight."""
    wanted, shares = [demand for demand, _ in drawn], [weight for _, weight in drawn]
    speeds = fair_speeds(wanted, CAPACITIES, shares)
    used = {r: sum(demand.get(r, 0) * speed for demand, speed in zip(wanted, speeds, strict=True)) for r in Resource}
    for resource, capacity in CAPACITIES.items():
        assert used[resource] <= capacity * (1 + 1e-9)
    for demand, speed, share in zip(wanted, speeds, shares, strict=True):
        assert 0 < speed <= 1
        if speed < 1:
            assert any(
                used[resource] >= CAPACITIES[resource] * (1 - 1e-9)
                and speed / share
                >= max(s / w for d, s, w in zip(wanted, speeds, shares, strict=True) if resource in d) * (1 - 1e-9)
                for resource in demand
            )


@given(flows, st.floats(0.01, 100))
def test_only_the_ratios_of_weights_count(drawn: list[tuple[dict[Resource, int], float]], factor: float) -> None:
    wanted, shares = [demand for demand, _ in drawn], [weight for _, weight in drawn]
    scaled = fair_speeds(wanted, CAPACITIES, [factor * share for share in shares])
    assert scaled == pytest.approx(fair_speeds(wanted, CAPACITIES, shares))
    assert fair_speeds(wanted, CAPACITIES, [factor] * len(wanted)) == pytest.approx(fair_speeds(wanted, CAPACITIES))


@given(flows, st.randoms(use_true_random=False))
def test_order_of_flows_does_not_matter(drawn: list[tuple[dict[Resource, int], float]], random) -> None:
    order = list(range(len(drawn)))
    random.shuffle(order)
    speeds = fair_speeds([demand for demand, _ in drawn], CAPACITIES, [weight for _, weight in drawn])
    shuffled = fair_speeds([drawn[flow][0] for flow in order], CAPACITIES, [drawn[flow][1] for flow in order])
    assert shuffled == pytest.approx([speeds[flow] for flow in order])
