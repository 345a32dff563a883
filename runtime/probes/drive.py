"""Probe of the SSD, through the class by which runs read and write it."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from runtime.lanes.backend import Backend
from runtime.memory.drive import Drive
from runtime.memory.host_memory import host_buffer
from runtime.memory.speeds import measured_speeds
from runtime.memory.volume import PIECE_BYTES, Direction, Move
from runtime.probes.timing import Effort, Work, rate_spread, timed
from runtime.storage.disk import Disk
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import SlotPool
from slideplan.machine.profile import Curve, RatePoint, SsdProfile
from slideplan.placement import TensorClass, Tier

SLOT_BYTES = 64 << 20  # of the order of a chunk of state
SMALL = SlotPool("ssd.small", Tier.SSD, TensorClass.MOMENTS, PIECE_BYTES, 8)
DIRECTIONS: dict[LaneKind, Direction] = {LaneKind.SSD_READ: "read", LaneKind.SSD_WRITE: "write"}
ROOM_SHARE = 4  # of the room that is free, one part is taken at most
CACHED = 1.1  # a drive that begins faster than it goes on by this much has a write cache


class SsdProbe:
    """Reads and writes slots of a file without a name on each drive: half of the large ones are read, the others written.

    speeds: of several drives beside each other, in bytes/s both ways: slots are striped as runs have them
    """

    def __init__(
        self,
        backend: Backend,
        folders: Sequence[Path],
        speeds: Sequence[float],
        capacity_bytes: int,
        drive: Drive,
        slots: SlotPool,
    ) -> None:
        self.speeds = speeds
        self._backend = backend
        self._folders = folders
        self._capacity_bytes = capacity_bytes
        self._drive = drive
        large, small = ([(pool.name, number) for number in range(pool.count)] for pool in (slots, SMALL))
        self._slot_bytes = slots.slot_bytes
        self._going: dict[LaneKind, Move] = {}
        self._memory = {lane: _noise(slots.slot_bytes) for lane in (LaneKind.SSD_READ, LaneKind.SSD_WRITE)}
        for slot in small:
            drive.write(slot, self._memory[LaneKind.SSD_WRITE][:PIECE_BYTES])
        self._small, self._slots = itertools.cycle(small), len(large)
        # All of it is written once, in the order in which it lies: a drive's cache is full after a while.
        self._first_ns = self._write_ns(large)
        self._places = {LaneKind.SSD_READ: itertools.cycle(large[::2]), LaneKind.SSD_WRITE: itertools.cycle(large[1::2])}

    @classmethod
    @contextlib.contextmanager
    def open(cls, backend: Backend, folders: Sequence[Path], effort: Effort) -> Iterator[SsdProbe | None]:
        """The probe in these folders, one on each drive; None where there is no room or no direct I/O."""
        with contextlib.ExitStack() as stack:
            try:
                disk = Disk()
                speeds = measured_speeds(disk, folders)
                # As much as fills the first of several drives, each of which gets its share.
                free = [disk.free_bytes(folder) / speed for folder, speed in zip(folders, speeds, strict=True)]
                capacity_bytes = int(min(free) * sum(speeds))
                size_bytes = min(effort.ssd_bytes, capacity_bytes // ROOM_SHARE)
                slot_bytes = min(SLOT_BYTES, size_bytes // 4 // PIECE_BYTES * PIECE_BYTES)
                if not slot_bytes:
                    yield None
                    return
                slots = SlotPool("ssd.large", Tier.SSD, TensorClass.MOMENTS, slot_bytes, size_bytes // slot_bytes)
                drive = Drive(disk, folders, [SMALL, slots], speeds)
                stack.callback(drive.close)
                probe = None if drive.buffered else cls(backend, folders, speeds, capacity_bytes, drive, slots)
            except OSError:
                probe = None
            yield probe

    def _write_ns(self, slots: Sequence[tuple[str, int]]) -> list[int]:
        """How long each slot takes, all in order, each begun before the one before ends."""
        memory, ends = self._memory[LaneKind.SSD_WRITE], [time.perf_counter_ns()]
        going = self._drive.begin("write", [(slots[0], memory)])
        for slot in slots[1:]:
            following = self._drive.begin("write", [(slot, memory)])
            going.wait()
            ends.append(time.perf_counter_ns())
            going = following
        going.wait()
        ends.append(time.perf_counter_ns())
        return [max(1, end - start) for start, end in itertools.pairwise(ends)]

    def work(self) -> dict[LaneKind, Work]:
        """Reading and writing, slot after slot, as the lanes of a run do it: the next one begins before one ends."""

        def moving(lane: LaneKind, direction: Direction) -> Callable[[], object]:
            def move() -> None:
                before = self._going.get(lane)
                self._going[lane] = self._drive.begin(direction, [(next(self._places[lane]), self._memory[lane])])
                if before is not None:
                    before.wait()

            return move

        return {lane: (self._slot_bytes, moving(lane, direction)) for lane, direction in DIRECTIONS.items()}

    def profile(self, duplex_bytes_per_s: int) -> SsdProfile:
        """Curves of both directions alone, with the sum of both at once as measured elsewhere.

        Of writes the rate counts that the drive has come to, by the last half of the file. What it began with stands beside
        it where that is another one.
        """
        quarter = max(1, len(self._first_ns) // 4)
        begins, goes_on = (len(part) * self._slot_bytes * 10**9 // sum(part) for part in (self._first_ns[:quarter], self._late))
        reads = timed(self._backend, LaneKind.SSD_READ, self.work()[LaneKind.SSD_READ][1], max(2, self._slots // 2))
        return SsdProfile(
            path=", ".join(map(str, self._folders)),
            capacity_bytes=self._capacity_bytes,
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
