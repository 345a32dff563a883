"""Random task graphs for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from handmade import OPERATION, cost, graph
from simulator import Resource, TaskCost
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.handoffs import Handoffs

CAPACITIES = {Resource.PCIE: 80, Resource.HOST_DRAM: 100, Resource.SSD: 30, Resource.GPU: 50}

demands = st.dictionaries(st.sampled_from(list(Resource)), st.integers(1, 120), max_size=3)
shares = st.dictionaries(st.sampled_from(list(Resource)), st.sampled_from([0.1, 0.5, 1.0, 1.4, 8.0]), max_size=2)

handoffs = st.builds(
    Handoffs,
    device_to_device_ns=st.integers(0, 9),
    device_to_host_ns=st.integers(0, 300),
    host_to_device_ns=st.integers(0, 300),
)


@st.composite
def task_graphs(draw: st.DrawFn, max_tasks: int = 14) -> TaskGraph:
    """Random lanes, the first one compute; stored order is topological, edges carry into any task."""
    count = draw(st.integers(1, max_tasks))
    tasks = []
    for number in range(count):
        lane = draw(st.sampled_from(list(OPERATION))) if number else LaneKind.COMPUTE
        same = draw(st.sets(st.integers(0, number - 1), max_size=3)) if number else set()
        before = draw(st.sets(st.integers(0, count - 1), max_size=2))
        tasks.append((lane, sorted(same), sorted(before)))
    return graph(*tasks)


def tied(drawn: TaskGraph) -> TaskGraph:
    """The same, with each lane's last task before the next step's first compute task: no lane lags behind for good."""
    last = [queue[-1] for queue in drawn.lanes.values()]
    tasks = []
    for number, task in enumerate(drawn.tasks):
        same = [d.task for d in task.dependencies if d.distance == 0]
        before = [d.task for d in task.dependencies if d.distance == 1]
        tasks.append((task.lane.kind, same, last if number == 0 else before))
    return graph(*tasks)


@st.composite
def priced_graphs(draw: st.DrawFn, contended: bool) -> tuple[TaskGraph, list[TaskCost]]:
    drawn = draw(task_graphs())
    durations = draw(st.lists(st.integers(0, 1000), min_size=len(drawn.tasks), max_size=len(drawn.tasks)))
    return drawn, [cost(duration, draw(demands), draw(shares)) if contended else cost(duration) for duration in durations]
