"""One file of the SSD tier with the threads that read and write it."""

from __future__ import annotations

import errno
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Literal, NamedTuple

from runtime.lanes.helpers import Helper, ended, helpers, idle
from runtime.storage.disk import Disk
from runtime.storage.files import ScratchFile
from slideplan.quantities import MIB

# What a drive needs to be busy, measured on one: four requests of 4 MiB for each direction.
PIECE_BYTES, THREADS = 4 * MIB, 4

Direction = Literal["read", "write"]


class Move:
    """Pieces on their way from or to drives."""

    def __init__(self, pieces: int) -> None:
        assert pieces, "something is moved"
        self._left = pieces
        self._error: BaseException | None = None  # the first one
        self._over = threading.Event()
        self._told: Callable[[BaseException | None], None] | None = None
        self._lock = threading.Lock()

    def then(self, told: Callable[[BaseException | None], None]) -> None:
        """Tell somebody once all pieces have ended, and of the first that failed: in the thread of the last one, or here."""
        with self._lock:  # protects who is told from the end, which comes in another thread
            if not self._over.is_set():
                self._told = told
                return
        told(self._error)

    def ended(self, seconds: float | None = None) -> bool:
        """Wait so long at most, None: as long as it takes. Whether all pieces have ended."""
        return self._over.wait(seconds)

    def wait(self) -> None:
        """Wait for all pieces, then raise the first error: the memory is another task's from then on."""
        self._over.wait()
        if self._error is not None:
            raise self._error

    def piece_ended(self, error: BaseException | None) -> None:
        """One piece less."""
        with self._lock:  # protects the count and the error, which several threads change
            self._left -= 1
            self._error = self._error or error
            if self._left:
                return
            self._over.set()
            told = self._told
        if told is not None:
            told(self._error)


class _Piece(NamedTuple):
    block: memoryview
    offset: int
    move: Move


class Volume:
    """A file without a name in a folder, whole from the start. Pieces of each direction begin in the order of `begin`."""

    def __init__(self, disk: Disk, folder: Path, size_bytes: int) -> None:
        """Raises OSError where there is no room."""
        self.folder = folder
        self._file = disk.scratch(folder, size_bytes)
        self._closed = threading.Event()
        self._waiting: _Waiting = {"read": SimpleQueue(), "write": SimpleQueue()}
        self._threads: list[Helper] = []
        for direction, waiting in self._waiting.items():
            serve = partial(_serve, self._file, direction, waiting, self._closed)
            self._threads += helpers(f"drive-{direction}", THREADS, serve)
        weakref.finalize(self, _end_threads, self._waiting)
        for thread in self._threads:
            thread.start()

    @property
    def direct(self) -> bool:
        """Whether the filesystem lets reads and writes pass by its page cache."""
        return self._file.direct

    def begin(self, direction: Direction, block: memoryview, offset: int, move: Move) -> None:
        """Move a block of whole pages, which must stay until the piece has ended: with an error, where this is closed."""
        if self._closed.is_set():  # by who leaves a lane behind, which may still ask
            move.piece_ended(_closed_error(self._file.path))
            return
        self._waiting[direction].put(_Piece(block, offset, move))

    def closing(self) -> None:
        """Pieces that have not begun end with an error, and threads with the pieces that have."""
        self._closed.set()
        _end_threads(self._waiting)

    def close(self, by_ns: int) -> bool:
        """Give the room back, once all threads have ended. False where the drive holds one up until then: the file stays."""
        if not ended(self._threads, by_ns):
            return False
        self._file.abandon()
        return True


_Waiting = dict[Direction, SimpleQueue[_Piece | None]]


def _end_threads(waiting: _Waiting) -> None:
    for pieces in waiting.values():
        for _ in range(THREADS):
            pieces.put(None)


def _closed_error(path: Path) -> OSError:
    return OSError(errno.ECANCELED, "is closed", str(path))


def _serve(file: ScratchFile, direction: Direction, waiting: SimpleQueue[_Piece | None], closed: threading.Event) -> None:
    """Move pieces, one after the other. No thread keeps its volume: one that nobody has any more ends its threads."""
    do = file.read if direction == "read" else file.write
    while (piece := idle(waiting.get)) is not None:
        error: BaseException | None = None
        try:
            if closed.is_set():
                raise _closed_error(file.path)
            do(piece.block, piece.offset)
        except BaseException as failure:  # whoever waits for the piece raises it
            error = failure
        piece.move.piece_ended(error)
        del piece  # and its memory
