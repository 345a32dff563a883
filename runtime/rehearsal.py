"""The host's updates before the first step: what a step takes in this process's memory."""

from __future__ import annotations

import time
from statistics import median

from runtime.lanes.clock import RunError
from runtime.optimizer.adamw import Rehearsal
from runtime.session import Session
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import Task
from slideplan.measurement import expected_step_ns
from slideplan.progress import Progress, Show
from slideplan.quantities import format_ns

LEAST_REHEARSAL_NS = 1_000_000_000  # where passes over a small state take less
LEAST_PASSES = 2
WORTH_SAYING = 0.03  # of the step


def rehearse(session: Session, show: Show) -> int | None:
    """Nanoseconds that the host's updates of one step take, one after the other: the median of some passes.

    Where they are not as planned, what step to expect is said. Nothing else may be running. It comes before the session
    begins: all slots are zero and stay so. None where the host updates nothing.
    Raises RunError, naming the task, if an update fails.
    """
    plan, phase = session.plan, "rehearsing updates"
    updates = [plan.graph.tasks[number] for number in plan.graph.queue(LaneKind.HOST_UPDATE)]
    if not updates:
        return None
    show(Progress(phase, 0, 1))
    _pass_ns(session, updates)  # threads wake up, and pages are found for the first time
    passes: list[int] = []
    while len(passes) < LEAST_PASSES or sum(passes) < LEAST_REHEARSAL_NS:
        passes.append(_pass_ns(session, updates))
    rehearsed_ns = round(median(passes))
    planned_ns, expected_ns = plan.prediction.record.step_ns, expected_step_ns(plan, rehearsed_ns)
    note = ""
    if abs(expected_ns - planned_ns) > WORTH_SAYING * planned_ns:
        note = (
            f"updates on the host take {rehearsed_ns / plan.prediction.host_updates_ns:.0%} of their planned time in this "
            f"process's memory: expect steps of {format_ns(expected_ns)}, planned were {format_ns(planned_ns)}"
        )
    show(Progress(phase, 1, 1, note=note))
    return rehearsed_ns


def _pass_ns(session: Session, updates: list[Task]) -> int:
    started = time.perf_counter_ns()
    for task in updates:
        try:
            session.handlers.update(task, 0, Rehearsal())
        except Exception as error:
            raise RunError(f"rehearsing {task.name}: {type(error).__name__}: {error}") from error
    return max(1, time.perf_counter_ns() - started)
