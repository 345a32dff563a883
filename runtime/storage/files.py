"""Open files of a `Disk`: large ones, written and read in blocks by several threads, and logs, which grow by lines.

Large files pass by the system's page cache where the filesystem grants it (direct I/O). Blocks keep to the rules of direct
I/O always, so that a caller that breaks them fails everywhere: memory, offset and length are multiples of ALIGN_BYTES; only
the block that ends the file may have any length. What it has beyond the last multiple goes through a page of the file's own,
so callers need no room behind their blocks.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from runtime.storage.calls import Calls, OpenFile

ALIGN_BYTES = 4096


def too_short(path: Path, found_bytes: int, wanted_bytes: int) -> OSError:
    """A file that has become shorter than it was."""
    return OSError(errno.ENODATA, f"ends at byte {found_bytes} instead of {wanted_bytes}", str(path))


class _LargeFile:
    """A file in blocks. `direct`: whether the filesystem grants direct I/O; it may take that back at the first block."""

    def __init__(self, calls: Calls, file: OpenFile, size_bytes: int) -> None:
        self.path = file.path
        self.size_bytes = size_bytes
        self.direct = calls.set_direct(file, True)
        self._calls = calls
        self._file: OpenFile | None = file
        self._users = 0
        # Protects `_file` and `_users`: a descriptor that is closed under a thread that uses it may already be another file's.
        self._unused = threading.Condition()

    @contextlib.contextmanager
    def _used(self) -> Iterator[OpenFile]:
        with self._unused:
            if self._file is None:
                raise ValueError(f"{self.path}: is closed")
            file = self._file
            self._users += 1
        try:
            yield file
        finally:
            with self._unused:
                self._users -= 1
                self._unused.notify_all()

    def _taken(self) -> OpenFile | None:
        """The file, from now on the caller's alone, once no thread uses it any more; None if it was taken before."""
        with self._unused:
            file, self._file = self._file, None
            self._unused.wait_for(lambda: self._users == 0)
            return file

    def _check(self, block: memoryview, offset: int) -> None:
        end = offset + block.nbytes
        if block.ndim != 1 or block.itemsize != 1 or not block.c_contiguous:
            raise ValueError(f"{self.path}: a block must be bytes, one after another")
        if offset < 0 or end > self.size_bytes:
            raise ValueError(f"{self.path}: a block of bytes {offset} to {end} is outside a file of {self.size_bytes} bytes")
        if offset % ALIGN_BYTES or (block.nbytes % ALIGN_BYTES and end != self.size_bytes):
            raise ValueError(f"{self.path}: a block of bytes {offset} to {end} does not keep to multiples of {ALIGN_BYTES}")
        if np.frombuffer(block, np.uint8).ctypes.data % ALIGN_BYTES:
            raise ValueError(f"{self.path}: a block's memory does not begin at a multiple of {ALIGN_BYTES}")

    def _move(self, move: Callable[[OpenFile, memoryview, int], int], block: memoryview, offset: int, wanted: int) -> None:
        """Move a block by as many calls as it takes to move the `wanted` bytes at its beginning."""
        done = 0
        while done < wanted:
            with self._used() as file:
                was_direct = self.direct
                try:
                    moved = move(file, block[done:], offset + done)
                except OSError as error:
                    # Some filesystems grant direct I/O and refuse it when it comes, or go on after a short block in the
                    # midst of a page only without it. Threads that find this out together do the same thing.
                    if error.errno != errno.EINVAL or not was_direct:
                        raise
                    self._calls.set_direct(file, False)
                    self.direct = False
                    continue
            if moved == 0:
                raise too_short(self.path, offset + done, self.size_bytes)
            done += moved

    def abandon(self) -> None:
        """Close, once no thread uses it any more, whatever has been written, and never with an error. A file that has a name
        stays where it is. Once it is closed this does nothing.
        """
        if (file := self._taken()) is not None:
            with contextlib.suppress(OSError):
                self._calls.close(file)


class ScratchFile(_LargeFile):
    """A file without a name, for this process alone, read and written in blocks by several threads.

    Nothing in it is safe from anything: it is gone when it is closed, and when the process ends, however it ends.
    """

    def __init__(self, calls: Calls, file: OpenFile, size_bytes: int) -> None:
        if size_bytes % ALIGN_BYTES:
            raise ValueError(f"{file.path}: has {size_bytes} bytes, no multiple of {ALIGN_BYTES}")
        super().__init__(calls, file, size_bytes)
        if size_bytes:
            calls.truncate(file, size_bytes)  # so that it reads as zeros where room cannot be promised
            calls.allocate(file, size_bytes)

    def read(self, block: memoryview, offset: int) -> None:
        """Fill a block, whole, from an offset in bytes; with zeros where nothing was written.

        Raises OSError, which names the file.
        """
        self._check(block, offset)
        self._move(self._calls.read, block, offset, block.nbytes)

    def write(self, block: memoryview, offset: int) -> None:
        """Write a block at an offset in bytes. On return its memory is free again. Raises OSError, which names the file."""
        self._check(block, offset)
        self._move(self._calls.write, block, offset, block.nbytes)


class FileWriter(_LargeFile):
    """A new file of a size known before, written in blocks in any order, by several threads.

    It ends with `finish` or `abandon`, which wait for the threads that are writing.
    """

    def __init__(self, calls: Calls, file: OpenFile, size_bytes: int) -> None:
        super().__init__(calls, file, size_bytes)
        self._longer = size_bytes % ALIGN_BYTES > 0
        if size_bytes:
            # Room for whole pages, so that the drive is full before the first block or not at all.
            calls.allocate(file, -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES)

    def write(self, block: memoryview, offset: int) -> None:
        """Write a block at an offset in bytes. On return its memory is free again.

        Raises ValueError for a block that breaks the rules above, and OSError, which names the file.
        """
        self._check(block, offset)
        whole = block.nbytes - block.nbytes % ALIGN_BYTES
        self._move(self._calls.write, block[:whole], offset, whole)
        if whole < block.nbytes:
            page = memoryview(mmap.mmap(-1, ALIGN_BYTES))
            page[: block.nbytes - whole] = block[whole:]
            self._move(self._calls.write, page, offset + whole, ALIGN_BYTES)

    def finish(self) -> None:
        """Everything written is on the drive when this returns; the name is once its folder is synced. Closes in any case."""
        file = self._taken()
        if file is None:
            raise ValueError(f"{self.path}: is closed")
        try:
            if self._longer:
                self._calls.truncate(file, self.size_bytes)
            self._calls.sync(file)
            if not self.direct:
                self._calls.forget_pages(file)
        except BaseException:
            with contextlib.suppress(OSError):
                self._calls.close(file)
            raise
        self._calls.close(file)


class FileReader(_LargeFile):
    """A file read in blocks in any order, by several threads. `size_bytes` is what it has at its opening."""

    def read(self, block: memoryview, offset: int) -> None:
        """Fill a block, whole, from an offset in bytes.

        Raises ValueError for a block that breaks the rules above, and OSError, which names the file, also where it has
        become shorter.
        """
        self._check(block, offset)
        whole = block.nbytes - block.nbytes % ALIGN_BYTES
        self._move(self._calls.read, block[:whole], offset, whole)
        if whole < block.nbytes:
            page = memoryview(mmap.mmap(-1, ALIGN_BYTES))
            self._move(self._calls.read, page, offset + whole, block.nbytes - whole)
            block[whole:] = page[: block.nbytes - whole]

    def close(self) -> None:
        """Close; a second time does nothing. Never raises: nothing is lost by it."""
        if (file := self._taken()) is not None:
            if not self.direct:
                self._calls.forget_pages(file)
            with contextlib.suppress(OSError):
                self._calls.close(file)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Log:
    """A file that grows by whole lines, for one thread."""

    def __init__(self, calls: Calls, file: OpenFile, size_bytes: int) -> None:
        self.path = file.path
        self.size_bytes = size_bytes
        self._calls = calls
        self._file: OpenFile | None = file

    def append(self, lines: bytes) -> None:
        """Write whole lines, each with its end. Where that fails, none of them is in the file, as far as it can be undone.

        Raises OSError, which names the file.
        """
        if not lines.endswith(b"\n"):
            raise ValueError(f"{self.path}: what is appended must end with a line's end")
        file = self._open()
        try:
            write_all(self._calls, file, lines, self.size_bytes)
        except BaseException:
            with contextlib.suppress(OSError):
                self._calls.truncate(file, self.size_bytes)
            raise
        self.size_bytes += len(lines)

    def sync(self) -> None:
        """All lines are on the drive when this returns."""
        self._calls.sync(self._open())

    def close(self) -> None:
        """Close; a second time does nothing. Lines since the last `sync` are as safe as the system makes them."""
        file, self._file = self._file, None
        if file is not None:
            self._calls.close(file)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> OpenFile:
        if self._file is None:
            raise ValueError(f"{self.path}: is closed")
        return self._file


def write_all(calls: Calls, file: OpenFile, content: bytes, offset: int) -> None:
    """Write bytes at an offset by as many calls as it takes."""
    block, done = memoryview(content), 0
    while done < len(block):
        done += calls.write(file, block[done:], offset + done)
