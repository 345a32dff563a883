"""The executor's handlers under any legal order of lanes, with dead slots poisoned."""

import random
import threading
import time
from collections import Counter

import msgspec
import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from contents import run_lanes
from poison import Poisoned
from running import EVERYTHING, bytes_of, loss_of, masters, plan_for, session_for, train
from runtime.lanes.backend import CpuBackend
from runtime.lanes.executor import Executor
from runtime.probes.handoffs import cycle_graph
from runtime.session import Session
from slideplan.graph.lanes import Lane
from slideplan.graph.tasks import Task, TaskGraph
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
    "activations on the SSD": {"kernels": "fused", "ssd_boundaries": (0,), "ssd_inner": (2, 3), "host_inner_slots": 1},
    "weights on the SSD": {"ssd_weights": (1, 2, 3), "host_weight_slots": 2},
    "layers on the SSD": {"ssd_weights": (1, 3), "ssd_state": (1, 2, 3), "host_weight_slots": 3, "window": 3},
    "state from the SSD through the GPU": {"ssd_stream": (1, 3), "stream_state": (2,), "ssd_state": (0,), "gradient_slots": 1},
    "state on the SSD": {"ssd_state": (0, 2), "ssd_moments": (1, 3, 4), "ssd_slots": 2},
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
    return [loss_of(session, step) for step in range(STEPS)], masters(session)


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
    losses = [loss_of(session, step) for step in executor]
    assert same((losses, masters(session)), expected)


class Delayed:
    """Handlers of a session, each call after a random while; counts what ran."""

    def __init__(self, session: Session, chance: random.Random) -> None:
        self.ran: Counter[tuple[str, int]] = Counter()
        self._handler = session.handlers
        self._chance = chance
        self._lock = threading.Lock()

    def __call__(self, task: Task, step: int) -> None:
        with self._lock:
            delay = self._chance.choice((0, 0, 1e-3, 4e-3))
            self.ran[task.name, step] += 1
        time.sleep(delay)
        self._handler(task, step)


def whole_state(session: Session) -> list[torch.Tensor]:
    units = range(session.plan.model.units)
    states = [session.states[unit] for unit in units]
    stored = [each for state in states for each in (*state.weights(), *state.optimizer())]
    return [bytes_of(part) for each in stored for part in each.parts]


def identical(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(mine, other) for mine, other in zip(left, right, strict=True))


@pytest.mark.parametrize("name", POLICIES)
def test_a_run_that_finishes_early_is_one_of_that_many_steps(name: str) -> None:
    plan, many = make_plan(name), 6
    session = session_for(plan, CpuBackend())
    losses, states = [], []
    for step in range(many + 2):
        losses += [loss_of(session, step) for _ in session.executor(1)]
        states.append(whole_state(session))
    for seed in range(3):
        chance = random.Random(f"{name} {seed}")
        session = session_for(plan, CpuBackend())
        handlers = Delayed(session, chance)
        executor = Executor(plan.graph, session.backend, handlers, many, patience_ns=60 * 10**9)
        last, found = chance.randrange(many), []
        for step in executor:
            found.append(loss_of(session, step))
            if step:
                executor.spans(step - 1)
            if step == last:
                time.sleep(chance.random() * 0.03)
                executor.finish()
        steps = executor.steps
        executor.spans(steps - 1)
        assert last < steps <= many
        assert handlers.ran == {(task.name, step): 1 for task in plan.graph.tasks for step in range(steps)}
        assert found == losses[:steps]
        assert identical(whole_state(session), states[steps - 1])
        for step in Executor(plan.graph, session.backend, session.handlers, 2, steps):
            assert loss_of(session, steps + step) == losses[steps + step]
        assert identical(whole_state(session), states[steps + 1])


def test_a_run_finishes_with_the_step_that_any_lane_has_begun() -> None:
    plan = make_plan("hybrid")
    session = session_for(plan, CpuBackend())
    handlers = Delayed(session, random.Random(0))
    executor = Executor(plan.graph, session.backend, handlers, 1000)
    ran = 0
    for step in executor:
        ran += 1
        if step == 2:
            executor.finish()
            begun = max(step for _, step in handlers.ran.copy())
            last = executor.steps
    assert ran == executor.steps == last
    assert 2 < last < 1000
    assert begun < last


def test_a_lane_behind_begins_all_steps_that_one_ahead_has_begun() -> None:
    load, forward = (msgspec.structs.replace(task, dependencies=()) for task in cycle_graph().tasks[:2])
    ahead, behind, finished = (threading.Event() for _ in range(3))
    ran: Counter[tuple[str, int]] = Counter()

    def act(task: Task, step: int) -> None:
        ran[task.name, step] += 1
        if (task.name, step) == (load.name, 0):
            ahead.wait()
        elif (task.name, step) == (load.name, 1):
            behind.set()
            finished.wait()
        elif (task.name, step) == (forward.name, 3):
            ahead.set()
            finished.wait()

    executor = Executor(TaskGraph(pools=(), tasks=(load, forward)), CpuBackend(), act, 1000)
    yielded = []
    for step in executor:
        yielded.append(step)
        if step == 2:
            behind.wait()
            executor.finish()
            finished.set()
    assert executor.steps == 4
    assert yielded == [0, 1, 2, 3]
    assert ran == {(task.name, step): 1 for task in (load, forward) for step in range(4)}


def test_a_run_that_was_to_finish_before_it_began_runs_one_step() -> None:
    plan = make_plan("hybrid")
    session = session_for(plan, CpuBackend())
    executor = session.executor(5)
    executor.finish()
    assert list(executor) == [0]
    executor.finish()
    assert executor.steps == 1
