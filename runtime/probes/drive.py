"""Probe of the SSD, through the class by which runs read and write it."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from runtime.lanes.backend import Backend
from runtime.memory.drive import PIECE_BYTES, Drive
from runtime.memory.host_memory import host_buffer
from runtime.probes.timing import Effort, Work, rate_spread, timed
from runtime.storage.disk import Disk
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import SlotPool
from slideplan.machine.profile import Curve, RatePoint, SsdProfile
from slideplan.placement import TensorClass, Tier

SLOT_BYTES = 64 << 20  # of the order of a chunk of state
SMALL = SlotPool("ssd.small", Tier.SSD, TensorClass.MOMENTS, PIECE_BYTES, 8)
ROOM_SHARE = 4  # of the room that is free, one part is taken at most
CACHED = 1.1  # a drive that begins faster than it goes on by this much has a write cache


class SsdProbe:
    """Reads and writes slots of a file without a name: half of its large ones are read, the others written."""

    def __init__(self, backend: Backend, folder: Path, drive: Drive, slots: SlotPool) -> None:
        self._backend = backend
        self._folder = folder
        self._drive = drive
        large, small = ([(pool.name, number) for number in range(pool.count)] for pool in (slots, SMALL))
        self._slot_bytes = slots.slot_bytes
        self._memory = {lane: _noise(slots.slot_bytes) for lane in (LaneKind.SSD_READ, LaneKind.SSD_WRITE)}
        for slot in small:
            drive.write(slot, self._memory[LaneKind.SSD_WRITE][:PIECE_BYTES])
        self._small, self._slots = itertools.cycle(small), len(large)
        # All of it is written once, in the order in which it lies: a drive's cache is full after a while.
        self._first_ns = [self._write_ns(slot) for slot in large]
        self._places = {LaneKind.SSD_READ: itertools.cycle(large[::2]), LaneKind.SSD_WRITE: itertools.cycle(large[1::2])}

    @classmethod
    @contextlib.contextmanager
    def open(cls, backend: Backend, folder: Path, effort: Effort) -> Iterator[SsdProbe | None]:
        """The probe in this folder; None where there is no room or no direct I/O."""
        with contextlib.ExitStack() as stack:
            try:
                size_bytes = min(effort.ssd_bytes, Disk().free_bytes(folder) // ROOM_SHARE)
                slot_bytes = min(SLOT_BYTES, size_bytes // 4 // PIECE_BYTES * PIECE_BYTES)
                if not slot_bytes:
                    yield None
                    return
                slots = SlotPool("ssd.large", Tier.SSD, TensorClass.MOMENTS, slot_bytes, size_bytes // slot_bytes)
                drive = Drive(Disk(), folder, [SMALL, slots])
                stack.callback(drive.close)
                probe = cls(backend, folder, drive, slots) if drive.direct else None
            except OSError:
                probe = None
            yield probe

    def _write_ns(self, slot: tuple[str, int]) -> int:
        started = time.perf_counter_ns()
        self._drive.write(slot, self._memory[LaneKind.SSD_WRITE])
        return max(1, time.perf_counter_ns() - started)

    def work(self) -> dict[LaneKind, Work]:
        """Reading and writing, slot by slot, as the lanes of a run do it."""
        moves = {LaneKind.SSD_READ: self._drive.read, LaneKind.SSD_WRITE: self._drive.write}

        def moving(lane: LaneKind, move: Callable[[tuple[str, int], torch.Tensor], None]) -> Callable[[], object]:
            return lambda: move(next(self._places[lane]), self._memory[lane])

        return {lane: (self._slot_bytes, moving(lane, move)) for lane, move in moves.items()}

    def profile(self, duplex_bytes_per_s: int) -> SsdProfile:
        """Curves of both directions alone, with the sum of both at once as measured elsewhere.

        Of writes the rate counts that the drive has come to, by the last half of the file. What it began with stands beside
        it where that is another one.
        """
        quarter = max(1, len(self._first_ns) // 4)
        begins, goes_on = (len(part) * self._slot_bytes * 10**9 // sum(part) for part in (self._first_ns[:quarter], self._late))
        reads = timed(self._backend, LaneKind.SSD_READ, self.work()[LaneKind.SSD_READ][1], max(2, self._slots // 2))
        status = os.statvfs(self._folder)
        return SsdProfile(
            path=str(self._folder),
            capacity_bytes=status.f_bavail * status.f_frsize,
            read=self._curve(self._drive.read, reads),
            write=self._curve(self._drive.write, self._late),
            duplex_bytes_per_s=duplex_bytes_per_s,
            burst_write_bytes_per_s=begins if begins > CACHED * goes_on else None,
        )

    @property
    def _late(self) -> list[int]:
        return self._first_ns[len(self._first_ns) // 2 :]

    def _curve(self, move: Callable[[tuple[str, int], torch.Tensor], None], large_ns: list[int]) -> Curve:
        """Of single pieces, which wait for the drive's answer, and of slots."""
        memory = self._memory[LaneKind.SSD_READ][:PIECE_BYTES]
        lane = LaneKind.SSD_READ  # a lane of the host, as the other one
        small_ns = timed(self._backend, lane, lambda: move(next(self._small), memory), SMALL.count)
        sizes = {PIECE_BYTES: small_ns, self._slot_bytes: large_ns}
        return Curve(points=tuple(RatePoint(size=size, rate=rate_spread(size, times)) for size, times in sizes.items()))


def _noise(size_bytes: int) -> torch.Tensor:
    """Page-aligned bytes that no drive can make smaller."""
    memory = host_buffer(size_bytes)
    memory.copy_(torch.randint(0, 256, (size_bytes,), dtype=torch.uint8))
    return memory
