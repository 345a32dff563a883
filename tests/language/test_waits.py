"""Where a lane stands still for longest, and for which dependency."""

from __future__ import annotations

from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, UPDATE_HOST, Operation
from slideplan.graph.tasks import Dependency, Task, TaskGraph
from slideplan.graph.waits import Wait, longest_wait
from slideplan.timeline import Span

COMPUTE = Lane(LaneKind.COMPUTE)


def graph(*tasks: tuple[Operation, tuple[Dependency, ...]]) -> TaskGraph:
    return TaskGraph(
        pools=(),
        tasks=tuple(
            Task(
                name=f"t{number}", operation=operation, unit=0, micro=None, bytes_moved=0, flops=0, accesses=(),
                dependencies=dependencies,
            )
            for number, (operation, dependencies) in enumerate(tasks)
        ),
    )  # fmt: skip


LOAD, UPDATE = Dependency(task=1, distance=0), Dependency(task=2, distance=1)
# Compute t0 and t3, which waits for a load and for the update of the step before.
WAITING = graph((FORWARD, ()), (LOAD_WEIGHTS, ()), (UPDATE_HOST, ()), (FORWARD, (LOAD, UPDATE)))


def spans(*times: tuple[int, int]) -> list[Span]:
    return [Span(start, end) for start, end in times]


def test_the_gap_is_told_with_the_dependency_that_ended_last() -> None:
    # The step is 100: the update of the step before ended at 30, or at 20.
    assert longest_wait(WAITING, spans((0, 10), (5, 25), (50, 130), (30, 100)), 100, COMPUTE) == Wait(3, 20, UPDATE)
    assert longest_wait(WAITING, spans((0, 10), (5, 25), (50, 120), (25, 100)), 100, COMPUTE) == Wait(3, 15, LOAD)


def test_the_gap_before_the_first_task_reaches_back_into_the_step_before() -> None:
    assert longest_wait(WAITING, spans((0, 10), (0, 11), (20, 30), (11, 70)), 100, COMPUTE) == Wait(0, 30, None)
    # Of two gaps the longer one; of equal ones the first.
    assert longest_wait(WAITING, spans((0, 10), (5, 50), (20, 30), (50, 70)), 100, COMPUTE) == Wait(3, 40, LOAD)
    assert longest_wait(WAITING, spans((0, 10), (5, 40), (20, 30), (40, 70)), 100, COMPUTE) == Wait(0, 30, None)


def test_a_lane_that_never_stands_still_waits_for_nothing() -> None:
    assert longest_wait(WAITING, spans((0, 10), (0, 10), (20, 30), (10, 100)), 100, COMPUTE) is None
    assert longest_wait(WAITING, spans((0, 10), (0, 10), (20, 30), (11, 100)), 100, COMPUTE) == Wait(3, 1, LOAD)
