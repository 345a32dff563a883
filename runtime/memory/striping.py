"""Which part of each slot on the SSD lies on which drive, and where in its file. Nothing here reads or writes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from runtime.storage.files import ALIGN_BYTES
from slideplan.graph.tasks import SlotPool
from slideplan.quantities import MIB

# Parts of a slot are multiples of this, but for its end: a drive is slow where it is asked for less.
GRAIN_BYTES = MIB


class Extent(NamedTuple):
    """Some bytes of a slot, one after another: on which drive they lie, and from which byte of its file."""

    first_byte: int
    size_bytes: int
    drive: int
    offset: int


class Striping:
    """Every slot cut in one part for each drive, in proportion to the drives' speeds: whoever moves it keeps all of them busy.

    What a drive gets too little of one slot, it gets of the next. sizes: bytes on each drive
    """

    def __init__(self, pools: Iterable[SlotPool], speeds: Sequence[float]) -> None:
        """speeds: of the drives, in any unit, all positive"""
        assert speeds, "slots lie on a drive"
        assert min(speeds) > 0, "a drive moves something"
        self.sizes = [0] * len(speeds)
        self._extents: dict[tuple[str, int], tuple[Extent, ...]] = {}
        owed = [0.0] * len(speeds)
        for pool in pools:
            assert pool.slot_bytes % ALIGN_BYTES == 0, "chunks of state on the drive are whole pages"
            for number in range(pool.count):
                owed = [bytes_ + pool.slot_bytes * speed / sum(speeds) for bytes_, speed in zip(owed, speeds, strict=True)]
                parts = _parts(pool.slot_bytes, owed)
                self._extents[pool.name, number] = tuple(self._placed(parts))
                owed = [bytes_ - part for bytes_, part in zip(owed, parts, strict=True)]

    def slot_bytes(self, slot: tuple[str, int]) -> int:
        """Of a slot, in all its parts."""
        return sum(extent.size_bytes for extent in self._extents[slot])

    def extents(self, slot: tuple[str, int], first_byte: int, size_bytes: int, most_bytes: int) -> list[Extent]:
        """Where some bytes of a slot lie, in order, cut into pieces of `most_bytes` at most."""
        end = first_byte + size_bytes
        found = []
        for extent in self._extents[slot]:
            low, high = max(first_byte, extent.first_byte), min(end, extent.first_byte + extent.size_bytes)
            for first in range(low, high, most_bytes):
                offset = extent.offset + first - extent.first_byte
                found.append(Extent(first, min(most_bytes, high - first), extent.drive, offset))
        return found

    def _placed(self, parts: Sequence[int]) -> Iterable[Extent]:
        first = 0
        for drive, size in enumerate(parts):
            if size:
                yield Extent(first, size, drive, self.sizes[drive])
                self.sizes[drive] += size
                first += size


def _parts(slot_bytes: int, owed: Sequence[float]) -> list[int]:
    """Bytes of a slot for each drive: whole grains, as near to what each is owed as they can be; the last one ends the slot."""
    grains = max(1, slot_bytes // GRAIN_BYTES)
    given = [max(0, int(bytes_ // GRAIN_BYTES)) for bytes_ in owed]
    while sum(given) > grains:
        given[given.index(max(given))] -= 1
    while sum(given) < grains:
        lacks = [bytes_ - count * GRAIN_BYTES for bytes_, count in zip(owed, given, strict=True)]
        given[lacks.index(max(lacks))] += 1
    parts = [count * GRAIN_BYTES for count in given]
    last = max(drive for drive, count in enumerate(given) if count)
    parts[last] += slot_bytes - sum(parts)
    return parts
