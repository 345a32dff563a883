"""Slots on the SSD: a file on each drive, reserved before the first step, read and written past the system's page cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from runtime.lanes.helpers import grace_ends_ns
from runtime.lanes.patience import Patience
from runtime.memory.parts import Part
from runtime.memory.striping import Extent, Striping
from runtime.memory.volume import PIECE_BYTES, Direction, Move, Volume
from runtime.storage.disk import Disk
from runtime.storage.files import ALIGN_BYTES
from slideplan.graph.tasks import SlotPool, TaskGraph
from slideplan.placement import Tier

Slot = tuple[str, int]  # pool and number


class Drive:
    """All slots of a graph on the SSD, striped over one or more drives. A lane reads and writes them whole; who has the run to
    itself, by parts.

    An error names the file. patience: what the drives are asked for, and for how long they have answered nothing
    """

    def __init__(
        self, disk: Disk, folders: Sequence[Path], pools: Sequence[SlotPool], speeds: Sequence[float] = (1.0,)
    ) -> None:
        """folders: one on each drive. speeds: of the drives, in any unit. Raises OSError, which names a folder without room."""
        assert len(folders) == len(speeds), "every drive has a speed"
        self.patience = Patience(", ".join(map(str, folders)))
        self._striping = Striping(pools, speeds)
        self._volumes: list[Volume] = []
        watched = self.patience.watched(disk)
        try:
            for folder, size_bytes in zip(folders, self._striping.sizes, strict=True):
                self._volumes.append(_reserved(watched, folder, size_bytes))
        except BaseException:
            self.close()
            raise

    @classmethod
    def for_graph(cls, disk: Disk, folders: Sequence[Path], graph: TaskGraph, speeds: Sequence[float] = (1.0,)) -> Drive | None:
        """With a graph's slots on the SSD; None where it has none. Raises OSError as above."""
        pools = on_drive(graph)
        return cls(disk, folders, pools, speeds) if pools else None

    @property
    def buffered(self) -> list[Path]:
        """Folders whose filesystems let no reads and writes pass by their page cache."""
        return [volume.folder for volume in self._volumes if not volume.direct]

    def begin(self, direction: Direction, copies: Sequence[tuple[Slot, torch.Tensor]]) -> Move:
        """Read or write slots, whole: from or into host slots, which must stay as they are until the pieces have ended.

        Pieces begin in the order of calls, for each direction.
        """
        pieces: list[tuple[Extent, memoryview]] = []
        for slot, memory in copies:
            content = memory.view(-1).view(torch.uint8).numpy().data
            assert len(content) == self._striping.slot_bytes(slot), "slots that a copy joins are equal"
            found = self._striping.extents(slot, 0, len(content), PIECE_BYTES)
            pieces += [(each, content[each.first_byte : each.first_byte + each.size_bytes]) for each in found]
        move = Move(len(pieces))
        for extent, block in pieces:
            self._volumes[extent.drive].begin(direction, block, extent.offset, move)
        return move

    def read(self, slot: Slot, into: torch.Tensor) -> None:
        """Fill a host slot with what the slot on the drive holds."""
        self.begin("read", [(slot, into)]).wait()

    def write(self, slot: Slot, values: torch.Tensor) -> None:
        """Write a host slot into the slot on the drive."""
        self.begin("write", [(slot, values)]).wait()

    def part(self, slot: Slot, first_byte: int, size_bytes: int) -> Part:
        """Some bytes of a slot."""
        return _DrivePart(self, slot, first_byte, size_bytes)

    def pages(self, slot: Slot, first_byte: int, size_bytes: int) -> Iterator[tuple[Extent, torch.Tensor]]:
        """Blocks of whole pages that hold these bytes of a slot, each with its place; valid until the next is asked for.

        Raises Hung where the drive does not answer.
        """
        first, end = first_byte - first_byte % ALIGN_BYTES, -(-(first_byte + size_bytes) // ALIGN_BYTES) * ALIGN_BYTES
        room = torch.empty(min(PIECE_BYTES, end - first) + ALIGN_BYTES, dtype=torch.uint8)
        aligned = room[-room.data_ptr() % ALIGN_BYTES :]
        for extent in self._striping.extents(slot, first, end - first, PIECE_BYTES):
            block = aligned[: extent.size_bytes]
            self._move_now("read", extent, block)
            yield extent, block

    def put(self, extent: Extent, block: torch.Tensor) -> None:
        """Write a block of `pages` back. Raises Hung as it does."""
        self._move_now("write", extent, block)

    def _move_now(self, direction: Direction, extent: Extent, block: torch.Tensor) -> None:
        move = Move(1)
        self._volumes[extent.drive].begin(direction, block.numpy().data, extent.offset, move)
        self.patience.wait(move.ended)
        move.wait()

    def close(self) -> bool:
        """Give the room back, and end what still moves: no lane may wait for it.

        Whether it has ended. It has not where a drive holds it up, which is waited for no more than a moment: memory that it
        moves must stay then.
        """
        for volume in self._volumes:
            volume.closing()
        by_ns = grace_ends_ns()
        ended = [volume.close(by_ns) for volume in self._volumes]
        return all(ended)


def on_drive(graph: TaskGraph) -> list[SlotPool]:
    """Slots of a graph on the SSD."""
    return [pool for pool in graph.pools if pool.tier is Tier.SSD]


def _reserved(disk: Disk, folder: Path, size_bytes: int) -> Volume:
    try:
        return Volume(disk, folder, size_bytes)
    except OSError as error:  # of a file whose name says nothing to anybody
        raise OSError(error.errno, error.strerror, str(folder)) from error


class _DrivePart:
    """Bytes of a slot on the drive, of any length and at any place. Two threads may not write within one page."""

    def __init__(self, drive: Drive, slot: Slot, first_byte: int, size_bytes: int) -> None:
        self.nbytes = size_bytes
        self._drive = drive
        self._slot = slot
        self._first_byte = first_byte

    def read(self, first: int, into: torch.Tensor) -> None:
        for _, _, inside, there in self._overlaps(first, into):
            there.copy_(inside)

    def write(self, first: int, values: torch.Tensor) -> None:
        for extent, pages, inside, there in self._overlaps(first, values):
            inside.copy_(there)
            self._drive.put(extent, pages)

    def _overlaps(self, first: int, part: torch.Tensor) -> Iterator[tuple[Extent, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Blocks of pages that hold as many bytes as a part has, with the place of each, and what both have in common."""
        start = self._first_byte + first
        for extent, pages in self._drive.pages(self._slot, start, len(part)):
            low = max(extent.first_byte, start)
            high = min(extent.first_byte + len(pages), start + len(part))
            yield extent, pages, pages[low - extent.first_byte : high - extent.first_byte], part[low - start : high - start]
