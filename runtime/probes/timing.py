"""What all probes share: repeated timing on a lane, and lanes timed together."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat

import numpy as np

from runtime.lanes.backend import Backend
from slideplan.graph.lanes import LaneKind
from slideplan.machine.profile import Spread


@dataclass(frozen=True)
class Effort:
    """How much work probes put in: `quick` takes seconds, the full profile a few minutes.

    Sizes of updates keep both moments of an element aligned, and apart as units have them: see COLLIDING_ELEMENTS.
    """

    repeats: int
    largest_copy_bytes: int
    optimizer_elements: int
    ssd_bytes: int
    together_ns: int  # for which lanes run together
    host_share: float  # of the free RAM over which updates are sampled

    @classmethod
    def of(cls, quick: bool, backend: str) -> Effort:
        """GPU machines get sizes that fill their links; CPU backends stand for small ones."""
        gpu = backend == "cuda"
        scale = 1 if gpu else 8
        if quick:
            return cls(
                repeats=5,
                largest_copy_bytes=(64 << 20) // scale,
                optimizer_elements=(31 << 20) // scale,
                ssd_bytes=(2 << 30) // scale,
                together_ns=300_000_000 if gpu else 150_000_000,
                host_share=0.0,
            )
        return cls(
            repeats=15,
            largest_copy_bytes=(512 << 20) // scale,
            optimizer_elements=(31 << 22) // scale,
            ssd_bytes=(32 << 30) // scale**2,
            together_ns=600_000_000,
            host_share=0.5 if gpu else 0.0,
        )


ROUNDS = 2  # through all that is measured together, so that a passing disturbance does not fall on one alone
GROUPS = 8  # of runs that follow each other, for the spread of a mean


def spread(values: list[int] | list[float]) -> Spread:
    """Percentiles of measurements; at least one."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return Spread(p10=round(p10), p50=round(p50), p90=round(p90))


def rate_spread(size: int, durations_ns: list[int]) -> Spread:
    """Units per second of repeated runs over `size` units: the slowest run gives p10."""
    return spread([size * 1e9 / max(1, duration) for duration in durations_ns])


def mean_rate_spread(size: int, durations_ns: list[int]) -> Spread:
    """Units per second over all runs, as a step that adds up many has it: where a few runs are slow, less than the median's.

    p10 and p90 are of parts of the time: how far a step that lasts as long may be off, where the rate drifts.
    """
    parts = [part.tolist() for part in np.array_split(durations_ns, min(GROUPS, len(durations_ns)))]
    rates = [size * 1e9 * len(part) / max(1, sum(part)) for part in parts]
    mean = size * 1e9 * len(durations_ns) / max(1, sum(durations_ns))
    low, high = np.percentile(rates, (10, 90))
    return Spread(p10=round(min(low, mean)), p50=round(mean), p90=round(max(high, mean)))


def placed_rate_spread(size: int, durations_ns: list[int]) -> Spread:
    """The mean rate of runs over memory in many places, with p10 and p90 of single runs.

    A process has its memory in some of those places, and is as fast as they are for all of its life.
    """
    mean, single = mean_rate_spread(size, durations_ns).p50, rate_spread(size, durations_ns)
    return Spread(p10=min(single.p10, mean), p50=mean, p90=max(single.p90, mean))


def timed(backend: Backend, lane: LaneKind, action: Callable[[], object], repeats: int) -> list[int]:
    """Durations on the lane of `repeats` runs after two warm-up runs. Nanoseconds."""
    return timed_in_turns(backend, lane, [action], repeats)[0]


def timed_in_turns(backend: Backend, lane: LaneKind, actions: Sequence[Callable[[], object]], repeats: int) -> list[list[int]]:
    """Durations of each action, one run of every action after the other: what changes with time touches all alike."""
    backend.synchronize()  # what the actions work on was made on the default stream
    with backend.lane(lane):
        for action in (*actions, *actions):
            action()
        backend.wait(backend.mark(lane))
        marks = [backend.mark(lane)]
        for action in chain(*repeat(actions, repeats)):
            action()
            marks.append(backend.mark(lane))
        backend.wait(marks[-1])
        anchor = backend.anchor()
        times = [backend.elapsed_ns(anchor, mark) for mark in marks]
    durations = [end - start for start, end in pairwise(times)]
    return [durations[first :: len(actions)] for first in range(len(actions))]


def issue_ns(backend: Backend, lane: LaneKind, action: Callable[[], object], repeats: int) -> list[int]:
    """Host time of `repeats` calls of an action that queues work on a stream, without the work. Nanoseconds."""
    found = []
    backend.synchronize()  # as in `timed`
    with backend.lane(lane):
        for _ in range(repeats + 2):  # the first two warm up
            started = time.perf_counter_ns()
            action()
            found.append(time.perf_counter_ns() - started)
            backend.wait(backend.mark(lane))
    return found[2:]


Work = tuple[int, Callable[[], object]]  # units of one run, and what runs

SLICES = 8  # parts of the time together, for the spread over time


def together(backend: Backend, work: dict[LaneKind, Work], together_ns: int) -> dict[LaneKind, list[float]]:
    """Units per second of each lane while all of them run, over equal parts of the time in which all do.

    Every lane repeats its action for `together_ns` and at least twice, one run queued behind the one that
    runs, as the executor's streams have it. A run counts by the part of it that lies inside. Of one lane,
    this is its rate alone. Raises whatever an action raises.
    """
    started = threading.Barrier(len(work) + 1)
    enough = {lane: threading.Event() for lane in work}
    finished = threading.Event()
    marks: dict[LaneKind, list[int]] = {}
    failures: list[BaseException] = []
    backend.synchronize()  # as in `timed`
    anchor = backend.anchor()

    def run(lane: LaneKind, action: Callable[[], object]) -> None:
        try:
            with backend.lane(lane):
                action()
                backend.wait(backend.mark(lane))
                started.wait()
                running = backend.mark(lane)
                times = []
                while not finished.is_set():
                    action()
                    queued = backend.mark(lane)
                    backend.wait(running)
                    times.append(backend.elapsed_ns(anchor, running))
                    running = queued
                    if len(times) == 3:
                        enough[lane].set()
                backend.wait(running)
                marks[lane] = times
        except threading.BrokenBarrierError:
            pass  # another lane failed
        except BaseException as error:
            failures.append(error)
            started.abort()
        finally:
            enough[lane].set()

    threads = [threading.Thread(target=run, args=(lane, action), daemon=True) for lane, (_, action) in work.items()]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        started.wait()
        time.sleep(together_ns / 1e9)
        for event in enough.values():
            event.wait()
    finished.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    opening = max(times[0] for times in marks.values())
    closing = min(times[-1] for times in marks.values())
    edges = [opening + (closing - opening) * part // SLICES for part in range(SLICES + 1)]
    return {
        lane: [_rate(marks[lane], units, start, end) for start, end in pairwise(edges)] for lane, (units, _) in work.items()
    }


def _rate(times: list[int], units: int, opening: int, closing: int) -> float:
    """Units per second between two moments; a run that lies partly inside counts by that part."""
    inside = 0.0
    for start, end in pairwise(times):
        overlap = min(end, closing) - max(start, opening)
        if overlap > 0:
            inside += overlap / (end - start)
    return inside * units * 1e9 / max(1, closing - opening)
