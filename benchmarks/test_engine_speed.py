"""Task events per second of the engine on a large streamed graph: run with --benchmark-enable.

An event is a task's start or its end; the engine's setup counts as time.
"""

from __future__ import annotations

import pytest

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from slideplan.plan.lowering import lower
from slideplan.simulator import capacities, footprint, price, trace
from slideplan.simulator.engine import EngineMaker, FastEngine
from slideplan.simulator.reference import SimPyEngine

STEPS = 3


@pytest.mark.parametrize("engine", [FastEngine, SimPyEngine])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_engine_speed(benchmark, micro_batches: int, engine: EngineMaker) -> None:
    model, machine = tiny_model(layers=88), tiny_machine()
    policy = tiny_policy(model, micro_batches=micro_batches, window=4, offload_boundaries=True)
    workload = tiny_workload(global_batch=2 * micro_batches)
    graph = lower(model, policy, workload, footprint(model, 2, workload.seq_len, machine))
    costs = price(graph, model, 2, workload.seq_len, machine)
    log = benchmark(trace, graph, costs, capacities(machine), STEPS, engine)
    assert len(log) == STEPS
    if benchmark.stats is not None:
        benchmark.extra_info["task_events_per_s"] = round(2 * STEPS * len(graph.tasks) / benchmark.stats.stats.median)
