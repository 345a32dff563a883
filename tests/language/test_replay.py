from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import tiny_workload
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import FORWARD, LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST, Operation
from slideplan.graph.replay import replay, unroll
from slideplan.graph.tasks import Dependency, Task, TaskGraph
from slideplan.timeline import Span, step_record
from strategies import Case, cases

H2D, COMPUTE, D2H, HOST = (
    LOAD_WEIGHTS, FORWARD, OFFLOAD_GRADIENT, UPDATE_HOST,
)  # fmt: skip


def graph_of(*tasks: tuple[Operation, list[tuple[int, int]]]) -> TaskGraph:
    """Tasks as (operation, [(task, distance), ...])."""
    return TaskGraph(
        pools=(),
        tasks=tuple(
            Task(
                name=f"t{number}", operation=operation, unit=0, micro=None, bytes_moved=0, flops=0, accesses=(),
                dependencies=tuple(Dependency(task=task, distance=distance) for task, distance in edges),
            )
            for number, (operation, edges) in enumerate(tasks)
        ),
    )  # fmt: skip


def span(start: int, end: int) -> Span:
    return Span(start_ns=start, end_ns=end)


def test_first_steps_by_hand():
    """Two loads and two forwards: load 0 waits for forward 0 of the step before, its slot's last reader."""
    graph = graph_of((H2D, [(1, 1)]), (COMPUTE, [(0, 0)]), (H2D, []), (COMPUTE, [(2, 0)]))
    first, second = unroll(graph, [10, 20, 10, 5], steps=2)
    assert first == [span(0, 10), span(10, 30), span(10, 20), span(30, 35)]
    assert second == [span(30, 40), span(40, 60), span(40, 50), span(60, 65)]


def test_steady_step_is_the_slower_of_lane_and_cycle():
    free = graph_of((H2D, []), (COMPUTE, [(0, 0)]))
    assert replay(free, [10, 20])[0] == 20
    assert replay(free, [30, 20])[0] == 30
    bound = graph_of((H2D, [(1, 1)]), (COMPUTE, [(0, 0)]))
    assert replay(bound, [10, 20]) == (30, [span(-10, 0), span(0, 20)])


def test_update_may_end_beyond_the_step():
    graph = graph_of((H2D, [(3, 1)]), (COMPUTE, [(0, 0)]), (D2H, [(1, 0)]), (HOST, [(2, 0)]))
    step_ns, spans = replay(graph, [1, 20, 3, 30])
    assert step_ns == 54
    assert spans == [span(-1, 0), span(0, 20), span(20, 23), span(23, 53)]


def test_step_time_is_the_mean_over_a_cycle_of_several_steps():
    """A chain of 160 ns closes over two steps, so steps take 40 and 120 ns in turn."""
    graph = graph_of((COMPUTE, [(3, 1)]), (H2D, [(0, 0)]), (D2H, [(1, 0)]), (HOST, [(2, 1)]))
    origins = [step[0].start_ns for step in unroll(graph, [40, 40, 40, 40], steps=6)]
    assert [after - before for before, after in pairwise(origins)] == [40, 120, 40, 120, 40]
    assert replay(graph, [40, 40, 40, 40])[0] == 80


def test_durations_must_match_the_tasks():
    with pytest.raises(ValueError, match=r"zip\(\)"):
        replay(graph_of((COMPUTE, [])), [1, 2])


def test_step_record_sums_lanes():
    graph = graph_of((H2D, []), (COMPUTE, [(0, 0)]), (H2D, []))
    record = step_record(graph, tiny_workload(seq_len=10, global_batch=5), 100, [span(-10, 0), span(0, 60), span(0, 30)], {})
    assert {lane: (use.busy_ns, use.idle_ns, use.tasks) for lane, use in record.lanes.items()} == {
        LaneKind.COMPUTE: (60, 40, 1), LaneKind.H2D: (40, 60, 2),
    }  # fmt: skip
    assert record.tokens_per_s == 50 * 1e9 / 100
    with pytest.raises(ValueError, match="1 spans for 3 tasks"):
        step_record(graph, tiny_workload(), 100, [span(0, 1)], {})


@given(cases(), st.integers())
def test_steady_step_of_any_schedule(case: Case, seed: int):
    """No lane is faster than its work; far-out unrolling shows the step time that replay states."""
    graph = case.graph()
    source = random.Random(seed)
    durations = [source.randint(1, 1000) for _ in graph.tasks]
    step_ns, spans = replay(graph, durations)
    assert step_ns >= max(sum(durations[number] for number in queue) for queue in graph.lanes.values())
    assert [found.end_ns - found.start_ns for found in spans] == durations
    opener = graph.queue(LaneKind.COMPUTE)[0]
    origins = [step[opener].start_ns for step in unroll(graph, durations, steps=121)]
    assert (origins[120] - origins[60]) / 60 == pytest.approx(step_ns, abs=1)
