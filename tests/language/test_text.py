"""Schedules as text: golden grids, and names that parse back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.operations import COMPUTE_KINDS, TaskKind, compute, copy, host_pass, update
from slideplan.graph.replay import replay
from slideplan.graph.tasks import TaskGraph
from slideplan.graph.text import Named, grid, names, parse_grid, parse_name, short_name
from slideplan.lowering.lower import lower
from slideplan.placement import STATE, TensorClass, Tier
from strategies import FOOTPRINT, Case, cases

GOLDEN = Path(__file__).parent / "golden"
WORKLOAD = tiny_workload()

# Name -> model and knobs. Together they have every mechanism in them.
SCHEDULES = {
    "streamed": ({}, {}),
    "every_mechanism": (
        {"tied_embeddings": True},
        {
            "resident_weights": (1,), "resident_state": (4,), "keep": (4,), "offload_boundaries": True,
            "update_order": (0, 1, 2, 3, 5),
        },
    ),
    "passing_state": (
        {},
        {
            "resident_state": (0,), "stream_state": (1,), "resident_weights": (4,), "keep": (4,), "offload_inner": (3,),
            "update_order": (2, 3, 4, 5), "gradient_norms": True, "kernels": "fused",
        },
    ),
    "other_system": ({}, {"master": "fp32", "staging": "per_load", "step_barrier": True, "copy_lanes": "shared"}),
}  # fmt: skip


def steady(graph: TaskGraph) -> str:
    """The grid of a graph whose tasks all take a millisecond."""
    step_ns, spans = replay(graph, [1_000_000] * len(graph.tasks))
    return grid(graph, spans, step_ns, width=120)


def lowered(name: str) -> TaskGraph:
    fields, knobs = SCHEDULES[name]
    model = tiny_model(**fields)
    return lower(model, tiny_policy(model, **knobs), WORKLOAD, FOOTPRINT)


@pytest.mark.parametrize("name", SCHEDULES)
def test_golden_schedule(name: str, update_golden: bool) -> None:
    """Lanes, their order and when tasks start; dependencies show in the times, and stand below."""
    graph = lowered(name)
    waits = [f"{task.name}: {reason}" for number, task in enumerate(graph.tasks) for reason in graph.why(number)]
    text = steady(graph) + "\n\n" + "\n".join(waits) + "\n"
    file = GOLDEN / f"{name}.txt"
    if update_golden:
        file.write_text(text)
    assert text == file.read_text(), "the schedule changed; if that is meant, run pytest --update-golden"


@given(cases())
def test_a_grid_parses_back_to_every_lanes_queue(case: Case) -> None:
    graph = case.graph()
    found = parse_grid(steady(graph))
    named = names(graph)
    assert set(found) == {lane.name for lane in graph.lanes}
    for lane, queue in graph.lanes.items():
        read = found[lane.name]
        wanted = [named[number] for number in queue]
        assert len(read) == len(wanted)
        assert {each._replace(step=0) for each in read} == set(wanted)
        # A steady schedule is a circle: put back by the step that each belongs to, it is the lane's queue.
        steps = sorted({each.step for each in read}, reverse=True)
        by_step = [each._replace(step=0) for step in steps for each in read if each.step == step]
        assert by_step == wanted


@given(cases())
def test_short_names_tell_all_tasks_of_a_step_apart(case: Case) -> None:
    graph = case.graph()
    texts = [short_name(named) for named in names(graph)]
    assert len(set(texts)) == len(graph.tasks)
    assert [parse_name(text) for text in texts] == names(graph)


OPERATIONS = [
    *(compute(kind) for kind in COMPUTE_KINDS),
    update(Tier.HOST),
    update(Tier.GPU),
    *(host_pass(kind) for kind in (TaskKind.CAST_WEIGHTS, TaskKind.CLIP_GRADIENT, TaskKind.REFRESH_WEIGHTS)),
    *(
        copy(source, target, *tensors)
        for source, target in ((Tier.HOST, Tier.GPU), (Tier.GPU, Tier.HOST), (Tier.SSD, Tier.HOST), (Tier.HOST, Tier.SSD))
        for tensors in ((TensorClass.WEIGHTS,), (TensorClass.MOMENTS,), (TensorClass.REMAINDER,), STATE)
    ),
]


@given(
    st.builds(
        Named,
        operation=st.sampled_from(OPERATIONS),
        unit=st.integers(0, 200),
        micro=st.none() | st.integers(0, 99),
        chunk=st.none() | st.integers(0, 63),
        earlier=st.integers(0, 3),
        device=st.integers(0, 8),
        step=st.integers(-2, 2),
    )
)
def test_any_short_name_parses_back(named: Named) -> None:
    assert parse_name(short_name(named)) == named


@pytest.mark.parametrize("text", ["", "X3", "F", "whx3", "U3", "F3.", "whg3+-", "wgs1"])
def test_what_is_no_short_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no short name|no lane does it"):
        parse_name(text)


def test_a_row_without_a_lane_is_refused() -> None:
    with pytest.raises(ValueError, match="no row of a grid"):
        parse_grid("F0.0 F1.0")
