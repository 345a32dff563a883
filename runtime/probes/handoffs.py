"""Probe of hand-offs: a cycle of small tasks through the executor's lanes, each waiting for the one before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from runtime.lanes.backend import Backend
from runtime.lanes.executor import Executor
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.probes.timing import spread
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST, Operation
from slideplan.graph.tasks import Dependency, Task, TaskGraph
from slideplan.machine.profile import Spread
from slideplan.placement import Tier

# A copy long enough for the lanes behind it to have issued what they do before it ends, as in runs.
COPY_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
# Enough for the optimizer's threads to be awake when it ends, as in runs; less than the copies take.
ELEMENTS = {"cuda": 1 << 22, "cpu": 1 << 16}
ROUNDS, WARMUP_ROUNDS = 48, 8

# Weights come, are used, a gradient leaves, the host updates the weights that come next. Then it goes on with other
# weights, for which nobody waits: while a lane wakes, the optimizer's threads have work, as in runs.
CYCLE = (LOAD_WEIGHTS, FORWARD, OFFLOAD_GRADIENT, UPDATE_HOST)


def handoffs(backend: Backend, threads: int) -> dict[str, Spread]:
    """Fields of `Handoffs` over the rounds of the cycle; between streams, of both hand-offs there are."""
    size = COPY_BYTES[backend.name]
    on_host, on_gpu = ([backend.allocate(tier, size, copied=True) for _ in range(2)] for tier in (Tier.HOST, Tier.GPU))
    elements = ELEMENTS[backend.name]
    bf16 = [torch.zeros(elements, dtype=torch.bfloat16) for _ in range(2)]
    remainder, moments = torch.zeros(elements, dtype=torch.int16), torch.zeros(2, elements)
    update = HostUpdate(threads)
    actions: dict[Operation, Callable[[], object]] = {
        LOAD_WEIGHTS: lambda: on_gpu[0].copy_(on_host[0], non_blocking=True),
        FORWARD: lambda: on_gpu[1].copy_(on_gpu[0]),
        OFFLOAD_GRADIENT: lambda: on_host[1].copy_(on_gpu[1], non_blocking=True),
        UPDATE_HOST: lambda: update(bf16[0], remainder, moments, bf16[1], AdamW(), 0),
    }
    backend.synchronize()  # buffers were filled on the default stream, for which no lane waits

    def act(task: Task, step: int) -> None:
        actions[task.operation]()

    graph = cycle_graph()
    executor = Executor(graph, backend, act, ROUNDS)
    rounds: list[list[tuple[int, int]]] = []
    for step in executor:
        if step:
            rounds.append(_absolute(executor, step - 1))
    rounds.append(_absolute(executor, ROUNDS - 1))
    gaps_ns: dict[LaneKind, list[int]] = {task.lane.kind: [] for task in graph.tasks}
    for before, spans in list(pairwise(rounds))[WARMUP_ROUNDS:]:
        for task, (start, _) in zip(graph.tasks, spans, strict=True):
            for dependency in task.dependencies:
                free = (before if dependency.distance else spans)[dependency.task][1]
                if task.lane.kind is LaneKind.HOST_UPDATE:
                    free = max(free, before[-1][1])  # the update for which nobody waits comes first
                # Clocks of GPU and host agree to some microseconds only.
                gaps_ns[task.lane.kind].append(max(0, start - free))
    return {
        "device_to_device_ns": spread(gaps_ns[LaneKind.COMPUTE] + gaps_ns[LaneKind.D2H]),
        "device_to_host_ns": spread(gaps_ns[LaneKind.HOST_UPDATE]),
        "host_to_device_ns": spread(gaps_ns[LaneKind.H2D]),
    }


def cycle_graph() -> TaskGraph:
    """One round of the cycle as a step."""
    tasks = [
        Task(
            name=str(operation), operation=operation, unit=1, micro=None, bytes_moved=0, flops=0, accesses=(),
            dependencies=(Dependency(task=(number - 1) % len(CYCLE), distance=0 if number else 1),),
        )
        for number, operation in enumerate(CYCLE)
    ]  # fmt: skip
    other = Task(name="other", operation=UPDATE_HOST, unit=2, micro=None, bytes_moved=0, flops=0, accesses=())
    return TaskGraph(pools=(), tasks=(*tasks, other))


def _absolute(executor: Executor, step: int) -> list[tuple[int, int]]:
    origin, spans = executor.spans(step)
    return [(origin + span.start_ns, origin + span.end_ns) for span in spans]
