"""The host's updates and the drive before the first step: what a step takes in this process's memory, and on that drive."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from statistics import median

from runtime.lanes.clock import RunError
from runtime.lanes.helpers import Helper
from runtime.memory.volume import Move
from runtime.optimizer.adamw import Rehearsal
from runtime.session import Session
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import Task
from slideplan.measurement import expected_step_ns
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes, format_ns

LEAST_REHEARSAL_NS = 1_000_000_000  # where passes over a small state take less
LEAST_PASSES = 2
WORTH_SAYING = 0.03  # of the step
SLOWER = 0.1  # of a drive's rate, which differs by less between one moment and the next


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


def rehearse_drive(session: Session, show: Show) -> None:
    """Read and write state on the SSD for a moment, both at once as steps do, and say where the drive is slower than planned.

    It comes before the session begins: all slots are zero and stay so. Raises RunError, naming the task, if a copy fails, and
    Hung if the drive does not answer; what is asked of it goes on then, and where an interrupt ends this.
    """
    graph, record = session.plan.graph, session.plan.prediction.record
    lanes = [queue for kind in (LaneKind.SSD_READ, LaneKind.SSD_WRITE) if (queue := graph.queue(kind))]
    if not lanes:
        return
    show(Progress("rehearsing the drive", 0, 1))
    moves = [_Moves(session, queue) for queue in lanes]
    threads = [Helper("drive-rehearsal", each.run) for each in moves]
    for thread in threads:
        thread.start()
    assert session.buffers.drive is not None, "a graph with copies from and to the SSD has slots there"
    for thread in threads:
        session.buffers.drive.patience.wait(thread.wait)
    found = sum(each.per_s() for each in moves)
    # Both lanes are planned to be busy beside each other for as long as the busier one.
    planned_ns = max(sum(record.spans[number].duration_ns for number in queue) for queue in lanes)
    planned = sum(graph.tasks[number].bytes_moved for queue in lanes for number in queue) * 1e9 / planned_ns
    note = ""
    if found < (1 - SLOWER) * planned:
        note = (
            f"the drive moves {format_bytes(round(found))}/s, planned were {format_bytes(round(planned))}/s: expect longer "
            "steps where it is what binds; measure it with `planner profile` and plan again"
        )
    show(Progress("rehearsing the drive", 1, 1, note=note))


class _Moves:
    """Copies of a lane, each issued while the one before goes on, as lanes do it."""

    def __init__(self, session: Session, queue: Sequence[int]) -> None:
        self._session = session
        self._tasks = [session.plan.graph.tasks[number] for number in queue]
        self._moved, self._took_ns = 0, 1
        self._error: RunError | None = None

    def per_s(self) -> float:
        """Bytes. Raises RunError."""
        if self._error is not None:
            raise self._error
        return self._moved * 1e9 / self._took_ns

    def run(self) -> None:
        """Move for a while."""
        try:
            started, before = time.perf_counter_ns(), None
            for task in cycle(self._tasks):
                with _named(task):
                    move = self._session.handlers.issue(task, 0)
                assert move is not None, "the drive does it"
                if before is not None:
                    self._wait(*before)
                before = task, move
                if self._moved and time.perf_counter_ns() - started >= LEAST_REHEARSAL_NS:
                    break
            assert before is not None, "a lane has tasks"
            self._wait(*before)
            self._took_ns = max(1, time.perf_counter_ns() - started)
        except RunError as error:
            self._error = error

    def _wait(self, task: Task, move: Move) -> None:
        with _named(task):
            move.wait()
        self._moved += task.bytes_moved


def _pass_ns(session: Session, updates: list[Task]) -> int:
    started = time.perf_counter_ns()
    for task in updates:
        with _named(task):
            session.handlers.update(task, 0, Rehearsal())
    return max(1, time.perf_counter_ns() - started)


@contextlib.contextmanager
def _named(task: Task) -> Iterator[None]:
    """An error within names the task that is rehearsed."""
    try:
        yield
    except Exception as error:
        raise RunError(f"rehearsing {task.name}: {type(error).__name__}: {error}") from error
