"""A failure in any lane, or of the device, stops all lanes and says where it was."""

import _thread
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import EVERYTHING, plan_for, session_for
from runtime.checkpoints.manifest import Saving
from runtime.folder import open_metrics
from runtime.lanes.backend import CpuBackend, Fetched, Marker
from runtime.lanes.clock import LaneError
from runtime.lanes.executor import Executor
from runtime.session import Session
from runtime.storage.disk import Disk
from runtime.training import Stop, train
from slideplan.footprint import Footprint
from slideplan.graph import operations
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import CAST_WEIGHTS, CLIP_GRADIENT, OFFLOAD_STATE, REFRESH_WEIGHTS, Operation
from slideplan.lowering.lower import lower
from slideplan.progress import Progress, Show, silent

STEPS = 4


def everything(backend: CpuBackend) -> Session:
    model = tiny_model()
    return session_for(plan_for(model, tiny_policy(model, **EVERYTHING, kernels="fused"), tiny_workload(), backend), backend)


def trained(session: Session, folder: Path, show: Show) -> None:
    with open_metrics(folder, 0, Disk(), silent) as log:
        train(session, STEPS, log, None, Saving(), Stop(), show)


def no_lanes_left() -> bool:
    return not [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]


# A list for pytest, before anything runs: what sessions import, tests may have to prepare.
_GRAPH = lower(
    tiny_model(),
    tiny_policy(tiny_model(), **EVERYTHING, kernels="fused"),
    tiny_workload(),
    Footprint(inner_bytes=1, workspace_bytes=1),
)
OPERATIONS = sorted({task.operation for task in _GRAPH.tasks}, key=str)


def test_the_plan_here_has_tasks_of_every_operation_that_is_executed() -> None:
    known = {value for value in vars(operations).values() if isinstance(value, Operation)}
    assert set(OPERATIONS) == known - {CAST_WEIGHTS, CLIP_GRADIENT, REFRESH_WEIGHTS}  # of other systems
    assert len(OPERATIONS) == 25


@pytest.mark.parametrize("operation", OPERATIONS, ids=str)
@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_failing_task_stops_all_lanes(operation: Operation, step: int) -> None:
    backend = CpuBackend()
    session = everything(backend)

    def failing(task, at) -> None:
        if task.operation == operation and at == step:
            raise RuntimeError("device is on fire")
        session.handlers(task, at)

    with pytest.raises(LaneError, match=rf"step {step}, task {operation}/\w+.*, unit \d+: RuntimeError: device is on fire"):
        list(Executor(session.plan.graph, backend, failing, STEPS))
    assert no_lanes_left()


def test_a_failure_that_shows_while_spans_are_read_is_named() -> None:
    """The caller waits for markers between steps, too: lanes that stop meanwhile must not leave it with a bare signal."""
    backend = CpuBackend()
    session = everything(backend)
    last = [task for task in session.plan.graph.tasks if task.operation == OFFLOAD_STATE][-1]

    def failing(task, at) -> None:
        if task is last and at == 1:
            time.sleep(0.3)
            raise RuntimeError("late")
        session.handlers(task, at)

    executor = Executor(session.plan.graph, backend, failing, STEPS)
    with (
        pytest.raises(LaneError, match=r"lane d2h, step 1, task state gpu>host/.*: RuntimeError: late"),
        closing(iter(executor)) as run,
    ):
        next(run)
        executor.spans(0)
        executor.spans(1)
    assert no_lanes_left()


class FaultyBackend(CpuBackend):
    """Its device fails after some waits: as kernels do, long after they were issued, where somebody waits."""

    def __init__(self, waits: int) -> None:
        super().__init__()
        self.waits = waits

    def passed(self, marker: Marker) -> bool:
        self.waits -= 1
        if self.waits < 0:
            raise RuntimeError("an illegal memory access was encountered")
        return True


@pytest.mark.parametrize("waits", [0, 2])
def test_a_fault_of_the_device_names_what_was_waited_for(waits: int) -> None:
    backend = FaultyBackend(1 << 30)
    session = everything(backend)
    backend.waits = waits
    expected = rf"lane compute, step {waits}, task backward.*/embedding.*, or before it: RuntimeError: an illegal memory access"
    with pytest.raises(LaneError, match=expected):
        list(Executor(session.plan.graph, backend, session.handlers, STEPS))
    assert no_lanes_left()


def test_a_fault_that_shows_where_spans_are_read_is_named() -> None:
    backend = FaultyBackend(1 << 30)
    session = everything(backend)
    expected = r"lane \w+, step 0, task .*, or before it: RuntimeError: an illegal memory access"
    executor = session.executor(STEPS)
    with closing(iter(executor)) as run:
        next(run)
        backend.waits = 0
        with pytest.raises(LaneError, match=expected):
            executor.spans(0)
    assert no_lanes_left()


def test_a_fault_between_two_steps_names_no_task_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend()
    session = everything(backend)
    left = iter(range(2))
    monkeypatch.setattr(backend, "anchor", lambda: Marker(None, next(left)))
    with pytest.raises(LaneError, match=r"^lane compute, step 2: StopIteration: "):
        list(Executor(session.plan.graph, backend, session.handlers, STEPS))
    assert no_lanes_left()


class LeavingBackend(CpuBackend):
    """Fails where a lane is left, all its work issued."""

    @contextmanager
    def lane(self, lane: LaneKind) -> Iterator[None]:
        yield
        if lane is LaneKind.HOST_UPDATE:
            raise RuntimeError("too late")


def test_a_lane_that_fails_after_its_last_task_fails_the_run() -> None:
    backend = LeavingBackend()
    session = everything(backend)
    with pytest.raises(LaneError, match=r"lane host_update, step 3, task update host/.*: RuntimeError: too late"):
        list(Executor(session.plan.graph, backend, session.handlers, STEPS))


def test_a_lane_that_cannot_start_stops_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CpuBackend()
    session = everything(backend)
    executor = session.executor(STEPS)

    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(list(executor._threads.values())[2], "start", refuse)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(executor)
    assert no_lanes_left()


def test_no_lane_outlives_an_impatient_interrupt() -> None:
    """Memory that it copies is given back next."""
    backend = CpuBackend()
    session = everything(backend)

    def slow(task, at) -> None:
        if at == 1 and task.operation == OFFLOAD_STATE:
            for _ in range(3):
                _thread.interrupt_main()
                time.sleep(0.2)
        session.handlers(task, at)

    with pytest.raises(KeyboardInterrupt):
        list(Executor(session.plan.graph, backend, slow, STEPS))
    assert no_lanes_left()


def test_a_lane_runs_until_it_has_said_that_it_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Python says of its thread: an interrupt in the midst of `is_alive` or `join` has it take threads for ended."""
    session = everything(CpuBackend())
    ended = []

    def slow(task, at) -> None:
        if at == 1 and task.operation == OFFLOAD_STATE and not ended:
            _thread.interrupt_main()
            time.sleep(0.5)
            ended.append(task)
        session.handlers(task, at)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "is_alive", lambda thread: False)
        list(Executor(session.plan.graph, session.backend, slow, STEPS))
    assert ended
    assert no_lanes_left()


def test_an_interrupt_while_the_last_lanes_end_is_not_lost() -> None:
    class Interrupting(CpuBackend):
        @contextmanager
        def lane(self, lane: LaneKind) -> Iterator[None]:
            yield
            if lane is LaneKind.HOST_UPDATE:
                _thread.interrupt_main()
                time.sleep(0.3)

    backend = Interrupting()
    session = everything(backend)
    with pytest.raises(KeyboardInterrupt):
        list(Executor(session.plan.graph, backend, session.handlers, STEPS))
    assert no_lanes_left()


def test_lanes_have_ended_when_measuring_fails(tmp_path: Path) -> None:
    """Not when somebody collects the garbage: what failed still refers to the run."""
    session = everything(CpuBackend())

    def failing(progress: Progress) -> None:
        if progress.phase == "training":
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        trained(session, tmp_path, failing)
    assert no_lanes_left()


class FailsToFetch(CpuBackend):
    """A device whose fault shows where a step's numbers are to reach the host."""

    def fetch(self, values: torch.Tensor, lane: LaneKind) -> Fetched:
        return super().fetch(values, lane)._replace(marker=Marker(None, -1))

    def passed(self, marker: Marker) -> bool:
        if marker.host_ns < 0:
            raise RuntimeError("an illegal memory access was encountered")
        return super().passed(marker)


def test_a_loss_that_cannot_be_read_names_its_step(tmp_path: Path) -> None:
    where = r"^lane compute, step 0, task backward/embedding/mb\d+, unit 0, or before it: RuntimeError: an illegal memory"
    with pytest.raises(LaneError, match=where):
        trained(everything(FailsToFetch()), tmp_path, silent)
    assert no_lanes_left()


def test_spans_of_a_step_are_kept_while_the_next_may_wait_for_them() -> None:
    """A lane that has not issued its next step may still ask for markers of this one."""
    backend = CpuBackend()
    session = everything(backend)
    held = threading.Event()

    def holding(task, at) -> None:
        if task.lane.kind is LaneKind.H2D and at == 1:
            held.wait(10)
        session.handlers(task, at)

    executor = Executor(session.plan.graph, backend, holding, 2)
    with closing(iter(executor)) as run:
        next(run)
        reading = threading.Thread(target=executor.spans, args=(0,))
        reading.start()
        reading.join(0.3)
        waited = reading.is_alive()
        held.set()
        reading.join(10)
        assert waited
        assert list(run) == [1]


def test_markers_of_steps_that_are_over_are_dropped() -> None:
    backend = CpuBackend()
    session = everything(backend)
    executor = Executor(session.plan.graph, backend, session.handlers, 6)
    for step in executor:
        if step > 0:
            executor.spans(step - 1)
    with pytest.raises(ValueError, match="step 0 has not run yet, or its spans were taken before"):
        executor.spans(0)
    kept = sum(len(clock._markers) for clock in executor._clocks.values())
    assert kept == len(session.plan.graph.tasks)  # the last step's


def test_caller_that_gives_up_stops_the_lanes() -> None:
    model = tiny_model()
    backend = CpuBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(), backend), backend)
    steps = iter(session.executor(1000))
    next(steps)
    steps.close()
    assert no_lanes_left()
