"""What all probes share: repeated timing on a lane, and lanes timed together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from slideplan.plan.graph import Lane
from slideplan.plan.machine import Spread
from slideplan.runtime.backend import Backend


@dataclass(frozen=True)
class Effort:
    """How much work probes put in: `quick` takes seconds, the full profile a few minutes."""

    repeats: int
    largest_copy_bytes: int
    optimizer_elements: int
    ssd_bytes: int

    @classmethod
    def of(cls, quick: bool, backend: str) -> Effort:
        """GPU machines get sizes that fill their links; CPU backends stand for small ones."""
        scale = 1 if backend == "cuda" else 8
        if quick:
            return cls(5, (64 << 20) // scale, (32 << 20) // scale, (256 << 20) // scale)
        return cls(15, (512 << 20) // scale, (128 << 20) // scale, (2 << 30) // scale)


def spread(values: list[int] | list[float]) -> Spread:
    """Percentiles of measurements; at least one."""
    p10, p50, p90 = np.percentile(values, (10, 50, 90))
    return Spread(p10=round(p10), p50=round(p50), p90=round(p90))


def rate_spread(size: int, durations_ns: list[int]) -> Spread:
    """Units per second of repeated runs over `size` units: the slowest run gives p10."""
    return spread([size * 1e9 / max(1, duration) for duration in durations_ns])


def timed(backend: Backend, lane: Lane, action: Callable[[], object], repeats: int) -> list[int]:
    """Durations on the lane of `repeats` runs after two warm-up runs. Nanoseconds."""
    with backend.lane(lane):
        for _ in range(2):
            action()
        backend.wait(backend.mark(lane))
        marks = [backend.mark(lane)]
        for _ in range(repeats):
            action()
            marks.append(backend.mark(lane))
        backend.wait(marks[-1])
        anchor = backend.anchor()
        times = [backend.elapsed_ns(anchor, mark) for mark in marks]
    return [end - start for start, end in pairwise(times)]


def together(backend: Backend, work: dict[Lane, tuple[int, Callable[[], object]]], window_ns: int) -> dict[Lane, float]:
    """Units per second of each lane while all of them run. `work`: units and action of one run per lane.

    Every lane repeats its action until all have been busy for `window_ns`; runs that lie wholly inside
    the time in which all lanes were busy are counted. Raises whatever an action raises.
    """
    started = threading.Barrier(len(work))
    finished = threading.Event()
    marks: dict[Lane, list[int]] = {}
    failures: list[BaseException] = []
    anchor = backend.anchor()

    def repeat(lane: Lane, action: Callable[[], object]) -> None:
        try:
            with backend.lane(lane):
                action()
                mark = backend.mark(lane)
                backend.wait(mark)
                started.wait()
                times = [backend.elapsed_ns(anchor, mark)]
                while not finished.is_set():
                    action()
                    mark = backend.mark(lane)
                    backend.wait(mark)
                    times.append(backend.elapsed_ns(anchor, mark))
                marks[lane] = times
        except BaseException as error:
            failures.append(error)
            started.abort()

    threads = [threading.Thread(target=repeat, args=(lane, action), daemon=True) for lane, (_, action) in work.items()]
    for thread in threads:
        thread.start()
    finished.wait(window_ns / 1e9)
    finished.set()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    opening = max(times[0] for times in marks.values())
    closing = min(times[-1] for times in marks.values())
    return {lane: _rate(marks[lane], work[lane][0], opening, closing) for lane in work}


def _rate(times: list[int], units: int, opening: int, closing: int) -> float:
    """Units per second between two moments; a run that lies partly inside counts by that part."""
    inside = 0.0
    for start, end in pairwise(times):
        overlap = min(end, closing) - max(start, opening)
        if overlap > 0:
            inside += overlap / (end - start)
    return inside * units * 1e9 / max(1, closing - opening)
