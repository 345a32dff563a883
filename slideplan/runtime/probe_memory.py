"""Probes of links, optimizer, memory and disk."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from slideplan.plan.graph import Lane
from slideplan.plan.machine import Curve, LinkProfile, OptimizerProfile, RatePoint, SsdProfile
from slideplan.plan.policy import Tier
from slideplan.plan.slots import UPDATE_STATE_TRAFFIC_BYTES
from slideplan.runtime.backend import Backend
from slideplan.runtime.handlers import gpu_update
from slideplan.runtime.optimizer import AdamW, HostUpdate
from slideplan.runtime.probing import Effort, rate_spread, timed, together

TOGETHER_NS = 1_000_000_000
BF16_UPDATE_BYTES = UPDATE_STATE_TRAFFIC_BYTES + 2  # per element, with a bf16 gradient
SSD_BLOCK_BYTES = 16 << 20


class MemoryProbes:
    """Buffers once, then curves and rates over them."""

    def __init__(self, backend: Backend, effort: Effort, threads: int) -> None:
        self._host_update = HostUpdate(threads)
        self._backend = backend
        self._effort = effort
        size = effort.largest_copy_bytes
        self._host = {lane: backend.allocate(Tier.HOST, size, copied=True) for lane in (Lane.H2D, Lane.D2H)}
        self._gpu = {lane: backend.allocate(Tier.GPU, size, copied=True) for lane in (Lane.H2D, Lane.D2H)}

    def _copy(self, lane: Lane, size: int) -> Callable[[], object]:
        source, destination = (self._host, self._gpu) if lane is Lane.H2D else (self._gpu, self._host)
        # On a CPU backend a copy returns when it is done; on streams it is queued like the executor's.
        return lambda: destination[lane][:size].copy_(source[lane][:size], non_blocking=True)

    def _sizes(self) -> list[int]:
        sizes = [1 << 16]
        while sizes[-1] * 4 < self._effort.largest_copy_bytes:
            sizes.append(sizes[-1] * 4)
        return [*sizes, self._effort.largest_copy_bytes]

    def link(self) -> LinkProfile:
        """Both directions alone over sizes, then at once at the largest size."""
        curves = {}
        for lane in (Lane.H2D, Lane.D2H):
            points = []
            for size in self._sizes():
                durations = timed(self._backend, lane, self._copy(lane, size), self._effort.repeats)
                points.append(RatePoint(size=size, rate=rate_spread(size, durations)))
            curves[lane] = Curve(points=tuple(points))
        size = self._effort.largest_copy_bytes
        rates = together(self._backend, {lane: (size, self._copy(lane, size)) for lane in (Lane.H2D, Lane.D2H)}, TOGETHER_NS)
        return LinkProfile(h2d=curves[Lane.H2D], d2h=curves[Lane.D2H], duplex_bytes_per_s=round(sum(rates.values())))

    def _update(self, tier: Tier) -> Callable[[], object]:
        elements = self._effort.optimizer_elements
        device = self._backend.device if tier is Tier.GPU else torch.device("cpu")
        update = gpu_update(device, self._host_update) if tier is Tier.GPU else self._host_update
        weights = torch.randn(elements, device=device).bfloat16()
        gradient = torch.randn(elements, device=device).bfloat16()
        remainder = torch.zeros(elements, dtype=torch.int16, device=device)
        moments = torch.zeros(2, elements, device=device)
        return lambda: update(weights, remainder, moments, gradient, AdamW(), 0)

    def optimizer(self) -> OptimizerProfile:
        """AdamW on either side, alone."""
        size = self._effort.optimizer_elements * BF16_UPDATE_BYTES
        host = timed(self._backend, Lane.HOST_UPDATE, self._update(Tier.HOST), self._effort.repeats)
        gpu = timed(self._backend, Lane.GPU_UPDATE, self._update(Tier.GPU), self._effort.repeats)
        return OptimizerProfile(
            threads=self._host_update.threads, host_bytes_per_s=rate_spread(size, host), gpu_bytes_per_s=rate_spread(size, gpu)
        )

    def host_dram_bytes_per_s(self) -> int:
        """Traffic of optimizer and copies both ways, all at once.

        This is the capacity they share: alone, none of them saturates it. On a CPU backend a copy reads
        and writes RAM, with a GPU it does one of the two.
        """
        size = self._effort.largest_copy_bytes
        work = {lane: (size, self._copy(lane, size)) for lane in (Lane.H2D, Lane.D2H)}
        work[Lane.HOST_UPDATE] = (self._effort.optimizer_elements * BF16_UPDATE_BYTES, self._update(Tier.HOST))
        rates = together(self._backend, work, TOGETHER_NS)
        passes = 2 if self._backend.name == "cpu" else 1
        return round(rates[Lane.HOST_UPDATE] + passes * (rates[Lane.H2D] + rates[Lane.D2H]))

    def device_bytes_per_s(self) -> int:
        """Copy within device memory, read + write."""
        source, destination = self._gpu[Lane.H2D], self._gpu[Lane.D2H]
        durations = timed(self._backend, Lane.COMPUTE, lambda: destination.copy_(source), self._effort.repeats)
        return rate_spread(2 * source.nbytes, durations).p50


def ssd(folder: Path, effort: Effort) -> SsdProfile | None:
    """Direct sequential I/O on a temporary file in the folder; None where it does not allow direct I/O."""
    direct = getattr(os, "O_DIRECT", 0)
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=".slideplan-probe-")
    except OSError:
        return None
    os.close(descriptor)
    try:
        descriptor = os.open(name, os.O_RDWR | direct)
    except OSError:
        Path(name).unlink()
        return None
    blocks = effort.ssd_bytes // SSD_BLOCK_BYTES
    block = mmap.mmap(-1, SSD_BLOCK_BYTES)  # page-aligned, as direct I/O wants it
    block.write(os.urandom(SSD_BLOCK_BYTES))
    try:
        writes = [_once(partial(os.pwrite, descriptor, block, at * SSD_BLOCK_BYTES)) for at in range(blocks)]
        os.fsync(descriptor)
        reads = [_once(partial(os.preadv, descriptor, [block], at * SSD_BLOCK_BYTES)) for at in range(blocks)]
    except OSError:
        return None
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            Path(name).unlink()
    status = os.statvfs(folder)
    read, write = (
        Curve(points=(RatePoint(size=SSD_BLOCK_BYTES, rate=rate_spread(SSD_BLOCK_BYTES, times)),)) for times in (reads, writes)
    )
    # One queue in both directions: the disk's own sum is not measured apart here.
    duplex = max(read.points[0].rate.p50, write.points[0].rate.p50)
    return SsdProfile(
        path=str(folder), capacity_bytes=status.f_bavail * status.f_frsize, read=read, write=write, duplex_bytes_per_s=duplex
    )


def _once(action: Callable[[], int]) -> int:
    started = time.perf_counter_ns()
    action()
    return time.perf_counter_ns() - started
