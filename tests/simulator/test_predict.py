from __future__ import annotations

from fractions import Fraction

import networkx as nx
import pytest
from hypothesis import assume, given

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from handmade import cost, graph, times
from random_graphs import CAPACITIES, priced_graphs, tied
from simulator import (
    Resource,
    carried_cycle,
    critical_path,
    footprint,
    lower_bound,
    predict,
    price,
    sharing,
    simulate,
    trace,
)
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.profile import ComputeCost, Interference, LayerShape, Spread
from slideplan.machine.sharing import Sharing
from slideplan.model import UnitRole
from slideplan.placement import Tier

COMPUTE, H2D, D2H, UPDATE = LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE


class TestCriticalPath:
    def test_a_chain_through_three_lanes(self) -> None:
        chain = graph((H2D, (), (2,)), (COMPUTE, (0,), ()), (UPDATE, (1,), ()))
        step_ns, spans = simulate(chain, [cost(10), cost(20), cost(30)], {})
        assert critical_path(chain, step_ns, spans) == {"compute": 20, "host_update": 30, "h2d": 10}

    def test_a_busy_lane_holds_the_step_alone(self) -> None:
        # Loads of 30 + 30 hide behind computes of 50 + 50, which wait for them only in the first step.
        costs = [cost(30), cost(50), cost(30), cost(50)]
        hidden = graph((H2D, (), ()), (COMPUTE, (0,), ()), (H2D, (), (3,)), (COMPUTE, (2,), ()))
        step_ns, spans = simulate(hidden, costs, {})
        assert step_ns == lower_bound(hidden, costs, {}) == 100
        assert critical_path(hidden, step_ns, spans) == {"compute": 100}

    def test_a_task_that_began_before_the_step_counts_from_its_opening(self) -> None:
        # The update of 90 binds the next load; only two of five tasks of the window lie wholly in it.
        lagging = graph((COMPUTE, (), ()), (H2D, (), (3,)), (COMPUTE, (1,), ()), (UPDATE, (2,), ()))
        costs = [cost(10), cost(5), cost(10), cost(90)]
        step_ns, spans = simulate(lagging, costs, {})
        found = critical_path(lagging, step_ns, spans)
        assert step_ns == 5 + 10 + 90
        assert found == {"compute": 10, "host_update": 90, "h2d": 5}

    @given(priced_graphs(contended=True))
    def test_lanes_add_up_to_the_step(self, priced) -> None:
        drawn, costs = priced
        step_ns, spans = simulate(drawn, costs, CAPACITIES)
        found = critical_path(drawn, step_ns, spans)
        assert sum(found.values()) == step_ns
        assert all(value >= 0 for value in found.values())
        assert set(found) <= {str(lane) for lane in drawn.lanes} | {"wait"}

    @given(priced_graphs(contended=False))
    def test_in_a_steady_step_something_always_holds_the_path(self, priced) -> None:
        drawn, costs = tied(priced[0]), priced[1]
        step_ns, spans = simulate(drawn, costs, {})
        earlier, later = trace(drawn, costs, {}, 12)[-2:]
        shifted = [(span.start_ns + step_ns, span.end_ns + step_ns) for span in earlier]
        assume(shifted == times(later))  # else it cycles through several steps, and no one step stands for all
        assert "wait" not in critical_path(drawn, step_ns, spans)


class TestBounds:
    @given(priced_graphs(contended=False))
    def test_a_carried_cycle_is_no_slower_than_the_slowest_of_the_graph(self, priced) -> None:
        drawn, durations = priced[0], [each.duration_ns for each in priced[1]]
        edges = nx.DiGraph()
        for queue in drawn.lanes.values():
            for number, previous in zip(queue, (queue[-1], *queue), strict=False):
                edges.add_edge(previous, number, steps=int(number == queue[0]))
        for number, task in enumerate(drawn.tasks):
            for d in task.dependencies:
                steps = min(d.distance, edges.edges.get((d.task, number), {"steps": 1})["steps"])
                edges.add_edge(d.task, number, steps=steps)
        assume(edges.number_of_edges() < 30)
        slowest = Fraction(0)
        for cycle in nx.simple_cycles(edges):
            steps = sum(edges.edges[pair]["steps"] for pair in zip(cycle, (*cycle[1:], cycle[0]), strict=True))
            assume(steps)  # else a deadlock
            slowest = max(slowest, Fraction(sum(durations[number] for number in cycle), steps))
        found = carried_cycle(drawn, durations)
        assert found <= slowest

    def test_the_longest_of_two_loops_is_found_though_it_starts_late(self) -> None:
        # Compute alone needs 100; load, compute t1 and update need 101, which shows only when the slack is used up.
        slow = graph((COMPUTE, (), ()), (H2D, (), (3,)), (COMPUTE, (1,), ()), (UPDATE, (2,), ()))
        assert carried_cycle(slow, [50, 11, 50, 40]) == 101

    def test_a_shared_resource_bounds_what_lanes_do_not(self) -> None:
        both = graph((COMPUTE, (), (1, 2)), (H2D, (), ()), (D2H, (), ()))
        costs = [cost(10), cost(100, {Resource.PCIE: 80}), cost(100, {Resource.PCIE: 80})]
        shared = {Resource.PCIE: 100}
        assert lower_bound(both, costs, {Resource.PCIE: 1000}) == 100
        assert 159 <= lower_bound(both, costs, shared) <= simulate(both, costs, shared)[0] == 160

    @given(priced_graphs(contended=True))
    def test_no_steady_step_is_shorter(self, priced) -> None:
        drawn, costs = tied(priced[0]), priced[1]
        # Tied lanes cannot drift apart, so 24 steps are never faster than 24 bounds but for the first's lead.
        starts = [step[0].start_ns for step in trace(drawn, costs, CAPACITIES, 49)]
        assert starts[-1] - starts[0] >= 48 * lower_bound(drawn, costs, CAPACITIES) - 2 * sum(c.duration_ns for c in costs)


class TestPredict:
    def test_prediction_of_a_lowered_policy(self) -> None:
        model, workload = tiny_model(), tiny_workload()
        machine = tiny_machine(
            costs=tuple(
                ComputeCost(
                    shape=LayerShape.of(model, UnitRole.LAYER), kind=kind, micro_batch=micro, seq_len=32,
                    duration_ns=Spread.exact(50_000), saved_bytes=0, workspace_bytes=0,
                )
                for kind, micro in ((TaskKind.FORWARD, 2), (TaskKind.BACKWARD_RECOMPUTE, 4))
            )
        )  # fmt: skip
        lowered = lower(model, tiny_policy(model), workload, footprint(model, tiny_policy(model), 32, machine))
        memory = ledger(lowered, machine)
        found = predict(lowered, model, tiny_policy(model), workload, machine, memory)
        assert found.record.step_ns >= found.lower_bound_ns > 0
        assert found.record.tokens_per_s == pytest.approx(128 * 1e9 / found.record.step_ns)
        assert found.record.peak_bytes == memory.peak_bytes()
        assert set(found.record.peak_bytes) == {Tier.GPU, Tier.HOST}
        assert sum(found.critical_ns.values()) == found.record.step_ns
        assert 0 < found.step_uncertainty_percent <= 45
        assert found.cost_sources == {
            "weights host>gpu": "measured",
            "forward": "derived",  # the layers' was measured, the embedding's was not
            "loss": "derived",
            "backward_recompute": "interpolated",
            "backward": "derived",
            "gradient gpu>host": "measured",
            "update host": "measured",
        }

    def test_shares_of_the_profile_reach_the_simulation(self) -> None:
        """Where lanes meet in host memory, who has the larger share there has the shorter tasks."""
        model, workload, policy = tiny_model(), tiny_workload(), tiny_policy(tiny_model())
        even = sharing(tiny_machine())
        usage = {lane: {Resource.HOST_DRAM: 1.0} for lane in (LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE)}
        found = {}
        for share in (0.1, 1.0, 10.0):
            fitted = Sharing(
                capacities=even.capacities | {Resource.HOST_DRAM: 12 * 10**9},
                usage=usage,
                shares={LaneKind.H2D: {Resource.HOST_DRAM: share}},
            )
            machine = tiny_machine(interference=Interference(alone={}, together=(), fitted=fitted))
            lowered = lower(model, policy, workload, footprint(model, policy, 32, machine))
            costs = price(lowered, model, policy, 32, machine)
            assert all(
                task.shares == ({Resource.HOST_DRAM: share} if lane.lane.kind is LaneKind.H2D else {})
                for lane, task in zip(lowered.tasks, costs, strict=True)
            )
            spans = predict(lowered, model, policy, workload, machine, ledger(lowered, machine)).record.spans
            found[share] = {lane: sum(spans[number].duration_ns for number in lowered.queue(lane)) for lane in usage}
        assert found[0.1][LaneKind.H2D] > found[1.0][LaneKind.H2D] > found[10.0][LaneKind.H2D]
        assert found[0.1][LaneKind.HOST_UPDATE] < found[10.0][LaneKind.HOST_UPDATE]

    def test_the_same_input_gives_the_same_prediction(self) -> None:
        model, workload, machine = tiny_model(), tiny_workload(), tiny_machine()
        lowered = lower(
            model, tiny_policy(model, offload_boundaries=True), workload, footprint(model, tiny_policy(model), 32, machine)
        )
        memory = ledger(lowered, machine)
        assert predict(lowered, model, tiny_policy(model), workload, machine, memory) == predict(
            lowered, model, tiny_policy(model), workload, machine, memory
        )
