"""Walks a task graph: one thread per lane, each running its tasks in stored order, step after step.

This is the same machine that the simulator describes: a lane waits for the dependencies of its head
task, then holds its resource. The schedule itself stands in the graph and nowhere here.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterator

from runtime.lanes.backend import Backend, Marker
from runtime.lanes.clock import LaneClock, LaneError, Stopped, StopSignal
from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.timeline import Span, first_compute

# A handler issues one task of one step on the lane that calls it.
Handler = Callable[[Task, int], None]


class Executor:
    """Runs `steps` steps of a graph; to be iterated once.

    Yields the number of each step when its last compute task is over, though updates of the step may
    still run. The first failure of any lane, and a fault of the device that shows here, stops all lanes and is
    raised as LaneError. Lanes have ended when the iterator is exhausted or closed.
    """

    def __init__(self, graph: TaskGraph, backend: Backend, handler: Handler, steps: int, first_step: int = 0) -> None:
        self.graph = graph
        self.backend = backend
        self.steps = steps
        self._first_step = first_step  # what handlers are told: optimizer and data count on from earlier runs
        self._handler = handler
        self._signal = StopSignal()
        self._clocks = {lane: LaneClock(self._signal) for lane in graph.lanes}
        self._anchors: dict[int, Marker] = {}
        self._threads = [
            threading.Thread(target=self._run_lane, args=(lane,), name=f"lane-{lane}", daemon=True) for lane in graph.lanes
        ]

    def __iter__(self) -> Generator[int, None, None]:
        try:
            for thread in self._threads:
                thread.start()
            compute = Lane(LaneKind.COMPUTE)
            for step in range(self.steps):
                with self._failures(f"step {step}"):
                    self._anchors[step] = self.backend.anchor()
                    self._over(compute, step, len(self.graph.lanes[compute]) - 1)
                yield step
            for lane, queue in self.graph.lanes.items():
                with self._failures(f"step {self.steps - 1}"):
                    self._over(lane, self.steps - 1, len(queue) - 1)
        except BaseException as error:  # a failure, an interrupt, or the caller gave up between steps
            self._signal.stop(error)
            raise
        finally:
            for thread in self._threads:
                if thread.ident is not None:
                    _join(thread)
        if self._signal.error is not None:  # of a lane that had issued all its tasks
            raise self._signal.error

    def spans(self, step: int) -> tuple[int, list[Span]]:
        """Origin (host nanoseconds) and spans of a step, relative to the start of its first compute task.

        Waits until every lane has finished the step and issued the next, if there is one; then nothing
        can wait for the step's markers any more, and they are dropped. Raises LaneError.
        """
        graph, absolute = self.graph, []
        if step not in self._anchors:
            raise ValueError(f"step {step} has not run yet, or its spans were taken before")
        with self._failures(f"step {step}"):
            for lane, queue in graph.lanes.items():
                self._wait(lane, min(step + 1, self.steps - 1), len(queue) - 1)
            anchor = self._anchors.pop(step)
            for number, lane in enumerate(graph.lane_of):
                start, end = self._over(lane, step, graph.lane_position[number])
                absolute.append((self.backend.elapsed_ns(anchor, start), self.backend.elapsed_ns(anchor, end)))
        for lane, queue in graph.lanes.items():
            self._clocks[lane].forget((step + 1) * len(queue))
        origin = absolute[first_compute(graph)][0]
        return anchor.host_ns + origin, [Span(start_ns=start - origin, end_ns=end - origin) for start, end in absolute]

    def _wait(self, lane: Lane, step: int, place: int) -> tuple[Marker, Marker]:
        return self._clocks[lane].wait(step * len(self.graph.lanes[lane]) + place)

    def _over(self, lane: Lane, step: int, place: int) -> tuple[Marker, Marker]:
        """Markers of the lane's task at this place, once the device is through with it."""
        start, end = self._wait(lane, step, place)
        try:
            self.backend.wait(end)
        except Exception as error:
            task = self.graph.tasks[self.graph.lanes[lane][place]]
            # Kernels fail after they were issued, so it may as well be one that was to run before.
            raise _failure(f"{_where(lane, step, task)}, or before it", error) from error
        return start, end

    @contextlib.contextmanager
    def _failures(self, where: str) -> Iterator[None]:
        """For those who wait from outside: whatever failed first is raised, as LaneError, and stops all lanes."""
        try:
            yield
        except Exception as error:
            failure = error if isinstance(error, LaneError | Stopped) else _failure(where, error)
            if not isinstance(failure, Stopped):
                self._signal.stop(failure)
            first = self._signal.error or failure
            raise first from first.__cause__

    def _run_lane(self, lane: Lane) -> None:
        task: Task | None = None
        step = 0
        try:
            with self.backend.lane(lane.kind):
                for step in range(self.steps):
                    for number in self.graph.lanes[lane]:
                        task = self.graph.tasks[number]
                        self._run_task(lane, task, step)
        except Stopped:
            pass
        except BaseException as error:
            self._signal.stop(_failure(_where(lane, step, task), error))

    def _run_task(self, lane: Lane, task: Task, step: int) -> None:
        for dependency in task.dependencies:
            if step < dependency.distance:
                continue
            awaited = self.graph.lane_of[dependency.task]
            place = self.graph.lane_position[dependency.task]
            # First until the other lane has issued the task: a stream that waits for an event not yet
            # recorded does not wait at all. Then this lane runs after it.
            end = self._wait(awaited, step - dependency.distance, place)[1]
            self.backend.join(end, lane.kind)
        if self._signal.error is not None:
            raise Stopped
        start = self.backend.mark(lane.kind)
        self._handler(task, self._first_step + step)
        self._clocks[lane].advance(start, self.backend.mark(lane.kind))


def _join(thread: threading.Thread) -> None:
    """Wait for a lane to end, and for no less: an impatient interrupt must not give back memory that it still copies."""
    while thread.is_alive():
        with contextlib.suppress(KeyboardInterrupt):
            thread.join()


def _where(lane: Lane, step: int, task: Task | None) -> str:
    return f"lane {lane}, step {step}" + (f", task {task.name}, unit {task.unit}" if task else "")


def _failure(where: str, error: BaseException) -> LaneError:
    failure = LaneError(f"{where}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure
