"""Walks a task graph: one thread per lane, each running its tasks in stored order, step after step.

This is the same machine that the simulator describes: a lane waits for the dependencies of its head
task, then holds its resource. The schedule itself stands in the graph and nowhere here.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from runtime.lanes import watchdog
from runtime.lanes.ahead import Ahead, Going
from runtime.lanes.backend import Backend, Fetched, Marker
from runtime.lanes.clock import Hung, LaneClock, LaneError, Stopped, StopSignal, Walk
from runtime.lanes.helpers import Helper
from runtime.lanes.watchdog import DRIVE_LANES, Answers, Watchdog
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.timeline import Span, first_compute

# A handler issues one task of one step on the lane that calls it. What goes on when it returns, on no stream, it returns.
Handler = Callable[[Task, int], Going | None]

POLL_S = 0.005  # of who waits for the device: no lane waits for them, and lanes want the cores
# For lanes that are not stuck themselves, once a run is hung: they end as soon as they are woken. And for the drive, once
# somebody has had enough of waiting.
GRACE_NS = 2_000_000_000


class Executor:
    """Runs `steps` steps of a graph; to be iterated once.

    Yields the number of each step when its last compute task is over, though updates of the step may
    still run. The first failure of any lane, and a fault of the device that shows here, stops all lanes and is
    raised as LaneError. Lanes have ended when the iterator is exhausted or closed, but for those of a run that is Hung, and
    for those that the drive holds up when an interrupt or the caller ends it: their memory must stay.

    first_step:  what handlers and messages call the first one: optimizer and data count on from earlier runs
    patience_ns: how long no lane may move while somebody waits here, `watchdog.patience_ns` for plans; beyond, the run is
                 Hung. None: for ever
    planned_ns:  predicted duration of each task, for the message
    drive:       whose answers count as moves of its lanes; None: there is none

    The thread that iterates, takes values and spans, and finishes must be one. It waits where signals reach it, and issues
    nothing: that would block it for as long as a stream's queue is full.
    """

    def __init__(
        self,
        graph: TaskGraph,
        backend: Backend,
        handler: Handler,
        steps: int,
        first_step: int = 0,
        patience_ns: int | None = None,
        planned_ns: Sequence[int] | None = None,
        drive: Answers | None = None,
    ) -> None:
        self.graph = graph
        self.backend = backend
        self.steps = steps
        self.first_step = first_step
        self._walk = Walk(graph, first_step)
        self._handler = handler
        self._signal = StopSignal()
        self._clocks = {lane: LaneClock(self._signal) for lane in graph.lanes}
        self._ahead = {lane: Ahead(backend, lane.kind, clock) for lane, clock in self._clocks.items()}
        self._anchors: dict[int, Marker] = {}
        self._begun = 1  # steps that some lane has begun; the first one counts as begun
        self._deciding = threading.Lock()
        self._threads = {lane: Helper(f"lane-{lane}", partial(self._run_lane, lane)) for lane in graph.lanes}
        self._watchdog = (
            None
            if patience_ns is None
            else Watchdog(self._walk, backend, self._clocks, self._threads, patience_ns, planned_ns, drive)
        )

    def __iter__(self) -> Generator[int, None, None]:
        try:
            for thread in self._threads.values():
                thread.start()
            last_compute = self.graph.queue(LaneKind.COMPUTE)[-1]
            step = 0
            while step < self.steps:
                with self._failures(step):
                    self._over(last_compute, step)
                yield step
                step += 1
            with self._failures(step - 1):
                for queue in self.graph.lanes.values():
                    self._over(queue[-1], step - 1)
        except BaseException as error:  # a failure, an interrupt, or the caller gave up between steps
            self._end(error)
            raise
        self._end(None)
        if self._signal.error is not None:  # of a lane that had issued all its tasks, or an interrupt while they ended
            raise self._signal.error

    def finish(self) -> None:
        """Begin no step that no lane has begun yet: the last one begun is the last. `steps` is how many there are then.

        Between two steps, which go on to the last one and end as usual. On streams, what is issued ahead has begun.
        """
        with self._deciding:
            self.steps = self._begun

    def values(self, fetched: Fetched, step: int) -> list[float]:
        """Numbers of a step that its last compute task has fetched. Raises LaneError."""
        with self._failures(step):
            self._until(fetched.marker, self.graph.queue(LaneKind.COMPUTE)[-1], step)
        return fetched.values.tolist()

    def spans(self, step: int) -> tuple[int, list[Span]]:
        """Origin (host nanoseconds) and spans of a step, relative to the start of its first compute task.

        Waits until every lane has finished the step and issued the next, if there is one; then nothing
        can wait for the step's markers any more, and they are dropped. Raises LaneError.
        """
        graph, absolute = self.graph, []
        if step not in self._anchors:
            raise ValueError(f"step {step} has not run yet, or its spans were taken before")
        with self._failures(step):
            for queue in graph.lanes.values():
                self._issued(queue[-1], min(step + 1, self.steps - 1))
            anchor = self._anchors.pop(step)
            for number in range(len(graph.tasks)):
                start, end = self._over(number, step)
                absolute.append((self.backend.elapsed_ns(anchor, start), self.backend.elapsed_ns(anchor, end)))
        for lane, queue in graph.lanes.items():
            self._clocks[lane].forget((step + 1) * len(queue))
        origin = absolute[first_compute(graph)][0]
        return anchor.host_ns + origin, [Span(start_ns=start - origin, end_ns=end - origin) for start, end in absolute]

    def _issued(self, number: int, step: int) -> tuple[Marker, Marker]:
        """Markers of a task, for the thread that iterates: once it is issued."""
        clock = self._clocks[self.graph.lane_of[number]]
        while True:
            try:
                return clock.wait(self._walk.position(number, step), watchdog.LOOK_NS / 1e9)
            except TimeoutError:
                self._look()

    def _over(self, number: int, step: int) -> tuple[Marker, Marker]:
        """Markers of a task, for the thread that iterates: once the device is through with it."""
        start, end = self._issued(number, step)
        self._until(end, number, step)
        return start, end

    def _until(self, marker: Marker, number: int, step: int) -> None:
        """Wait for a marker of a task, for the thread that iterates."""
        while not self._passed(marker, number, step):
            if self._signal.error is not None:
                raise Stopped
            self._look()
            time.sleep(POLL_S)

    def _passed(self, marker: Marker, number: int, step: int) -> bool:
        try:
            return self.backend.passed(marker)
        except Exception as error:
            where = self._walk.where(self.graph.lane_of[number], step, self.graph.tasks[number])
            # Kernels fail after they were issued, so it may as well be one that was to run before.
            raise _failure(f"{where}, or before it", error) from error

    def _look(self) -> None:
        if self._watchdog is not None:
            self._watchdog.look()

    @contextlib.contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """For those who wait from outside: whatever failed first is raised, as LaneError, and stops all lanes."""
        try:
            yield
        except Exception as error:
            where = f"step {self._walk.first_step + step}"
            failure = error if isinstance(error, LaneError | Stopped) else _failure(where, error)
            if not isinstance(failure, Stopped):
                self._signal.stop(failure)
            first = self._signal.error or failure
            raise first from first.__cause__

    def _end(self, error: BaseException | None) -> None:
        """Wait until lanes and device are through with what they do, and for no less: memory that they copy is given back next.

        With an error they are stopped before. An impatient interrupt is such an error, and a reason to leave lanes that the
        drive holds up, no others; so is a caller that gives up, for it may have been interrupted between steps. Raises Hung
        where one is stuck; where the run is hung already, the stuck ones are left.
        """
        given_up = isinstance(error, KeyboardInterrupt | GeneratorExit)
        while True:
            try:
                if error is not None:
                    self._signal.stop(error)
                self._wait_for_lanes(given_up)
            except KeyboardInterrupt as interrupt:
                error, given_up = error or interrupt, True
            else:
                return

    def _wait_for_lanes(self, given_up: bool) -> None:
        left_ns = time.perf_counter_ns() + GRACE_NS
        while held := [
            lane
            for lane, thread in self._threads.items()
            if not thread.wait(0) or self._clocks[lane].over(self.backend) < self._clocks[lane].issued
        ]:
            first = self._signal.error
            if given_up and time.perf_counter_ns() > left_ns and all(lane.kind in DRIVE_LANES for lane in held):
                return
            if isinstance(first, Hung):
                if time.perf_counter_ns() > left_ns:
                    return
            else:
                try:
                    self._look()
                except Hung as hung:
                    failed = f"; what failed first: {first}" if isinstance(first, LaneError) else ""
                    raise Hung(f"{hung}{failed}") from first
            time.sleep(POLL_S)

    def _run_lane(self, lane: Lane) -> None:
        task: Task | None = None
        step = 0
        try:
            with self.backend.lane(lane.kind):
                for step in itertools.takewhile(self._begins, itertools.count()):
                    task = None
                    if lane == Lane(LaneKind.COMPUTE):
                        self._anchors[step] = self.backend.anchor()
                    for number in self.graph.lanes[lane]:
                        task = self.graph.tasks[number]
                        self._run_task(lane, task, step)
        except Stopped:
            pass
        except BaseException as error:
            self._fail(lane, step, task, error)
        finally:
            self._ahead[lane].wait()  # what goes on uses the memory of its task

    def _fail(self, lane: Lane, step: int, task: Task | None, error: BaseException) -> None:
        self._signal.stop(_failure(self._walk.where(lane, step, task), error))

    def _begins(self, step: int) -> bool:
        """Whether a lane begins this step, for there is one."""
        # The lock protects which step is the last: none is begun beyond it while `finish` chooses.
        with self._deciding:
            if step >= self.steps:
                return False
            self._begun = max(self._begun, step + 1)
            return True

    def _run_task(self, lane: Lane, task: Task, step: int) -> None:
        for dependency in task.dependencies:
            if step < dependency.distance:
                continue
            awaited = self._clocks[self.graph.lane_of[dependency.task]]
            # First until the other lane has issued the task: a stream that waits for an event not yet
            # recorded does not wait at all. Then this lane runs after it.
            end = awaited.wait(self._walk.position(dependency.task, step - dependency.distance))[1]
            self.backend.join(end, lane.kind)
        if self._signal.error is not None:
            raise Stopped
        ahead = self._ahead[lane]
        ahead.wait_for_room(task)
        start = self.backend.mark(lane.kind)
        going = self._handler(task, self._walk.first_step + step)
        if going is None:
            ahead.wait()
            self._clocks[lane].advance(start, self.backend.mark(lane.kind))
        else:
            ahead.issued(task, start, going, partial(self._fail, lane, step, task))


def _failure(where: str, error: BaseException) -> LaneError:
    failure = LaneError(f"{where}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
