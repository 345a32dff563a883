"""Steps that take long to repeat: by slack that is used up slowly, or by a cycle through several steps."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest

from handmade import graph
from simulator import Resource, TaskCost, carried_cycle, lower_bound, simulate, trace
from simulator.reference import SimPyEngine
from slideplan.graph.lanes import LaneKind

COMPUTE, H2D, D2H, UPDATE = LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE
PLENTY = {Resource.PCIE: 10**12}


def costs(*durations_ns: int, demand: int = 0) -> list[TaskCost]:
    """`demand`: bytes/s of PCIe that every task takes at full speed."""
    return [
        TaskCost(duration_ns=ns, demand={Resource.PCIE: demand} if demand else {}, source="measured") for ns in durations_ns
    ]


# A load and an update wait for each other, 1001 ns a step; compute takes 1000. The load is ready when compute needs
# it until that 1 ns a step has used up the slack.
DRIFTING = graph((COMPUTE, (), ()), (H2D, (), (3,)), (COMPUTE, (1,), ()), (UPDATE, (1,), ()))

# A task of the second lane waits for a load that waits for compute: steps of 15 and 20 take turns.
TURNS = graph(
    (COMPUTE, (), ()), (D2H, (), ()), (COMPUTE, (1,), ()), (H2D, (0,), ()), (D2H, (3,), ()),
    (COMPUTE, (), ()),
)  # fmt: skip
TURNS_NS = (0, 0, 0, 10, 10, 15)


@pytest.mark.parametrize("slack", [4, 12, 30])
def test_contention_does_not_hide_a_loop_that_wins_by_a_thousandth(slack: int) -> None:
    """Every step before it binds looks nearly like the one before: by a hundredth of the step they would be equal."""
    drifting = costs(500, 500 - slack, 500, 501 + slack, demand=1)
    opens = [step[0].start_ns for step in trace(DRIFTING, drifting, PLENTY, slack + 8)]
    lengths = [later - earlier for earlier, later in pairwise(opens)]
    assert lengths[0] == 1000
    assert lengths[-1] == 1001
    step_ns, spans = simulate(DRIFTING, drifting, PLENTY)
    assert step_ns == 1001
    assert spans[2].start_ns == 501  # compute waits for the load
    assert simulate(DRIFTING, drifting, PLENTY, engine=SimPyEngine)[0] == 1001


def test_steps_that_differ_by_less_than_a_millionth_are_equal() -> None:
    """Else rounding to whole nanoseconds would keep a run from ever settling."""
    part = 4 * 10**6
    fine = costs(part, part - 80, part, part + 82, demand=1)  # 2 ns of 8 ms a step, and slack for 40 of them
    assert simulate(DRIFTING, fine, PLENTY)[0] == 2 * part
    exact = costs(part, part - 80, part, part + 82)
    assert simulate(DRIFTING, exact, {})[0] == 2 * part + 2  # without contention nothing is rounded, and steps are equal or not


@pytest.mark.parametrize("factor", [1, 7, 1000])
def test_a_cycle_through_two_steps_bounds_the_step(factor: int) -> None:
    """No step repeats the one before it, so the cycle is found on the critical path."""
    durations = [factor * ns for ns in TURNS_NS]
    opens = [step[0].start_ns for step in trace(TURNS, costs(*durations), {}, 5)]
    assert opens == [0, 15 * factor, 35 * factor, 50 * factor, 70 * factor]
    assert carried_cycle(TURNS, durations) == 35 * factor // 2
    assert lower_bound(TURNS, costs(*durations), {}) == 35 * factor // 2
    assert simulate(TURNS, costs(*durations), {})[0] == Fraction(35 * factor, 2) // 1


def test_a_cycle_that_no_lane_is_as_slow_as() -> None:
    """Its lanes are busy for 15, 20 and 10 of 35 / 2 in the mean: only the cycle says why."""
    busiest = max(sum(TURNS_NS[number] for number in queue) for queue in TURNS.lanes.values())
    assert busiest == 15 < carried_cycle(TURNS, list(TURNS_NS)) == 17
