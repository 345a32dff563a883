"""Probes of links, optimizer and memory."""

from __future__ import annotations

from statistics import median

from runtime.lanes.backend import Backend
from runtime.probes.buffers import BF16_UPDATE_BYTES, UPDATE_SIZES, MemoryBuffers
from runtime.probes.timing import (
    Effort,
    Work,
    issue_ns,
    mean_rate_spread,
    placed_rate_spread,
    rate_spread,
    spread,
    timed,
    timed_in_turns,
)
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import Curve, LaunchCost, LossyShares, OptimizerProfile, RatePoint, ThreadPoint
from slideplan.placement import Tier
from slideplan.policy import STATE_FORMATS, StateFormat

LOSSY_TURNS = 9  # of updates of every format
SAMPLES = 24  # at least, of every size


class MemoryProbes:
    """Curves of copies and host updates over sizes.

    What they reach depends on what else the machine does at the time, so they are sampled over the whole profile,
    and count by their means.
    """

    def __init__(self, backend: Backend, effort: Effort, buffers: MemoryBuffers, threads: int) -> None:
        self._backend = backend
        self._effort = effort
        self._buffers = buffers
        sizes = [1 << 16]
        while sizes[-1] * 4 < effort.largest_copy_bytes:
            sizes.append(sizes[-1] * 4)
        sizes.append(effort.largest_copy_bytes)
        self._sampled: dict[LaneKind, list[Work]] = {
            LaneKind.H2D: [buffers.copy(LaneKind.H2D, size) for size in sizes],
            LaneKind.D2H: [buffers.copy(LaneKind.D2H, size) for size in sizes],
            LaneKind.HOST_UPDATE: [
                buffers.host_update(threads, round(effort.optimizer_elements * times)) for times in UPDATE_SIZES
            ],
        }
        self._durations: dict[LaneKind, list[list[int]]] = {lane: [[] for _ in runs] for lane, runs in self._sampled.items()}

    def sample(self, turns: int) -> None:
        """Time copies and host updates of all sizes once more, this many turns."""
        for lane, runs in self._sampled.items():
            found = timed_in_turns(self._backend, lane, [action for _, action in runs], turns)
            for pooled, durations in zip(self._durations[lane], found, strict=True):
                pooled.extend(durations)

    def complete(self) -> None:
        """Sample until there are turns enough."""
        turns = SAMPLES - len(self._durations[LaneKind.H2D][0])
        if turns > 0:
            self.sample(turns)

    def _curve(self, lane: LaneKind) -> Curve:
        runs = zip(self._sampled[lane], self._durations[lane], strict=True)
        rate = placed_rate_spread if lane is LaneKind.HOST_UPDATE else mean_rate_spread
        return Curve(points=tuple(RatePoint(size=size, rate=rate(size, durations)) for (size, _), durations in runs))

    def link_curves(self) -> tuple[Curve, Curve]:
        """Host to device and back, alone, over sizes."""
        return self._curve(LaneKind.H2D), self._curve(LaneKind.D2H)

    def optimizer(self, threads: int, by_threads: tuple[ThreadPoint, ...], on_gpu: Work) -> OptimizerProfile:
        """AdamW on either side alone, and the host's over sizes, with what thread counts were chosen from."""
        size = self._effort.optimizer_elements * BF16_UPDATE_BYTES
        by_size = self._curve(LaneKind.HOST_UPDATE)
        return OptimizerProfile(
            threads=threads,
            host_bytes_per_s=next(point.rate for point in by_size.points if point.size == size),
            gpu_bytes_per_s=rate_spread(on_gpu[0], timed(self._backend, LaneKind.GPU_UPDATE, on_gpu[1], self._effort.repeats)),
            by_threads=by_threads,
            host_by_bytes=by_size,
            lossy=self._lossy(threads),
        )

    def _lossy(self, threads: int) -> dict[StateFormat, LossyShares]:
        """Shares of the exact update's rate, of runs in turns."""
        found = {}
        for tier, lane in ((Tier.HOST, LaneKind.HOST_UPDATE), (Tier.GPU, LaneKind.GPU_UPDATE)):
            works = [self._buffers.update(tier, state, threads) for state in STATE_FORMATS]
            turns = timed_in_turns(self._backend, lane, [act for _, act in works], LOSSY_TURNS)
            found[tier] = [moved_bytes / median(durations) for (moved_bytes, _), durations in zip(works, turns, strict=True)]
        return {
            state: LossyShares(
                host=found[Tier.HOST][place] / found[Tier.HOST][0], gpu=found[Tier.GPU][place] / found[Tier.GPU][0]
            )
            for place, state in enumerate(STATE_FORMATS)
            if place
        }

    def launches(self, work: dict[LaneKind, Work]) -> list[LaunchCost]:
        """Host time to queue a copy or an update on its stream; nothing where handlers return when all is done."""
        if self._backend.name == "cpu":
            return []
        kinds = {LaneKind.H2D: TaskKind.COPY, LaneKind.D2H: TaskKind.COPY, LaneKind.GPU_UPDATE: TaskKind.UPDATE}
        return [
            LaunchCost(
                kind=kind,
                lane=lane,
                role=None,
                duration_ns=spread(issue_ns(self._backend, lane, work[lane][1], self._effort.repeats)),
            )
            for lane, kind in kinds.items()
        ]
