"""How fast drives are beside each other, found in a moment before a run's slots are striped over them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.lanes.helpers import Helper, grace_ends_ns
from runtime.lanes.patience import Patience
from runtime.memory.host_memory import host_buffer
from runtime.memory.volume import PIECE_BYTES, Move, Volume
from runtime.storage.disk import Disk
from slideplan.quantities import MIB

# Of each drive that is measured, and for how long.
MEASURED_BYTES = 64 * MIB
LEAST_MEASURE_NS = 500_000_000


def measured_speeds(disk: Disk, folders: Sequence[Path]) -> list[float]:
    """Bytes/s that each folder's drive moves, reads and writes at once, while all others do so. One drive need not be measured.

    It takes MEASURED_BYTES in each folder for a moment. Raises OSError, which names the file, and Hung where a drive does not
    answer.
    """
    if len(folders) == 1:
        return [1.0]
    patience = Patience(", ".join(map(str, folders)))
    watched = patience.watched(disk)
    with contextlib.ExitStack() as stack:
        measures = []
        for folder in folders:
            measures.append(_Measure(Volume(watched, folder, MEASURED_BYTES)))
            stack.callback(measures[-1].close)
        threads = [Helper("drive-measure", each.run) for each in measures]
        for thread in threads:
            thread.start()
        for thread in threads:
            patience.wait(thread.wait)
        return [each.per_s() for each in measures]


class _Measure:
    """Passes through one drive's file, all of which is read and written at once. Of what is there nothing is asked."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._error: BaseException | None = None
        self._per_s = 0.0
        memory = host_buffer(2 * PIECE_BYTES)
        memory[:PIECE_BYTES] = torch.randint(0, 256, (PIECE_BYTES,), dtype=torch.uint8)  # no drive can make it smaller
        self._written, self._read = memory[:PIECE_BYTES].numpy().data, memory[PIECE_BYTES:].numpy().data

    def run(self) -> None:
        """Measure."""
        try:
            self._pass()  # what is written for the first time has to be found room for
            started_ns, moved, took_ns = time.perf_counter_ns(), 0, 0
            while took_ns < LEAST_MEASURE_NS:
                moved += self._pass()
                took_ns = max(1, time.perf_counter_ns() - started_ns)
            self._per_s = moved * 1e9 / took_ns
        except BaseException as error:  # whoever asks for the speed raises it
            self._error = error

    def per_s(self) -> float:
        """Bytes that were moved, both ways. Raises what went wrong."""
        if self._error is not None:
            raise self._error
        return self._per_s

    def close(self) -> None:
        """Give the room back, unless the drive holds it."""
        self._volume.closing()
        self._volume.close(grace_ends_ns())

    def _pass(self) -> int:
        offsets = range(0, MEASURED_BYTES, PIECE_BYTES)
        move = Move(2 * len(offsets))
        for offset in offsets:
            self._volume.begin("write", self._written, offset, move)
            self._volume.begin("read", self._read, offset, move)
        move.wait()
        return 2 * MEASURED_BYTES
