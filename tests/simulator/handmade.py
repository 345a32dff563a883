"""Task graphs written by hand: lanes and dependencies, no slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulator import Resource, TaskCost
from slideplan.graph.tasks import Dependency, Lane, Task, TaskGraph, TaskKind
from slideplan.timeline import Span

KIND = {
    Lane.COMPUTE: TaskKind.FORWARD,
    Lane.H2D: TaskKind.LOAD_WEIGHTS,
    Lane.D2H: TaskKind.OFFLOAD_GRADIENT,
    Lane.HOST_UPDATE: TaskKind.UPDATE_HOST,
    Lane.GPU_UPDATE: TaskKind.UPDATE_GPU,
}


def graph(*tasks: tuple[Lane, Sequence[int], Sequence[int]]) -> TaskGraph:
    """Tasks t0, t1, ... as (lane, dependencies in the same step, dependencies in the step before)."""
    return TaskGraph(
        pools=(),
        tasks=tuple(
            Task(
                name=f"t{number}",
                kind=KIND[lane],
                unit=0,
                micro=None,
                bytes_moved=0,
                flops=0,
                accesses=(),
                dependencies=(
                    *(Dependency(task=other, distance=1) for other in before),
                    *(Dependency(task=other, distance=0) for other in same),
                ),
            )
            for number, (lane, same, before) in enumerate(tasks)
        ),
    )


def cost(
    duration_ns: int, demand: Mapping[Resource, int] | None = None, weights: Mapping[Resource, float] | None = None
) -> TaskCost:
    return TaskCost(duration_ns=duration_ns, demand=dict(demand or {}), source="measured", weights=dict(weights or {}))


def times(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.start_ns, span.end_ns) for span in spans]
