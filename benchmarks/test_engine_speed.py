"""Task events per second of the engine on a large streamed graph: run with --benchmark-enable.

An event is a task's start or its end; the engine's setup counts as time. Where
compute was measured to slow under copies (gpu_shared), every compute task is a flow too.
"""

from __future__ import annotations

import pytest

from builders import GB_PER_S, tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import capacities, footprint, price, sharing, trace
from simulator.engine import EngineMaker, FastEngine
from simulator.reference import SimPyEngine
from slideplan.graph.lanes import LaneKind
from slideplan.lowering.lower import lower
from slideplan.machine.profile import Interference, MachineProfile
from slideplan.machine.sharing import Resource, Sharing

STEPS = 3


def with_gpu_shared(machine: MachineProfile) -> MachineProfile:
    """Copies take a twentieth of the GPU at their full rate."""
    even = sharing(machine)
    gpu_bytes_per_s = machine.gpu.memory_bytes_per_s
    part = {Resource.GPU: gpu_bytes_per_s / 20 / (10 * GB_PER_S)}
    fitted = Sharing(
        capacities=even.capacities | {Resource.GPU: gpu_bytes_per_s},
        usage={lane: usage | (part if lane in (LaneKind.H2D, LaneKind.D2H) else {}) for lane, usage in even.usage.items()}
        | {LaneKind.COMPUTE: {Resource.GPU: 1.0}},
        shares={LaneKind.COMPUTE: {Resource.GPU: 0.1}},
    )
    return tiny_machine(interference=Interference(alone={}, together=(), fitted=fitted))


@pytest.mark.parametrize("gpu_shared", [False, True])
@pytest.mark.parametrize("engine", [FastEngine, SimPyEngine])
@pytest.mark.parametrize("micro_batches", [1, 4, 8])
def test_engine_speed(benchmark, micro_batches: int, engine: EngineMaker, gpu_shared: bool) -> None:
    model = tiny_model(layers=88)
    machine = with_gpu_shared(tiny_machine()) if gpu_shared else tiny_machine()
    policy = tiny_policy(model, micro_batches=micro_batches, window=4, offload_boundaries=True)
    workload = tiny_workload(global_batch=2 * micro_batches)
    graph = lower(model, policy, workload, footprint(model, policy, workload.seq_len, machine))
    costs = price(graph, model, policy, workload.seq_len, machine)
    log = benchmark(trace, graph, costs, capacities(machine), STEPS, engine)
    assert len(log) == STEPS
    if benchmark.stats is not None:
        benchmark.extra_info["task_events_per_s"] = round(2 * STEPS * len(graph.tasks) / benchmark.stats.stats.median)
