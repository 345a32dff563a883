"""Every derived dependency says because of which slot, and how."""

from __future__ import annotations

from itertools import count

import pytest
from hypothesis import given

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.operations import FORWARD
from slideplan.graph.tasks import Access, Dependency, Hazard, Role, Task, TaskGraph
from slideplan.lowering.edges import derive
from slideplan.lowering.lower import lower
from slideplan.placement import Tier
from strategies import FOOTPRINT, Case, cases, foreign_cases

# Modes of the waiting task and of the one that it waits for.
FITTING: dict[Hazard, tuple[set[str], set[str]]] = {
    "reads": ({"r", "rw"}, {"w", "rw"}),
    "overwrites_read": ({"w", "rw"}, {"r"}),
    "overwrites_written": ({"w"}, {"w", "rw"}),
}


def modes(task: Task, dependency: Dependency) -> set[str]:
    return {access.mode for access in task.accesses if (access.pool, access.slot) == (dependency.pool, dependency.slot)}


def check(graph: TaskGraph) -> None:
    """What an edge names is used by both of its tasks as its hazard says, and written by nobody between them."""
    writers: dict[tuple[str, int], list[int]] = {}
    total = len(graph.tasks)
    for number, task in enumerate(graph.tasks):
        for access in task.accesses:
            if access.mode != "r":
                writers.setdefault((access.pool, access.slot), []).append(number)
    for number, task in enumerate(graph.tasks):
        for each in task.dependencies:
            other = graph.tasks[each.task]
            waiting, awaited = FITTING[each.hazard]
            assert modes(task, each) & waiting, (task.name, each)
            assert modes(other, each) & awaited, (task.name, each)
            first, last = each.task, number + total * each.distance
            between = [
                writer
                for writer in writers.get((each.pool, each.slot), ())
                for instance in (writer, writer + total)
                if first < instance < last
            ]
            assert not between, (task.name, graph.reason(each), graph.tasks[between[0]].name)


@given(cases())
def test_the_slot_of_every_edge_is_used_as_its_hazard_says(case: Case):
    check(case.graph())


@given(foreign_cases())
def test_the_slot_of_every_edge_of_other_systems_is_used_as_its_hazard_says(case: Case):
    check(case.graph())


@given(cases())
def test_why_has_a_line_for_every_edge_with_slot_and_task(case: Case):
    graph = case.graph()
    assert not all(graph.why(number) == [] for number in range(len(graph.tasks)))
    for number, task in enumerate(graph.tasks):
        lines = graph.why(number)
        assert len(lines) == len(task.dependencies)
        for line, each in zip(lines, task.dependencies, strict=True):
            assert line.startswith(f"slot {each.slot} of {each.pool}, ")
            assert graph.tasks[each.task].name in line
            assert line.endswith(" of the step before") == (each.distance == 1)


def test_why_in_words():
    model = tiny_model()
    graph = lower(model, tiny_policy(model, gradient_slots=1), tiny_workload(), FOOTPRINT)
    number = {task.name: place for place, task in enumerate(graph.tasks)}
    assert graph.why(number["weights host>gpu/embedding"]) == [
        "slot 0 of host.weights.embedding, written by update host/embedding of the step before"
    ]
    assert graph.why(number["weights host>gpu/layer000"]) == []  # updated before the embedding, on the same lane
    assert graph.why(number["forward/layer000/mb0"]) == ["slot 0 of gpu.weights.window, written by weights host>gpu/layer000"]
    assert graph.why(number["backward_recompute/layer002/mb0"]) == [
        "slot 0 of gpu.gradient.layer, still read by gradient gpu>host/layer003"
    ]
    assert graph.why(number["forward/layer000/mb1"]) == []


# -- graphs made by hand -----------------------------------------------------------------------


def graph_of(*accesses: tuple[int, str, int, str]) -> TaskGraph:
    """One task each, from device, pool, slot and mode; every device has a compute lane of its own."""
    number = count()
    tasks = tuple(
        Task(
            name=f"task{next(number)}", operation=FORWARD, unit=0, micro=0, bytes_moved=0, flops=0, device=device,
            accesses=(Access(Role.WEIGHTS, Tier.GPU, pool, slot, mode),),
        )
        for device, pool, slot, mode in accesses
    )  # fmt: skip
    graph = TaskGraph(pools=(), tasks=tasks)
    return TaskGraph(pools=(), tasks=derive(graph))


@pytest.mark.parametrize(
    ("first", "second", "hazard", "words"),
    [
        ("w", "r", "reads", "slot 3 of a, written by task0"),
        ("w", "rw", "reads", "slot 3 of a, written by task0"),
        ("rw", "r", "reads", "slot 3 of a, written by task0"),
        ("r", "w", "overwrites_read", "slot 3 of a, still read by task0"),
        ("r", "rw", "overwrites_read", "slot 3 of a, still read by task0"),
        ("w", "w", "overwrites_written", "slot 3 of a, written before by task0"),
        ("rw", "w", "overwrites_written", "slot 3 of a, written before by task0"),
    ],
)
def test_hazards_by_modes(first: str, second: str, hazard: Hazard, words: str):
    graph = graph_of((0, "a", 3, first), (1, "a", 3, second))
    assert graph.tasks[1].dependencies == (Dependency(task=0, distance=0, pool="a", slot=3, hazard=hazard),)
    assert graph.why(1) == [words]


def test_two_readers_wait_for_nobody_and_other_slots_do_not_meet():
    assert not any(task.dependencies for task in graph_of((0, "a", 0, "r"), (1, "a", 0, "r")).tasks)
    assert not any(task.dependencies for task in graph_of((0, "a", 0, "w"), (1, "a", 1, "w"), (2, "b", 0, "w")).tasks)


def test_edges_into_the_step_before_name_their_slot_too():
    graph = graph_of((0, "a", 0, "r"), (1, "a", 0, "w"))
    assert graph.tasks[0].dependencies == (Dependency(task=1, distance=1, pool="a", slot=0, hazard="reads"),)
    assert graph.why(0) == ["slot 0 of a, written by task1 of the step before"]
    assert graph.why(1) == ["slot 0 of a, still read by task0"]


def test_the_last_writer_is_waited_for_and_not_the_one_before_it():
    graph = graph_of((0, "a", 0, "w"), (1, "a", 0, "w"), (2, "a", 0, "r"))
    assert graph.tasks[2].dependencies == (Dependency(task=1, distance=0, pool="a", slot=0, hazard="reads"),)
