"""A failure in any lane stops all of them and says where it was."""

import threading

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from running import plan_for, session_for
from slideplan.plan.graph import TaskKind
from slideplan.runtime.backend import CpuBackend
from slideplan.runtime.executor import Executor
from slideplan.runtime.lanes import LaneError


@pytest.mark.parametrize(
    "kind", [TaskKind.LOAD_WEIGHTS, TaskKind.LOSS, TaskKind.OFFLOAD_GRADIENT, TaskKind.UPDATE_HOST, TaskKind.BACKWARD_RECOMPUTE]
)
@pytest.mark.parametrize("step", [0, 2])
def test_failing_task_stops_all_lanes(kind: TaskKind, step: int) -> None:
    model = tiny_model()
    backend = CpuBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(), backend), backend)

    def failing(task, at) -> None:
        if task.kind is kind and at == step:
            raise RuntimeError("device is on fire")
        session.handlers(task, at)

    with pytest.raises(LaneError, match=rf"step {step}, task {kind}/\w+.*, unit \d+: RuntimeError: device is on fire"):
        list(Executor(session.plan.graph, backend, failing, 4))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]


def test_caller_that_gives_up_stops_the_lanes() -> None:
    model = tiny_model()
    backend = CpuBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(), backend), backend)
    steps = iter(session.executor(1000))
    next(steps)
    steps.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("lane-")]
