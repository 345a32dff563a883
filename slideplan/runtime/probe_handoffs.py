"""Probe of hand-offs: a cycle of small tasks through the executor's lanes, each waiting for the one before."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from slideplan.plan.graph import Dependency, Task, TaskGraph, TaskKind
from slideplan.plan.machine import Spread
from slideplan.plan.policy import Tier
from slideplan.runtime.backend import Backend
from slideplan.runtime.executor import Executor
from slideplan.runtime.optimizer import AdamW, HostUpdate
from slideplan.runtime.probing import spread

# A copy long enough for the lanes behind it to have issued what they do before it ends, as in runs.
COPY_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
# Enough for the optimizer's threads to be awake when it ends, as in runs.
ELEMENTS = 1 << 22
ROUNDS, WARMUP_ROUNDS = 48, 8

# Weights come, are used, a gradient leaves, the host updates the weights that come next.
CYCLE = (TaskKind.LOAD_WEIGHTS, TaskKind.FORWARD, TaskKind.OFFLOAD_GRADIENT, TaskKind.UPDATE_HOST)


def handoffs(backend: Backend, threads: int) -> dict[str, Spread]:
    """Fields of `Handoffs` over the rounds of the cycle; between streams, of both hand-offs there are."""
    size = COPY_BYTES[backend.name]
    on_host, on_gpu = ([backend.allocate(tier, size, copied=True) for _ in range(2)] for tier in (Tier.HOST, Tier.GPU))
    bf16 = [torch.zeros(ELEMENTS, dtype=torch.bfloat16) for _ in range(2)]
    remainder, moments = torch.zeros(ELEMENTS, dtype=torch.int16), torch.zeros(2, ELEMENTS)
    update = HostUpdate(threads)
    actions: dict[TaskKind, Callable[[], object]] = {
        TaskKind.LOAD_WEIGHTS: lambda: on_gpu[0].copy_(on_host[0], non_blocking=True),
        TaskKind.FORWARD: lambda: on_gpu[1].copy_(on_gpu[0]),
        TaskKind.OFFLOAD_GRADIENT: lambda: on_host[1].copy_(on_gpu[1], non_blocking=True),
        TaskKind.UPDATE_HOST: lambda: update(bf16[0], remainder, moments, bf16[1], AdamW(), 0),
    }
    tasks = [
        Task(
            name=str(kind), kind=kind, unit=1, micro=None, bytes_moved=0, flops=0, accesses=(),
            dependencies=(Dependency(task=(number - 1) % len(CYCLE), distance=0 if number else 1),),
        )
        for number, kind in enumerate(CYCLE)
    ]  # fmt: skip
    backend.synchronize()  # buffers were filled on the default stream, for which no lane waits

    def act(task: Task, step: int) -> None:
        actions[task.kind]()

    executor = Executor(TaskGraph(pools=(), tasks=tuple(tasks)), backend, act, ROUNDS)
    times: list[tuple[int, int]] = []  # of every task, in the order of the cycle
    for step in executor:
        if step:
            times += _absolute(executor, step - 1)
    times += _absolute(executor, ROUNDS - 1)
    gaps = [after[0] - before[1] for before, after in pairwise(times[WARMUP_ROUNDS * len(CYCLE) :])]
    # Gap number n is the one before task n + 1 of the cycle. Clocks of GPU and host agree to some microseconds only.
    before = {kind: [max(0, gap) for gap in gaps[(number - 1) % len(CYCLE) :: len(CYCLE)]] for number, kind in enumerate(CYCLE)}
    return {
        "device_to_device_ns": spread(before[TaskKind.FORWARD] + before[TaskKind.OFFLOAD_GRADIENT]),
        "device_to_host_ns": spread(before[TaskKind.UPDATE_HOST]),
        "host_to_device_ns": spread(before[TaskKind.LOAD_WEIGHTS]),
    }


def _absolute(executor: Executor, step: int) -> list[tuple[int, int]]:
    origin, spans = executor.spans(step)
    return [(origin + span.start_ns, origin + span.end_ns) for span in spans]
