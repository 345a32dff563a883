"""Probes of links, optimizer, memory and disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import torch

from slideplan.plan.graph import Lane, TaskKind
from slideplan.plan.machine import Curve, LaunchCost, OptimizerProfile, RatePoint, Spread, SsdProfile, ThreadPoint
from slideplan.plan.policy import Tier
from slideplan.plan.pools import UPDATE_STATE_TRAFFIC_BYTES
from slideplan.runtime.backend import Backend
from slideplan.runtime.handlers import gpu_update
from slideplan.runtime.machine import available_host_bytes
from slideplan.runtime.optimizer import AdamW, HostUpdate
from slideplan.runtime.probing import (
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

# Of one update, in the effort's elements: from a head that is a norm alone to a vocabulary.
UPDATE_SIZES = (1 / 4096, 1 / 256, 1 / 32, 0.25, 0.5, 1, 2)
SAMPLES = 24  # at least, of every size
BF16_UPDATE_BYTES = UPDATE_STATE_TRAFFIC_BYTES + 2  # per element, with a bf16 gradient
SSD_BLOCK_BYTES = 16 << 20
State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # weights, remainder, moments, gradient


class MemoryProbes:
    """Buffers once, then curves and rates over them.

    What copies and updates on the host reach depends on what else the machine does at the time, so they are
    sampled over the whole profile, and count by their means.
    """

    def __init__(self, backend: Backend, effort: Effort, threads: int) -> None:
        self._threads = threads
        self._backend = backend
        self._effort = effort
        size = effort.largest_copy_bytes
        self._host = {lane: backend.allocate(Tier.HOST, size, copied=True) for lane in (Lane.H2D, Lane.D2H)}
        self._gpu = {lane: backend.allocate(Tier.GPU, size, copied=True) for lane in (Lane.H2D, Lane.D2H)}
        # Host memory is not equally fast everywhere, and runs fill most of it.
        elements = round(effort.optimizer_elements * UPDATE_SIZES[-1])
        free = int(effort.host_share * available_host_bytes())
        self._host_states = [self._update_buffers(Tier.HOST, elements)]
        more = free // sum(tensor.nbytes for tensor in self._host_states[0]) - 1
        self._host_states += [self._update_buffers(Tier.HOST, elements) for _ in range(more)]
        self._sampled: dict[Lane, dict[int, Callable[[], object]]] = {
            lane: {size: self._copy(lane, size) for size in self._sizes()} for lane in (Lane.H2D, Lane.D2H)
        }
        self._sampled[Lane.HOST_UPDATE] = {
            elements * BF16_UPDATE_BYTES: self._update(Lane.HOST_UPDATE, threads, elements)
            for elements in (round(effort.optimizer_elements * times) for times in UPDATE_SIZES)
        }
        self._durations: dict[Lane, list[list[int]]] = {lane: [[] for _ in runs] for lane, runs in self._sampled.items()}

    def _copy(self, lane: Lane, size: int) -> Callable[[], object]:
        source, destination = (self._host, self._gpu) if lane is Lane.H2D else (self._gpu, self._host)
        # On a CPU backend a copy returns when it is done; on streams it is queued like the executor's.
        return lambda: destination[lane][:size].copy_(source[lane][:size], non_blocking=True)

    def _sizes(self) -> list[int]:
        sizes = [1 << 16]
        while sizes[-1] * 4 < self._effort.largest_copy_bytes:
            sizes.append(sizes[-1] * 4)
        return [*sizes, self._effort.largest_copy_bytes]

    def sample(self, turns: int) -> None:
        """Time copies and host updates of all sizes once more, this many turns."""
        for lane, runs in self._sampled.items():
            found = timed_in_turns(self._backend, lane, [*runs.values()], turns)
            for pooled, durations in zip(self._durations[lane], found, strict=True):
                pooled.extend(durations)

    def complete(self) -> None:
        """Sample until there are turns enough."""
        turns = SAMPLES - len(self._durations[Lane.H2D][0])
        if turns > 0:
            self.sample(turns)

    def _curve(self, lane: Lane) -> Curve:
        runs = zip(self._sampled[lane], self._durations[lane], strict=True)
        rate = placed_rate_spread if lane is Lane.HOST_UPDATE else mean_rate_spread
        return Curve(points=tuple(RatePoint(size=size, rate=rate(size, durations)) for size, durations in runs))

    def work(self) -> dict[Lane, Work]:
        """Copies of the largest size and updates, as `together` takes them: bytes and action."""
        size, elements = self._effort.largest_copy_bytes, self._effort.optimizer_elements
        copies = {lane: (size, self._copy(lane, size)) for lane in (Lane.H2D, Lane.D2H)}
        return copies | {
            lane: (elements * BF16_UPDATE_BYTES, self._update(lane, self._threads, elements))
            for lane in (Lane.HOST_UPDATE, Lane.GPU_UPDATE)
        }

    def link_curves(self) -> tuple[Curve, Curve]:
        """Host to device and back, alone, over sizes."""
        return self._curve(Lane.H2D), self._curve(Lane.D2H)

    def _update_buffers(self, tier: Tier, elements: int) -> State:
        """Weights, remainder, moments and gradient, in memory as the executor's slots have it."""
        weights, gradient = (self._backend.allocate(tier, 2 * elements, copied=False).view(torch.bfloat16) for _ in range(2))
        remainder = self._backend.allocate(tier, 2 * elements, copied=False).view(torch.int16)
        moments = self._backend.allocate(tier, 8 * elements, copied=False).view(torch.float32).view(2, elements)
        return weights, remainder, moments, gradient

    def _update(self, lane: Lane, threads: int, elements: int) -> Callable[[], object]:
        """An update of `elements`, on the host of every block in turn."""
        host = HostUpdate(threads)
        update = gpu_update(self._backend.device, host) if lane is Lane.GPU_UPDATE else host
        states = self._host_states if lane is Lane.HOST_UPDATE else [self._update_buffers(Tier.GPU, elements)]
        turns = cycle(states)

        def act() -> None:
            weights, remainder, moments, gradient = next(turns)
            moments = moments.view(-1)[: 2 * elements].view(2, elements)
            update(weights[:elements], remainder[:elements], moments, gradient[:elements], AdamW(), 0)

        return act

    def optimizer(self, cores: int, on_gpu: Work) -> OptimizerProfile:
        """AdamW on either side alone, and the host's over sizes and over thread counts up to all cores."""
        elements, repeats = self._effort.optimizer_elements, self._effort.repeats
        size = elements * BF16_UPDATE_BYTES
        counts = sorted({max(1, count) for count in (cores // 4, cores // 2, cores * 3 // 4, cores - 1, cores)})
        actions = [self._update(Lane.HOST_UPDATE, count, elements) for count in counts]
        by_count = timed_in_turns(self._backend, Lane.HOST_UPDATE, actions, repeats)
        by_size = self._curve(Lane.HOST_UPDATE)
        return OptimizerProfile(
            threads=HostUpdate(self._threads).threads,
            host_bytes_per_s=next(point.rate for point in by_size.points if point.size == size),
            gpu_bytes_per_s=rate_spread(on_gpu[0], timed(self._backend, Lane.GPU_UPDATE, on_gpu[1], repeats)),
            by_threads=tuple(
                ThreadPoint(threads=count, host_bytes_per_s=mean_rate_spread(size, durations))
                for count, durations in zip(counts, by_count, strict=True)
            ),
            host_by_bytes=by_size,
        )

    def launches(self, work: dict[Lane, Work]) -> list[LaunchCost]:
        """Host time to queue a copy or an update on its stream; nothing where handlers return when all is done."""
        if self._backend.name == "cpu":
            return []
        kinds = {
            TaskKind.LOAD_WEIGHTS: Lane.H2D,
            TaskKind.FETCH_BOUNDARY: Lane.H2D,
            TaskKind.FETCH_INNER: Lane.H2D,
            TaskKind.OFFLOAD_GRADIENT: Lane.D2H,
            TaskKind.OFFLOAD_BOUNDARY: Lane.D2H,
            TaskKind.OFFLOAD_INNER: Lane.D2H,
            TaskKind.UPDATE_GPU: Lane.GPU_UPDATE,
        }
        measured = {
            lane: spread(issue_ns(self._backend, lane, work[lane][1], self._effort.repeats)) for lane in set(kinds.values())
        }
        return [LaunchCost(kind=kind, role=None, duration_ns=measured[lane]) for kind, lane in kinds.items()]

    def device_bytes_per_s(self) -> Spread:
        """Copy within device memory, read + write."""
        source, destination = self._gpu[Lane.H2D], self._gpu[Lane.D2H]
        durations = timed(self._backend, Lane.COMPUTE, lambda: destination.copy_(source), self._effort.repeats)
        return rate_spread(2 * source.nbytes, durations)


class SsdProbe:
    """Direct sequential I/O on a temporary file: its first half is read, its second half written."""

    def __init__(self, backend: Backend, folder: Path, descriptor: int, effort: Effort) -> None:
        self._backend = backend
        self._folder = folder
        self._descriptor = descriptor
        self._effort = effort
        # Page-aligned, as direct I/O wants it; one for each direction.
        self._blocks = {lane: mmap.mmap(-1, SSD_BLOCK_BYTES) for lane in (Lane.SSD_READ, Lane.SSD_WRITE)}
        self._blocks[Lane.SSD_WRITE].write(os.urandom(SSD_BLOCK_BYTES))
        half = effort.ssd_bytes // SSD_BLOCK_BYTES // 2
        for place in range(2 * half):
            os.pwrite(descriptor, self._blocks[Lane.SSD_WRITE], place * SSD_BLOCK_BYTES)
        os.fsync(descriptor)
        self._places = {Lane.SSD_READ: cycle(range(half)), Lane.SSD_WRITE: cycle(range(half, 2 * half))}

    @classmethod
    @contextlib.contextmanager
    def open(cls, backend: Backend, folder: Path, effort: Effort) -> Iterator[SsdProbe | None]:
        """The probe on a file in this folder, removed afterwards; None where there is no room or no direct I/O."""
        with contextlib.ExitStack() as stack:
            try:
                created, name = tempfile.mkstemp(dir=folder, prefix=".slideplan-probe-")
                stack.callback(Path(name).unlink, missing_ok=True)
                os.close(created)
                descriptor = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
                stack.callback(os.close, descriptor)
                probe = cls(backend, folder, descriptor, effort)
            except OSError:
                yield None
                return
            yield probe

    def _read(self) -> object:
        place = next(self._places[Lane.SSD_READ]) * SSD_BLOCK_BYTES
        return os.preadv(self._descriptor, [self._blocks[Lane.SSD_READ]], place)

    def _write(self) -> object:
        place = next(self._places[Lane.SSD_WRITE]) * SSD_BLOCK_BYTES
        return os.pwrite(self._descriptor, self._blocks[Lane.SSD_WRITE], place)

    def work(self) -> dict[Lane, Work]:
        """Reading and writing, block by block."""
        return {Lane.SSD_READ: (SSD_BLOCK_BYTES, self._read), Lane.SSD_WRITE: (SSD_BLOCK_BYTES, self._write)}

    def profile(self, duplex_bytes_per_s: int) -> SsdProfile:
        """Curves of both directions alone, with the sum of both at once as measured elsewhere."""
        blocks = max(1, self._effort.ssd_bytes // SSD_BLOCK_BYTES // 2)
        read, write = (
            Curve(points=(RatePoint(size=units, rate=rate_spread(units, timed(self._backend, lane, action, blocks))),))
            for lane, (units, action) in self.work().items()
        )
        status = os.statvfs(self._folder)
        return SsdProfile(
            path=str(self._folder),
            capacity_bytes=status.f_bavail * status.f_frsize,
            read=read,
            write=write,
            duplex_bytes_per_s=duplex_bytes_per_s,
        )
