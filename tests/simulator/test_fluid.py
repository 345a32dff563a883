from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from random_graphs import CAPACITIES, demands, shares
from simulator import Resource, fair_speeds

PCIE, SSD, DRAM, GPU = Resource.PCIE, Resource.SSD, Resource.HOST_DRAM, Resource.GPU

flows = st.lists(st.tuples(demands, shares), max_size=6)
# What passes a narrow resource passes the wide one, as on a machine.
nested = st.lists(
    st.one_of(
        st.builds(lambda one, wide: {one: min(wide, 60), DRAM: wide}, st.sampled_from([PCIE, SSD]), st.integers(1, 120)),
        st.builds(lambda wide: {DRAM: wide}, st.integers(1, 120)),
    ),
    max_size=6,
)


def test_alone_and_idle_flows_run_at_full_speed() -> None:
    assert fair_speeds([], {}) == []
    assert fair_speeds([{}], {}) == [1.0]
    assert fair_speeds([{PCIE: 60}, {}, {DRAM: 100}], {PCIE: 60, DRAM: 100}, [{PCIE: 0.1}, {}, {DRAM: 3}]) == [1.0, 1.0, 1.0]


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
    assert fair_speeds([{DRAM: 100}, {DRAM: 100}], {DRAM: 60}, [{}, {DRAM: 3}]) == pytest.approx([0.15, 0.45])
    assert fair_speeds([{DRAM: 100}, {DRAM: 50}], {DRAM: 60}, [{}, {DRAM: 19}]) == pytest.approx([0.10, 1.0])
    # It counts where it is given: here nothing is short of PCIe.
    assert fair_speeds([{DRAM: 100}, {DRAM: 100}], {DRAM: 60}, [{}, {PCIE: 3}]) == pytest.approx([0.3, 0.3])


def test_weights_differ_from_resource_to_resource() -> None:
    """Copies both ways share PCIe evenly; beside the optimizer, the one that reads host memory loses most."""
    h2d, d2h, update = {PCIE: 50, DRAM: 50}, {PCIE: 50, DRAM: 50}, {DRAM: 150}
    weights = [{DRAM: 0.5}, {DRAM: 1.5}, {}]
    assert fair_speeds([h2d, d2h], {PCIE: 80, DRAM: 170}, weights[:2]) == pytest.approx([0.8, 0.8])
    # 50 x 0.5 + 150 = 175 per level; then d2h, too, held by PCIe at 0.8 of its 50: (170 - 40) / 175.
    level = 130 / 175
    assert fair_speeds([h2d, d2h, update], {PCIE: 80, DRAM: 170}, weights) == pytest.approx([0.5 * level, 0.8, level])


def test_no_flow_stands_still_however_small_it_is() -> None:
    small, large = fair_speeds([{DRAM: 1}, {DRAM: 10**12}], {DRAM: 10**12}, [{DRAM: 1e-4}, {DRAM: 1e4}])
    assert 0 < small < 1e-6
    assert large == pytest.approx(1.0)


def test_compute_gives_way_to_copies_that_take_a_part_of_the_gpu() -> None:
    compute, copy = fair_speeds([{GPU: 1000}, {GPU: 40, PCIE: 54}], {GPU: 1000, PCIE: 88}, [{GPU: 0.1}, {}])
    assert (compute, copy) == (pytest.approx(0.96), 1.0)


def test_optimizer_and_one_copy_share_dram_as_measured() -> None:
    update, copy = fair_speeds([{DRAM: 158}, {PCIE: 54, DRAM: 54}], {PCIE: 88, DRAM: 170})
    assert 158 * update == pytest.approx(127, abs=1)
    assert 54 * copy == pytest.approx(43, abs=1)


def used(wanted: list[dict[Resource, int]], speeds: list[float]) -> dict[Resource, float]:
    return {r: sum(demand.get(r, 0) * speed for demand, speed in zip(wanted, speeds, strict=True)) for r in Resource}


@given(flows)
def test_no_resource_gives_more_than_it_has(drawn: list[tuple[dict[Resource, int], dict[Resource, float]]]) -> None:
    wanted = [demand for demand, _ in drawn]
    speeds = fair_speeds(wanted, CAPACITIES, [weights for _, weights in drawn])
    assert all(0 < speed <= 1 for speed in speeds)
    assert all(taken <= CAPACITIES[resource] * (1 + 1e-9) for resource, taken in used(wanted, speeds).items())
    for demand, speed in zip(wanted, speeds, strict=True):
        if speed < 1:  # then something that it passes was short
            assert any(sum(other.get(r, 0) for other in wanted) > CAPACITIES[r] for r in demand)


@given(st.lists(st.tuples(st.integers(1, 120), st.sampled_from([0.1, 0.5, 1.0, 1.4, 8.0])), max_size=6))
def test_max_min_fairness_on_one_resource(drawn: list[tuple[int, float]]) -> None:
    """Each flow is at full speed, or the resource is full and no flow has more speed for its weight."""
    wanted = [{DRAM: rate} for rate, _ in drawn]
    speeds = fair_speeds(wanted, CAPACITIES, [{DRAM: weight} for _, weight in drawn])
    level = max((speed / weight for speed, (_, weight) in zip(speeds, drawn, strict=True)), default=0.0)
    for speed, (_, weight) in zip(speeds, drawn, strict=True):
        if speed < 1:
            assert used(wanted, speeds)[DRAM] >= CAPACITIES[DRAM] * (1 - 1e-9)
            assert speed / weight >= level * (1 - 1e-9)


@given(nested, st.randoms(use_true_random=False))
def test_nothing_lies_idle_that_a_slowed_flow_wants(wanted: list[dict[Resource, int]], random) -> None:
    """Where all pass the wide resource, who is slowed is on a full one, whatever the weights."""
    weights = [{r: random.choice([0.1, 0.5, 1.0, 1.4, 8.0]) for r in demand} for demand in wanted]
    speeds = fair_speeds(wanted, CAPACITIES, weights)
    taken = used(wanted, speeds)
    for demand, speed in zip(wanted, speeds, strict=True):
        if speed < 1:
            assert any(taken[resource] >= CAPACITIES[resource] * (1 - 1e-9) for resource in demand)


@given(flows, st.floats(0.01, 100))
def test_only_the_ratios_of_weights_count(
    drawn: list[tuple[dict[Resource, int], dict[Resource, float]]], factor: float
) -> None:
    wanted = [demand for demand, _ in drawn]
    shares = [{resource: weights.get(resource, 1.0) for resource in Resource} for _, weights in drawn]
    scaled = fair_speeds(wanted, CAPACITIES, [{r: factor * share for r, share in weights.items()} for weights in shares])
    assert scaled == pytest.approx(fair_speeds(wanted, CAPACITIES, shares))
    even = [dict.fromkeys(Resource, factor) for _ in wanted]
    assert fair_speeds(wanted, CAPACITIES, even) == pytest.approx(fair_speeds(wanted, CAPACITIES))


@given(flows, st.randoms(use_true_random=False))
def test_order_of_flows_does_not_matter(drawn: list[tuple[dict[Resource, int], dict[Resource, float]]], random) -> None:
    order = list(range(len(drawn)))
    random.shuffle(order)
    speeds = fair_speeds([demand for demand, _ in drawn], CAPACITIES, [weights for _, weights in drawn])
    shuffled = fair_speeds([drawn[flow][0] for flow in order], CAPACITIES, [drawn[flow][1] for flow in order])
    assert shuffled == pytest.approx([speeds[flow] for flow in order])
