from __future__ import annotations

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from handmade import cost, graph, times
from random_graphs import CAPACITIES, demands, handoffs, priced_graphs, tied
from simulator import DeadlockError, Resource, capacities, carried_cycle, lower_bound, price, simulate, trace
from simulator.reference import SimPyEngine
from slideplan.footprint import Footprint
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.replay import replay, unroll
from slideplan.graph.tasks import TaskGraph
from slideplan.lowering.lower import lower
from slideplan.machine.handoffs import Handoffs
from wording import says

COMPUTE, H2D, D2H, UPDATE = LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE
LINK = {Resource.PCIE: 100}


class TestSpanLogs:
    def test_a_lane_is_a_fifo_even_where_a_later_task_is_ready_first(self) -> None:
        # t2 waits for the slow load t0; t3 of the same lane is ready at once and must not overtake it.
        log = trace(
            graph((H2D, (), ()), (COMPUTE, (), ()), (COMPUTE, (0,), ()), (COMPUTE, (), ())),
            [cost(50), cost(10), cost(5), cost(7)], {}, steps=2,
        )  # fmt: skip
        assert times(log[0]) == [(0, 50), (0, 10), (50, 55), (55, 62)]
        assert times(log[1]) == [(50, 100), (62, 72), (100, 105), (105, 112)]

    def test_carried_edges_bind_from_the_second_step_on(self) -> None:
        # load -> compute -> update, and the next step's load waits for the update.
        chain = graph((H2D, (), (2,)), (COMPUTE, (0,), ()), (UPDATE, (1,), ()))
        log = trace(chain, [cost(10), cost(20), cost(30)], {}, steps=3)
        assert [times(step) for step in log] == [
            [(0, 10), (10, 30), (30, 60)],
            [(60, 70), (70, 90), (90, 120)],
            [(120, 130), (130, 150), (150, 180)],
        ]
        assert simulate(chain, [cost(10), cost(20), cost(30)], {}) == replay(chain, [10, 20, 30])
        step_ns, spans = simulate(chain, [cost(10), cost(20), cost(30)], {})
        assert (step_ns, times(spans)) == (60, [(-10, 0), (0, 20), (20, 50)])

    def test_two_copies_share_a_link(self) -> None:
        # Each wants 80 of 100: both run at 5/8 until the shorter is done after 100 / (5/8) = 160 ns.
        # By then the longer has done 100 of its 200 ns and finishes alone: 160 + 100.
        log = trace(
            graph((COMPUTE, (), ()), (H2D, (), ()), (D2H, (), ())),
            [cost(1), cost(100, {Resource.PCIE: 80}), cost(200, {Resource.PCIE: 80})], LINK, steps=1,
        )  # fmt: skip
        assert times(log[0]) == [(0, 1), (0, 160), (0, 260)]

    def test_a_flow_that_starts_later_slows_the_running_one(self) -> None:
        # t1 runs alone for 40 ns, then shares: (100 - 40) / (1/2) = 120 more. t3 has done 60 of 100 by then.
        log = trace(
            graph((COMPUTE, (), ()), (H2D, (), ()), (D2H, (0,), ())),
            [cost(40), cost(100, {Resource.PCIE: 100}), cost(100, {Resource.PCIE: 100})], LINK, steps=1,
        )  # fmt: skip
        assert times(log[0]) == [(0, 40), (0, 160), (40, 200)]

    def test_ends_are_rounded_up_and_work_is_not_lost(self) -> None:
        # Three flows of 10 ns at 1/3 each; then each step's are again exactly as long.
        thirds = graph((COMPUTE, (), ()), (H2D, (), ()), (D2H, (), ()), (UPDATE, (), ()))
        flow = cost(10, {Resource.PCIE: 100})
        log = trace(thirds, [cost(30), flow, flow, flow], LINK, steps=40)
        assert times(log[39])[1:] == [(39 * 30, 40 * 30)] * 3
        sevenths = [cost(30), cost(10, {Resource.PCIE: 90}), cost(10, {Resource.PCIE: 50}), cost(0)]
        assert times(trace(thirds, sevenths, LINK, steps=1)[0])[1:3] == [(0, 14), (0, 14)]

    def test_a_flow_that_starts_in_the_instant_of_anothers_end(self) -> None:
        # t2 and t3 end at 11, rounded up from 10.1. t1 joins at 11, before they are taken out, and halves their
        # speed: what they overshot is more than a nanosecond at that speed, yet they end at 11.
        late = graph((COMPUTE, (), ()), (H2D, (0,), ()), (D2H, (), ()), (UPDATE, (), ()))
        costs = [cost(11), cost(10, {Resource.PCIE: 100}), cost(10, {Resource.PCIE: 100}), cost(10, {Resource.PCIE: 1})]
        assert times(trace(late, costs, LINK, steps=1)[0]) == [(0, 11), (11, 21), (0, 11), (0, 11)]

    def test_a_flow_alone_takes_its_duration_even_if_it_wants_more_than_there_is(self) -> None:
        log = trace(graph((COMPUTE, (), ()), (H2D, (), ())), [cost(1), cost(123_456_789, {Resource.PCIE: 170})], LINK, steps=1)
        assert times(log[0])[1] == (0, 123_456_789)

    def test_a_lane_without_demand_starts_its_shared_task_on_time(self) -> None:
        # The compute lane works ahead of the clock; the copies it releases still meet each other in time.
        log = trace(
            graph((COMPUTE, (), ()), (COMPUTE, (), ()), (D2H, (0,), ()), (H2D, (1,), ())),
            [cost(10), cost(10), cost(20, {Resource.PCIE: 100}), cost(20, {Resource.PCIE: 100})], LINK, steps=1,
        )  # fmt: skip
        # D2H alone 10..20, both at half speed 20..40, H2D alone from 40 with 10 ns left.
        assert times(log[0]) == [(0, 10), (10, 20), (10, 40), (20, 50)]

    def test_a_lane_goes_on_when_it_was_told(self) -> None:
        # load -> compute -> offload -> update, and the next load waits for the update; each is handed over.
        chain = graph((H2D, (), (3,)), (COMPUTE, (0,), ()), (D2H, (1,), ()), (UPDATE, (2,), ()))
        later = Handoffs(device_to_device_ns=1, device_to_host_ns=20, host_to_device_ns=300)
        log = trace(chain, [cost(10)] * 4, {}, 2, handoffs=later)
        assert [times(step) for step in log] == [
            [(0, 10), (11, 21), (22, 32), (52, 62)],
            [(362, 372), (373, 383), (384, 394), (414, 424)],
        ]
        assert simulate(chain, [cost(10)] * 4, {}, later)[0] == lower_bound(chain, [cost(10)] * 4, {}, later) == 362


class TestSteadyStep:
    def test_a_cycle_of_two_steps_gives_their_mean(self) -> None:
        # t2 waits for the d2h lane, whose t4 waits for a load: a step of 15 leaves it late by 5, the next takes 20.
        turns = graph(
            (COMPUTE, (), ()), (D2H, (), ()), (COMPUTE, (1,), ()), (H2D, (0,), ()), (D2H, (3,), ()), (COMPUTE, (), ())
        )  # fmt: skip
        costs = [cost(duration) for duration in (0, 0, 0, 10, 10, 15)]
        assert [step[0].start_ns for step in trace(turns, costs, {}, steps=6)] == [0, 15, 35, 50, 70, 85]
        assert simulate(turns, costs, {})[0] == 35 // 2

    def test_contention_that_never_fits_the_nanosecond_still_settles(self) -> None:
        model, machine, workload = tiny_model(layers=12), tiny_machine(), tiny_workload()
        lowered = lower(model, tiny_policy(model, offload_boundaries=True), workload, Footprint(1, 1))
        costs = price(lowered, model, tiny_policy(model), workload.seq_len, machine)
        step_ns, _ = simulate(lowered, costs, capacities(machine))
        origins = [step[0].start_ns for step in trace(lowered, costs, capacities(machine), 12)]
        assert (origins[-1] - origins[-7]) / 6 == pytest.approx(step_ns, rel=1e-4)


class TestDeadlock:
    def test_a_cycle_across_lanes_names_tasks_and_what_they_wait_for(self) -> None:
        # t0 waits for t3, which stands behind t2 in its lane, which waits for t1, behind t0 in its own.
        crossed = graph((COMPUTE, (3,), ()), (COMPUTE, (), ()), (H2D, (1,), ()), (H2D, (), ()), (D2H, (), ()))
        for run in (lambda c: simulate(crossed, c, {}), lambda c: trace(crossed, c, {}, steps=1)):
            with pytest.raises(DeadlockError) as caught:
                run([cost(1)] * 5)
            assert says(str(caught.value), "compute: t0 waits for t3 of step 0")
            assert says(str(caught.value), "h2d: t2 waits for t1 of step 0")
            assert "d2h" not in str(caught.value)

    def test_a_cycle_through_a_carried_edge_shows_in_the_second_step(self) -> None:
        # t0 waits for the last step's t1, which is of the same lane: fine. t1 waits for t2, which waits
        # for the t3 of the step before, behind it in its own lane's queue: fine too. No deadlock.
        fine = graph((COMPUTE, (), (1,)), (COMPUTE, (2,), ()), (H2D, (), (3,)), (H2D, (), ()))
        assert simulate(fine, [cost(1)] * 4, {})[0] > 0

    def test_costs_must_match_tasks(self) -> None:
        with pytest.raises(ValueError, match="2 costs for 1 tasks"):
            simulate(graph((COMPUTE, (), ())), [cost(1)] * 2, {})


def longest_path_ends(drawn: TaskGraph, durations: list[int], steps: int, later: Handoffs) -> list[list[int]]:
    """Ends by networkx: longest path over the unrolled graph, an edge as long as the task it leaves and the hand-off."""
    unrolled = nx.DiGraph()
    last_in_lane: dict[Lane, tuple[int, int]] = {}
    for step in range(steps):
        for number, task in enumerate(drawn.tasks):
            node = step, number
            unrolled.add_edge("source", node, ns=0)
            before = [(step - d.distance, d.task) for d in task.dependencies if step >= d.distance]
            if task.lane in last_in_lane:
                before.append(last_in_lane[task.lane])
            for other in before:
                ns = durations[other[1]] + later.between(drawn.tasks[other[1]].lane, task.lane)
                if not unrolled.has_edge(other, node) or unrolled.edges[other, node]["ns"] < ns:
                    unrolled.add_edge(other, node, ns=ns)
            last_in_lane[task.lane] = node
    starts = {"source": 0}
    for node in nx.topological_sort(unrolled):
        starts[node] = max((starts[other] + ns for other, _, ns in unrolled.in_edges(node, data="ns")), default=0)
    return [[starts[step, number] + durations[number] for number in range(len(durations))] for step in range(steps)]


class TestReference:
    """The fast engine and the SimPy model agree, span for span."""

    @given(priced_graphs(contended=True), handoffs)
    def test_with_contention(self, priced, later) -> None:
        drawn, costs = priced
        fast = trace(drawn, costs, CAPACITIES, 4, handoffs=later)
        assert fast == trace(drawn, costs, CAPACITIES, 4, SimPyEngine, later)

    @given(priced_graphs(contended=False), handoffs)
    def test_without_contention(self, priced, later) -> None:
        drawn, costs = priced
        assert trace(drawn, costs, {}, 4, handoffs=later) == trace(drawn, costs, {}, 4, SimPyEngine, later)

    @given(st.lists(st.tuples(st.integers(0, 10**9), demands), min_size=6, max_size=6), st.integers(1, 3), st.booleans())
    def test_on_lowered_graphs_with_any_costs(self, drawn, micros: int, offload: bool) -> None:
        model = tiny_model()
        policy = tiny_policy(model, micro_batches=micros, offload_boundaries=offload, resident_state=(1,), keep=(4,))
        lowered = lower(model, policy, tiny_workload(global_batch=2 * micros), Footprint(1, 1))
        costs = [cost(*drawn[(task.unit + len(task.kind)) % len(drawn)]) for task in lowered.tasks]
        assert trace(lowered, costs, CAPACITIES, steps=4) == trace(lowered, costs, CAPACITIES, 4, SimPyEngine)

    def test_deadlock(self) -> None:
        crossed = graph((COMPUTE, (3,), ()), (COMPUTE, (), ()), (H2D, (1,), ()), (H2D, (), ()), (D2H, (), ()))
        told = []
        for run in (lambda: trace(crossed, [cost(1)] * 5, {}, 1), lambda: trace(crossed, [cost(1)] * 5, {}, 1, SimPyEngine)):
            with pytest.raises(DeadlockError) as caught:
                run()
            told.append(str(caught.value))
        assert told[0] == told[1]


class TestOracle:
    @given(priced_graphs(contended=False), handoffs)
    def test_without_contention_the_engine_is_the_longest_path_and_the_replay(self, priced, later) -> None:
        drawn, costs = priced
        durations = [each.duration_ns for each in costs]
        log = trace(drawn, costs, {}, 4, handoffs=later)
        assert [[span.end_ns for span in step] for step in log] == longest_path_ends(drawn, durations, 4, later)
        assert log == unroll(drawn, durations, 4, later)
        assert simulate(drawn, costs, {}, later) == replay(drawn, durations, later)

    @given(priced_graphs(contended=True), handoffs)
    def test_handoffs_only_delay_and_bounds_hold_with_them(self, priced, later) -> None:
        drawn, costs = tied(priced[0]), priced[1]
        bound_ns = lower_bound(drawn, costs, CAPACITIES, later)
        assert lower_bound(drawn, costs, CAPACITIES) <= bound_ns
        # Over many steps, since a lane may fall behind by too little a step to show in one.
        starts = [step[0].start_ns for step in trace(drawn, costs, CAPACITIES, 49, handoffs=later)]
        slack_ns = 2 * sum(each.duration_ns + 300 for each in costs)
        assert starts[-1] - starts[0] >= 48 * bound_ns - slack_ns

    @given(priced_graphs(contended=True))
    def test_demands_that_fit_change_nothing(self, priced) -> None:
        drawn, costs = priced
        ample = dict.fromkeys(Resource, 10000)
        assert trace(drawn, costs, ample, steps=3) == unroll(drawn, [each.duration_ns for each in costs], 3)

    @given(priced_graphs(contended=True))
    def test_contention_only_delays(self, priced) -> None:
        drawn, costs = priced
        log = trace(drawn, costs, CAPACITIES, steps=3)
        alone = unroll(drawn, [each.duration_ns for each in costs], 3)
        for step, free in zip(log, alone, strict=True):
            for span, free_span, each in zip(step, free, costs, strict=True):
                assert span.end_ns >= free_span.end_ns
                assert span.end_ns - span.start_ns >= each.duration_ns

    @given(priced_graphs(contended=True))
    def test_no_resource_gives_more_than_it_has(self, priced) -> None:
        drawn, costs = priced
        log = [span for step in trace(drawn, costs, CAPACITIES, steps=3) for span in step]
        for resource, capacity in CAPACITIES.items():
            total = sum(3 * each.duration_ns * min(capacity, each.demand.get(resource, 0)) for each in costs)
            users = [span for span, each in zip(log, costs * 3, strict=True) if each.demand.get(resource) and each.duration_ns]
            if users:
                first, last = min(span.start_ns for span in users), max(span.end_ns for span in users)
                assert total <= capacity * (last - first) * (1 + 1e-9)

    @given(priced_graphs(contended=True))
    def test_runs_are_deterministic(self, priced) -> None:
        drawn, costs = priced
        assert trace(drawn, costs, CAPACITIES, steps=3) == trace(drawn, costs, CAPACITIES, steps=3)
        assert simulate(drawn, costs, CAPACITIES) == simulate(drawn, costs, CAPACITIES)


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"window": 3, "offload_boundaries": True},
        {"keep": (2, 3), "resident_weights": (3,), "resident_state": (4,)},
        {"update_order": (0, 1, 2, 3, 4, 5)},
        {"resident_state": (0, 1, 2, 3, 4, 5)},
    ],
)
def test_lowered_graphs_settle_above_their_bounds(knobs: dict) -> None:
    model, machine, workload = tiny_model(), tiny_machine(), tiny_workload()
    lowered = lower(model, tiny_policy(model, **knobs), workload, Footprint(inner_bytes=1 << 20, workspace_bytes=1 << 20))
    costs = price(lowered, model, tiny_policy(model), workload.seq_len, machine)
    step_ns, spans = simulate(lowered, costs, capacities(machine))
    free_ns, _ = replay(lowered, [each.duration_ns for each in costs])
    assert step_ns >= free_ns >= carried_cycle(lowered, [each.duration_ns for each in costs])
    assert step_ns >= lower_bound(lowered, costs, capacities(machine))
    # Steady: one lane's tasks follow each other, and the next step's first comes after this step's last.
    for queue in lowered.lanes.values():
        ends = [spans[number].end_ns for number in queue]
        starts = [spans[number].start_ns for number in queue]
        assert all(end <= start for end, start in zip(ends, [*starts[1:], starts[0] + step_ns], strict=True))


@given(st.integers(1, 10**12), st.integers(1, 10**12))
def test_equal_sharing_is_exact_for_long_tasks(first: int, second: int) -> None:
    both = [cost(0), cost(first, {Resource.PCIE: 100}), cost(second, {Resource.PCIE: 100})]
    spans = trace(graph((COMPUTE, (), ()), (H2D, (), ()), (D2H, (), ())), both, LINK, steps=1)[0]
    short, long = sorted((first, second))
    assert sorted(span.end_ns for span in spans[1:]) == [2 * short, short + long]
