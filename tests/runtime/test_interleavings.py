"""The executor's handlers under any legal order of lanes, with dead slots poisoned."""

import random
import time

import msgspec
import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from contents import run_lanes
from poison import Poisoned
from running import EVERYTHING, masters, plan_for, session_for, train
from runtime.lanes.backend import CpuBackend
from runtime.lanes.executor import Executor
from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import TaskGraph
from slideplan.plan import Plan

STEPS = 3
MODEL = tiny_model(layers=3)
POLICIES = {
    "streamed": {},
    "boundaries on the host": {"offload_boundaries": True, "boundary_slots": 3},
    "hybrid": {"resident_state": (1, 4), "stream_state": (2,), "keep": (3,), "offload_boundaries": True},
    "next need": {"update_order": (0, 1, 2, 3, 4), "window": 3},
    "inner activations on the host": {"kernels": "fused", "offload_inner": (1, 2), "keep": (3,)},
    "state passing through": {"stream_state": (1, 2, 3), "state_slots": 2, "gradient_slots": 1},
    "fused": {"kernels": "fused", "resident_state": (1,), "keep": (3,), "offload_boundaries": True},
    "everything": {"kernels": "fused", **EVERYTHING},
}


def make_plan(name: str) -> Plan:
    model = tiny_model(layers=4) if name == "everything" else MODEL
    return plan_for(model, tiny_policy(model, **POLICIES[name]), tiny_workload(), CpuBackend())


def run_in_order(plan: Plan, graph: TaskGraph, choose) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Run `graph` in place of the plan's own on the plan's slots."""
    session = session_for(plan, CpuBackend())
    handlers = Poisoned(session.handlers, graph, session.buffers)
    run_lanes(graph, handlers, STEPS, choose)
    return [session.compute.losses[step].item() for step in range(STEPS)], masters(session)


def same(left, right) -> bool:
    return left[0] == right[0] and all(torch.equal(left[1][name], right[1][name]) for name in left[1])


@pytest.mark.parametrize("name", POLICIES)
def test_any_legal_order_gives_the_same_result(name: str) -> None:
    plan = make_plan(name)
    session = session_for(plan, CpuBackend())
    expected = train(session, STEPS)
    for seed in range(5):
        assert same(run_in_order(plan, plan.graph, random.Random(seed).choice), expected), f"seed {seed}"
    for greedy in plan.graph.lanes:
        assert same(run_in_order(plan, plan.graph, lambda lanes, greedy=greedy: _prefer(lanes, greedy)), expected), greedy


def _prefer(lanes: list[Lane], wanted: Lane) -> Lane:
    return wanted if wanted in lanes else lanes[0]


@pytest.mark.parametrize("name", ["streamed", "hybrid", "fused", "inner activations on the host"])
def test_without_any_one_edge_some_order_fails(name: str) -> None:
    """The consumer hurries: without the edge between it and its producer the result is wrong."""
    plan = make_plan(name)
    expected = train(session_for(plan, CpuBackend()), STEPS)
    tasks = plan.graph.tasks
    edges = [(number, dependency) for number, task in enumerate(tasks) for dependency in task.dependencies]
    assert len(edges) > 15
    for number, edge in edges:
        kept = tuple(dependency for dependency in tasks[number].dependencies if dependency != edge)
        changed = msgspec.structs.replace(tasks[number], dependencies=kept)
        graph = TaskGraph(pools=plan.graph.pools, tasks=(*tasks[:number], changed, *tasks[number + 1 :]))
        orders = _hurries(tasks[number].lane, tasks[edge.task].lane)
        assert any(_fails(plan, graph, order, expected) for order in orders), (
            f"{tasks[edge.task].name} -> {tasks[number].name} is not needed"
        )


def _hurries(consumer: Lane, producer: Lane):
    """Orders in which the consumer hurries; the producer dawdles, or comes next, before others use its slot again."""
    yield lambda lanes: min(lanes, key=lambda lane: (lane != consumer, lane == producer))
    yield lambda lanes: min(lanes, key=lambda lane: (lane != consumer, lane != producer))


def _fails(plan: Plan, graph: TaskGraph, order, expected) -> bool:
    try:
        return not same(run_in_order(plan, graph, order), expected)
    except (KeyError, AssertionError):
        return True  # read what was not there yet


def test_threads_with_random_delays_give_the_same_result() -> None:
    plan = make_plan("hybrid")
    expected = train(session_for(plan, CpuBackend()), STEPS)
    session = session_for(plan, CpuBackend())
    delays = random.Random(0)
    handlers = session.handlers

    def delayed(task, step) -> None:
        time.sleep(delays.random() * 3e-3)
        handlers(task, step)

    executor = Executor(plan.graph, session.backend, delayed, STEPS)
    losses = [session.compute.losses.pop(step).item() for step in executor]
    assert same((losses, masters(session)), expected)
