"""What happened in a step, predicted or measured: the same fields for both."""

from __future__ import annotations

from collections.abc import Sequence

from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import TaskGraph
from slideplan.placement import Tier
from slideplan.policy import Workload


class Span(Spec, frozen=True, array_like=True):
    """When one task held its lane. Zero is the start of the step's first compute task.

    A load issued in the step before starts below zero; an update may end beyond the step.
    """

    start_ns: int
    end_ns: int

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class LaneUse(Spec, frozen=True):
    """Share of a steady step in which a lane works."""

    busy_ns: int
    idle_ns: int
    tasks: int


class StepRecord(Spec, frozen=True):
    """One steady step. `lanes`: by their names; `spans` follows the task numbers of the graph; `peak_bytes` is per tier."""

    step_ns: int
    tokens_per_s: float
    lanes: dict[str, LaneUse]
    peak_bytes: dict[Tier, int]
    spans: tuple[Span, ...]


def step_record(
    graph: TaskGraph, workload: Workload, step_ns: int, spans: Sequence[Span], peak_bytes: dict[Tier, int]
) -> StepRecord:
    """Sum spans up per lane. Raises ValueError where spans and tasks differ in number."""
    if len(spans) != len(graph.tasks):
        raise ValueError(f"{len(spans)} spans for {len(graph.tasks)} tasks")
    lanes = {}
    for lane, queue in graph.lanes.items():
        busy = sum(spans[number].duration_ns for number in queue)
        lanes[lane.name] = LaneUse(busy_ns=busy, idle_ns=max(0, step_ns - busy), tasks=len(queue))
    return StepRecord(
        step_ns=step_ns,
        tokens_per_s=workload.tokens * 1e9 / max(1, step_ns),
        lanes=lanes,
        peak_bytes=peak_bytes,
        spans=tuple(spans),
    )


def first_compute(graph: TaskGraph) -> int:
    """Number of the task whose start opens the step."""
    return graph.queue(LaneKind.COMPUTE)[0]
