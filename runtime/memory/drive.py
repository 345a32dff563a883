"""Slots on the SSD: one file, reserved before the first step, read and written past the system's page cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from runtime.memory.parts import Part
from runtime.storage.disk import Disk
from runtime.storage.files import ALIGN_BYTES
from slideplan.graph.tasks import SlotPool, TaskGraph
from slideplan.placement import Tier
from slideplan.quantities import MIB

# What a drive needs to be busy, measured on one: four requests of 4 MiB for each direction.
PIECE_BYTES, THREADS = 4 * MIB, 4


class Drive:
    """All slots of a graph on the SSD. A lane reads and writes them whole; who has the run to itself, by parts.

    An error names the file.
    """

    def __init__(self, disk: Disk, folder: Path, pools: Sequence[SlotPool]) -> None:
        """Raises OSError where the drive has no room."""
        self._first_byte: dict[str, int] = {}
        self._slot_bytes: dict[str, int] = {}
        end = 0
        for pool in pools:
            assert pool.slot_bytes % ALIGN_BYTES == 0, "chunks of state on the drive are whole pages"
            self._first_byte[pool.name], self._slot_bytes[pool.name] = end, pool.slot_bytes
            end += pool.total_bytes
        self._file = disk.scratch(folder, end)
        self._threads = ThreadPoolExecutor(2 * THREADS, thread_name_prefix="drive")

    @classmethod
    def for_graph(cls, disk: Disk, folder: Path, graph: TaskGraph) -> Drive | None:
        """With a graph's slots on the SSD; None where it has none. Raises OSError as above."""
        pools = [pool for pool in graph.pools if pool.tier is Tier.SSD]
        return cls(disk, folder, pools) if pools else None

    @property
    def direct(self) -> bool:
        """Whether the filesystem lets reads and writes pass by its page cache."""
        return self._file.direct

    def read(self, slot: tuple[str, int], into: torch.Tensor) -> None:
        """Fill a host slot with what the slot on the drive holds."""
        self._move(self._file.read, slot, into)

    def write(self, slot: tuple[str, int], values: torch.Tensor) -> None:
        """Write a host slot into the slot on the drive."""
        self._move(self._file.write, slot, values)

    def _move(self, move: Callable[[memoryview, int], None], slot: tuple[str, int], memory: torch.Tensor) -> None:
        content, first = memory.view(-1).view(torch.uint8).numpy().data, self._offset(slot)
        assert len(content) == self._slot_bytes[slot[0]], "slots that a copy joins are equal"
        moves = [
            self._threads.submit(move, content[done : done + PIECE_BYTES], first + done)
            for done in range(0, len(content), PIECE_BYTES)
        ]
        # All of them, before an error of one is raised: the host slot is another task's then.
        failures = [error for each in moves if (error := each.exception()) is not None]
        if failures:
            raise failures[0]

    def part(self, slot: tuple[str, int], first_byte: int, size_bytes: int) -> Part:
        """Some bytes of a slot."""
        return _DrivePart(self, self._offset(slot) + first_byte, size_bytes)

    def pages(self, first_byte: int, size_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Blocks of whole pages that hold these bytes of the file, each with its offset; valid until the next is asked for."""
        first, end = first_byte - first_byte % ALIGN_BYTES, -(-(first_byte + size_bytes) // ALIGN_BYTES) * ALIGN_BYTES
        room = torch.empty(min(PIECE_BYTES, end - first) + ALIGN_BYTES, dtype=torch.uint8)
        aligned = room[-room.data_ptr() % ALIGN_BYTES :]
        for offset in range(first, end, PIECE_BYTES):
            block = aligned[: min(PIECE_BYTES, end - offset)]
            self._file.read(block.numpy().data, offset)
            yield offset, block

    def put(self, offset: int, block: torch.Tensor) -> None:
        """Write a block of `pages` back."""
        self._file.write(block.numpy().data, offset)

    def close(self) -> None:
        """Give the room back. No lane may be running."""
        self._threads.shutdown()
        self._file.abandon()

    def _offset(self, slot: tuple[str, int]) -> int:
        pool, number = slot
        return self._first_byte[pool] + number * self._slot_bytes[pool]


class _DrivePart:
    """Bytes of the drive's file, of any length and at any offset. Two threads may not write within one page."""

    def __init__(self, drive: Drive, first_byte: int, size_bytes: int) -> None:
        self.nbytes = size_bytes
        self._drive = drive
        self._first_byte = first_byte

    def read(self, first: int, into: torch.Tensor) -> None:
        for _, _, inside, there in self._overlaps(first, into):
            there.copy_(inside)

    def write(self, first: int, values: torch.Tensor) -> None:
        for offset, pages, inside, there in self._overlaps(first, values):
            inside.copy_(there)
            self._drive.put(offset, pages)

    def _overlaps(self, first: int, part: torch.Tensor) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Blocks of pages that hold as many bytes as a part has, with the offset of each, and what both have in common."""
        start = self._first_byte + first
        for offset, pages in self._drive.pages(start, len(part)):
            low, high = max(offset, start), min(offset + len(pages), start + len(part))
            yield offset, pages, pages[low - offset : high - offset], part[low - start : high - start]
