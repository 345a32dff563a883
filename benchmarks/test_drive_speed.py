"""Slots read and written by the class that runs use, against plain preadv and pwritev on the same file at the same depth.

    python -m pytest benchmarks/test_drive_speed.py --benchmark-enable -s --basetemp FOLDER/benchmark

FOLDER is on the drive. Rounds of both alternate, so that a drive that changes its mind does so for both. The ratio of the
medians is printed, and stands in the benchmark's extra_info: of lanes, which issue a slot while one goes on, and of slots moved
one by one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import pytest
import torch

from runtime.lanes.ahead import MOST
from runtime.memory.drive import Drive
from runtime.memory.host_memory import host_buffer
from runtime.memory.volume import PIECE_BYTES, THREADS, Direction, Move
from runtime.storage.disk import Disk
from slideplan.graph.tasks import SlotPool
from slideplan.placement import TensorClass, Tier

# The size of a slot is no multiple of a round of pieces: those of chunks of state are none.
POOL = SlotPool("ssd.moments", Tier.SSD, TensorClass.MOMENTS, 41 << 20, 24)
ROUNDS = 7
Wanted = dict[Direction, list[int]]


def at_once(works: Sequence[Callable[[], None]]) -> float:
    """Seconds that all take, each in a thread of its own."""
    threads = [threading.Thread(target=work) for work in works]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


class Moves:
    """Both ways to move slots of one drive, with a host slot for each direction and each that goes on at a time."""

    def __init__(self, folder: Path) -> None:
        self.drive = Drive(Disk(), [folder], [POOL])
        if self.drive.buffered:
            pytest.skip("no direct I/O here")
        self._descriptor = self.drive._volumes[0]._file._file.descriptor
        directions: tuple[Direction, ...] = ("read", "write")
        self._memory = {direction: [host_buffer(POOL.slot_bytes) for _ in range(MOST)] for direction in directions}
        for room in self._memory["write"]:
            room.copy_(torch.randint(0, 256, (POOL.slot_bytes,), dtype=torch.uint8))
        self.lanes({"write": list(range(POOL.count))})  # found room for

    def raw(self, wanted: Wanted) -> float:
        """As many threads for each direction as runs have, each of which takes the next piece."""
        return at_once([run for direction, slots in wanted.items() for run in [self._taker(direction, slots)] * THREADS])

    def _taker(self, direction: Direction, slots: list[int]) -> Callable[[], None]:
        call = os.preadv if direction == "read" else os.pwritev
        memory = self._memory[direction][0].numpy().data
        pieces = iter([(slot, at) for slot in slots for at in range(0, POOL.slot_bytes, PIECE_BYTES)])
        lock = threading.Lock()

        def run() -> None:
            while True:
                with lock:  # protects the pieces that are left
                    slot, at = next(pieces, (0, None))
                if at is None:
                    return
                block = memory[at : min(at + PIECE_BYTES, POOL.slot_bytes)]
                assert call(self._descriptor, [block], slot * POOL.slot_bytes + at) == len(block)

        return run

    def lanes(self, wanted: Wanted, most: int = MOST) -> float:
        """By the drive, with so many slots going on at a time in each direction."""

        def lane(direction: Direction, slots: list[int]) -> None:
            going: list[Move] = []
            for number, slot in enumerate(slots):
                if len(going) == most:
                    going.pop(0).wait()
                going.append(self.drive.begin(direction, [((POOL.name, slot), self._memory[direction][number % MOST])]))
            for move in going:
                move.wait()

        return at_once([lambda each=each: lane(*each) for each in wanted.items()])


@pytest.mark.ssd
@pytest.mark.parametrize("directions", [("read",), ("write",), ("read", "write")], ids=["read", "write", "both"])
def test_drive_speed(benchmark, tmp_path: Path, directions: tuple[Direction, ...]) -> None:
    moves = Moves(tmp_path)
    wanted = {direction: list(range(first, POOL.count, len(directions))) for first, direction in enumerate(directions)}
    size_bytes = POOL.total_bytes
    seconds: dict[str, list[float]] = {"raw": [], "one by one": []}

    def setup() -> None:
        seconds["raw"].append(moves.raw(wanted))
        seconds["one by one"].append(moves.lanes(wanted, most=1))

    rounds = ROUNDS if benchmark.enabled else 1
    benchmark.pedantic(moves.lanes, (wanted,), setup=setup, rounds=rounds, warmup_rounds=0)
    assert moves.drive.close()
    if benchmark.stats is None:
        return
    raw = size_bytes / median(seconds["raw"])
    benchmark.extra_info |= {
        "raw_bytes_per_s": round(raw),
        "of_raw": round(size_bytes / benchmark.stats.stats.median / raw, 3),
        "one_by_one_of_raw": round(size_bytes / median(seconds["one by one"]) / raw, 3),
    }
    print(f"\n{' and '.join(directions)}: {benchmark.extra_info}")
