from __future__ import annotations

import pytest
from hypothesis import assume, given

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from handmade import cost, graph, times
from random_graphs import CAPACITIES, priced_graphs, tied
from slideplan.plan.graph import Lane, TaskKind
from slideplan.plan.ledger import ledger
from slideplan.plan.lowering import lower
from slideplan.plan.machine import ComputeCost, LayerShape, Spread
from slideplan.plan.model import UnitRole
from slideplan.plan.policy import Tier
from slideplan.simulator import critical_path, footprint, lower_bound, predict, simulate, trace

COMPUTE, H2D, D2H, UPDATE = Lane.COMPUTE, Lane.H2D, Lane.D2H, Lane.HOST_UPDATE


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
        lowered = lower(model, tiny_policy(model), workload, footprint(model, 2, 32, machine))
        memory = ledger(lowered, machine)
        found = predict(lowered, model, 2, workload, machine, memory)
        assert found.record.step_ns >= found.lower_bound_ns > 0
        assert found.record.tokens_per_s == pytest.approx(128 * 1e9 / found.record.step_ns)
        assert found.record.peak_bytes == memory.peak_bytes()
        assert set(found.record.peak_bytes) == {Tier.GPU, Tier.HOST}
        assert sum(found.critical_ns.values()) == found.record.step_ns
        assert found.cost_sources == {
            "load_weights": "measured",
            "forward": "derived",  # the layers' was measured, the embedding's was not
            "loss": "derived",
            "backward_recompute": "scaled",
            "backward": "derived",
            "offload_gradient": "measured",
            "update_host": "measured",
        }

    def test_the_same_input_gives_the_same_prediction(self) -> None:
        model, workload, machine = tiny_model(), tiny_workload(), tiny_machine()
        lowered = lower(model, tiny_policy(model, offload_boundaries=True), workload, footprint(model, 2, 32, machine))
        memory = ledger(lowered, machine)
        assert predict(lowered, model, 2, workload, machine, memory) == predict(lowered, model, 2, workload, machine, memory)
