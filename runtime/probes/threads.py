"""The probe of the optimizer's thread counts, alone and beside copies, and what is chosen of it."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.lanes.backend import Backend
from runtime.lanes.threads import optimizer_share
from runtime.optimizer.adamw import HostUpdate
from runtime.probes.buffers import BF16_UPDATE_BYTES, MemoryBuffers
from runtime.probes.timing import ROUNDS, Effort, mean_rate_spread, spread, timed_in_turns, together
from slideplan.graph.lanes import LaneKind
from slideplan.lowering.sizes import WEIGHT_BYTES
from slideplan.machine.host import usable_cores
from slideplan.machine.profile import BesideCopies, ThreadPoint
from slideplan.policy import GRADIENT_BYTES

TOLERANCE = 0.02  # of the time: for less, no thread is taken from those that feed the streams


def thread_counts() -> list[int]:
    """Counts that are measured, up to all cores that this process may use."""
    cores = HostUpdate(usable_cores()).threads
    return sorted({max(1, count) for count in (cores // 4, cores // 2, cores * 3 // 4, cores - 2, cores - 1, cores)})


def thread_points(backend: Backend, effort: Effort, buffers: MemoryBuffers) -> tuple[ThreadPoint, ...]:
    """The host's updates on every count of threads, alone in turns, then beside copies both ways in rounds."""
    counts, elements = thread_counts(), effort.optimizer_elements
    work = [buffers.host_update(count, elements) for count in counts]
    alone = timed_in_turns(backend, LaneKind.HOST_UPDATE, [action for _, action in work], effort.repeats)
    copies = buffers.copies()
    lanes = (LaneKind.HOST_UPDATE, *copies)
    beside: list[dict[LaneKind, list[float]]] = [{lane: [] for lane in lanes} for _ in counts]
    for _ in range(ROUNDS):
        for updates, pooled in zip(work, beside, strict=True):
            for lane, rates in together(backend, {LaneKind.HOST_UPDATE: updates, **copies}, effort.together_ns).items():
                pooled[lane] += rates
    return tuple(
        ThreadPoint(
            threads=count,
            host_bytes_per_s=mean_rate_spread(size, durations),
            beside_copies=BesideCopies(*(spread(pooled[lane]) for lane in lanes)),
        )
        for count, (size, _), durations, pooled in zip(counts, work, alone, beside, strict=True)
    )


def chosen_threads(backend: Backend, points: Sequence[ThreadPoint]) -> int:
    """Threads of the host's optimizer.

    On a CPU backend half of the cores: compute needs the others. Beside a GPU the fewest with which a streamed parameter,
    all lanes busy, takes as little time as with any count: its update, its two loads and its gradient's way out, of
    which the slowest counts. So threads are left out where more of them slow the copies down below that, or add nothing.
    """
    if backend.name == "cpu":
        return optimizer_share(points[-1].threads)
    times_s = {point.threads: streamed_parameter_s(point.beside_copies) for point in points if point.beside_copies}
    least = min(times_s.values())
    return min(threads for threads, time_s in times_s.items() if time_s <= least * (1 + TOLERANCE))


def streamed_parameter_s(rates: BesideCopies) -> float:
    """Seconds for one parameter of a streamed unit, per step of one micro-batch: of the lane that takes longest."""
    return max(
        BF16_UPDATE_BYTES / rates.host_bytes_per_s.p50,
        2 * WEIGHT_BYTES / rates.h2d_bytes_per_s.p50,
        GRADIENT_BYTES["bf16"] / rates.d2h_bytes_per_s.p50,
    )
