"""Task graphs written by hand: lanes and dependencies, no slots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simulator import Resource, TaskCost
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_GPU, UPDATE_HOST
from slideplan.graph.tasks import Dependency, Task, TaskGraph
from slideplan.timeline import Span

OPERATION = {
    LaneKind.COMPUTE: FORWARD,
    LaneKind.H2D: LOAD_WEIGHTS,
    LaneKind.D2H: OFFLOAD_GRADIENT,
    LaneKind.HOST_UPDATE: UPDATE_HOST,
    LaneKind.GPU_UPDATE: UPDATE_GPU,
}


def graph(*tasks: tuple[LaneKind, Sequence[int], Sequence[int]]) -> TaskGraph:
    """Tasks t0, t1, ... as (lane, dependencies in the same step, dependencies in the step before)."""
    return TaskGraph(
        pools=(),
        tasks=tuple(
            Task(
                name=f"t{number}",
                operation=OPERATION[lane],
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
    duration_ns: int, demand: Mapping[Resource, int] | None = None, shares: Mapping[Resource, float] | None = None
) -> TaskCost:
    return TaskCost(duration_ns=duration_ns, demand=dict(demand or {}), source="measured", shares=dict(shares or {}))


def times(spans: Sequence[Span]) -> list[tuple[int, int]]:
    return [(span.start_ns, span.end_ns) for span in spans]
