"""The one class through which everything goes that is written for keeps.

What "on the drive" means here is what POSIX promises: a file's bytes after its fsync, names in a folder (new, gone, renamed)
after the fsync of the folder. Nothing else: tests cut the power between any two calls (tests/storage.py).
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from runtime.storage.calls import Calls, OpenFile
from runtime.storage.files import FileReader, FileWriter, Log, ScratchFile, too_short, write_all


class Disk:
    """Files and folders. Every OSError names the file (errno, strerror, filename); no failure leaves a descriptor open.

    calls: what asks the operating system; tests have their own
    """

    def __init__(self, calls: Calls | None = None) -> None:
        self._calls = calls or Calls()

    def through(self, wrapped: Callable[[Calls], Calls]) -> Disk:
        """The same disk, whose calls pass by something else first."""
        return Disk(wrapped(self._calls))

    def free_bytes(self, folder: Path) -> int:
        """What this user may still write below a folder that is there, in bytes."""
        return self._calls.free_bytes(folder)

    def make_folder(self, path: Path) -> None:
        """A new folder in one that is there. Raises FileExistsError where there is one. Safe once its parent is synced."""
        self._calls.make_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file or folder another name, at once or not at all. Safe once the parents of both are synced.

        Raises FileExistsError where something has that name. The look comes before the call: only one process may rename
        in a folder, which the lock of a run's folder sees to.
        """
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        self._calls.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        """Every name in this folder is on the drive when this returns; names in folders within it are not."""
        self._calls.sync_folder(path)

    def remove_file(self, path: Path) -> None:
        """Raises FileNotFoundError where there is none."""
        self._calls.remove_file(path)

    def remove_folder(self, path: Path) -> None:
        """Remove a folder with everything in it; links are removed, not followed. What fails leaves the rest there."""
        self.empty_folder(path)
        self._calls.remove_empty_folder(path)

    def empty_folder(self, path: Path) -> None:
        """Remove everything in a folder, as `remove_folder` does."""
        for entry in self._calls.entries(path):
            if entry.is_dir() and not entry.is_symlink():
                self.remove_folder(entry)
            else:
                self._calls.remove_file(entry)

    def write(self, path: Path, content: bytes) -> None:
        """A small new file, whole and on the drive when this returns; its name is once the folder is synced.

        Raises FileExistsError where one is there. Where writing fails, a part of it may stay.
        """
        file = self._calls.create(path)
        try:
            write_all(self._calls, file, content, 0)
            self._calls.sync(file)
        except BaseException:
            self._close_after_error(file)
            raise
        self._calls.close(file)

    def replace(self, path: Path, content: bytes) -> None:
        """A small file, new or instead of another: either is there whole at any time, the new one for good on return."""
        temporary = path.with_name(f".{path.name}.new")
        if os.path.lexists(temporary):  # of a process that was killed
            self._calls.remove_file(temporary)
        self.write(temporary, content)
        self._calls.rename(temporary, path)
        self._calls.sync_folder(path.parent)

    def read(self, path: Path) -> bytes:
        """A small file, whole."""
        file = self._calls.open(path)
        try:
            content, done = bytearray(self._calls.size_bytes(file)), 0
            # Short reads are continued; a file that has become shorter ends where it ends.
            while done < len(content) and (moved := self._calls.read(file, memoryview(content)[done:], done)):
                done += moved
            return bytes(content[:done])
        finally:
            self._close_after_error(file)

    def open_log(self, path: Path, size_bytes: int) -> Log:
        """A file to append lines to, cut to `size_bytes` first; made where there is none and `size_bytes` is 0.

        Raises OSError where the file is shorter than that.
        """
        file = self._calls.open_or_create(path) if size_bytes == 0 else self._calls.open_to_append(path)
        try:
            found_bytes = self._calls.size_bytes(file)
            if found_bytes < size_bytes:
                raise too_short(path, found_bytes, size_bytes)
            if found_bytes > size_bytes:
                self._calls.truncate(file, size_bytes)
            return Log(self._calls, file, size_bytes)
        except BaseException:
            self._close_after_error(file)
            raise

    def create(self, path: Path, size_bytes: int) -> FileWriter:
        """A new large file, with room for all of it where the filesystem can promise that.

        Raises FileExistsError where one is there, OSError (ENOSPC) where there is no room: an empty file stays then.
        """
        file = self._calls.create(path)
        try:
            return FileWriter(self._calls, file, size_bytes)
        except BaseException:
            self._close_after_error(file)
            raise

    def scratch(self, folder: Path, size_bytes: int) -> ScratchFile:
        """A file without a name on the drive of a folder, with room for all of it where the filesystem can promise that.

        Raises OSError (ENOSPC) where there is no room.
        """
        path = folder / f".scratch-{uuid.uuid4().hex}"
        file = self._calls.create_scratch(path)
        try:
            self._calls.remove_file(path)  # at once: nothing has to be cleaned up after a process that is killed
            return ScratchFile(self._calls, file, size_bytes)
        except BaseException:
            self._close_after_error(file)
            raise

    def open(self, path: Path) -> FileReader:
        """A large file that is there, to be read in blocks."""
        file = self._calls.open(path)
        try:
            return FileReader(self._calls, file, self._calls.size_bytes(file))
        except BaseException:
            self._close_after_error(file)
            raise

    def _close_after_error(self, file: OpenFile) -> None:
        with contextlib.suppress(OSError):
            self._calls.close(file)
