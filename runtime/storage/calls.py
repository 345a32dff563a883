"""The system calls by which bytes and names reach a drive: one method for each, so that tests can fail any of them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DIRECT = getattr(os, "O_DIRECT", 0)
# What filesystems answer that have no such call, or not for such a file.
NOT_SUPPORTED = frozenset([errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])


class OpenFile(NamedTuple):
    """A file with the descriptor by which this process has it open."""

    path: Path
    descriptor: int


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Every OSError raised within names this file, also where the system call knew a descriptor only."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename == str(path):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from None


def _opened(path: Path, flags: int) -> OpenFile:
    with named(path):
        return OpenFile(path, os.open(path, flags | os.O_CLOEXEC, 0o666))


class Calls:
    """What the operating system does for a `Disk`; every OSError names its file.

    A method is one system call, or two that belong together. It may do less than it is asked where the system call may:
    `write` and `read` return how many bytes they moved.
    """

    def free_bytes(self, folder: Path) -> int:
        with named(folder):
            found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def make_folder(self, path: Path) -> None:
        with named(path):
            path.mkdir()

    def rename(self, source: Path, target: Path) -> None:
        with named(source):
            source.rename(target)

    def entries(self, folder: Path) -> list[Path]:
        """What lies in a folder, sorted."""
        with named(folder):
            return sorted(folder.iterdir())

    def remove_file(self, path: Path) -> None:
        with named(path):
            path.unlink()

    def remove_empty_folder(self, path: Path) -> None:
        with named(path):
            path.rmdir()

    def sync_folder(self, path: Path) -> None:
        with named(path):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            except OSError as error:
                # Some network filesystems have no such call for folders: names are as safe there as they get.
                if error.errno not in NOT_SUPPORTED:
                    raise
            finally:
                os.close(descriptor)

    def create(self, path: Path) -> OpenFile:
        """A new file, for writing. Raises FileExistsError where one is there."""
        return _opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def create_scratch(self, path: Path) -> OpenFile:
        """A new file, for reading and writing. Raises FileExistsError where one is there."""
        return _opened(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def open(self, path: Path) -> OpenFile:
        """A file that is there, for reading."""
        return _opened(path, os.O_RDONLY)

    def open_to_append(self, path: Path) -> OpenFile:
        """A file that is there, for writing."""
        return _opened(path, os.O_WRONLY)

    def open_or_create(self, path: Path) -> OpenFile:
        """A file for writing, empty if it was not there."""
        return _opened(path, os.O_WRONLY | os.O_CREAT)

    def size_bytes(self, file: OpenFile) -> int:
        with named(file.path):
            return os.fstat(file.descriptor).st_size

    def set_direct(self, file: OpenFile, direct: bool) -> bool:
        """Let reads and writes pass by the system's page cache, or not. False where the filesystem refuses.

        Asked of an open file: asked at its opening, some kernels create the file and then refuse.
        """
        if not DIRECT:
            return False
        flags = fcntl.fcntl(file.descriptor, fcntl.F_GETFL) & ~DIRECT
        try:
            fcntl.fcntl(file.descriptor, fcntl.F_SETFL, flags | DIRECT if direct else flags)
        except OSError:
            return False
        return True

    def allocate(self, file: OpenFile, size_bytes: int) -> None:
        """Take room for so many bytes, more than zero, and make the file as long; nothing where the filesystem cannot.

        Not posix_fallocate, which writes into every block of the file where the filesystem cannot.
        """
        try:
            call = ctypes.CDLL(None, use_errno=True).fallocate
        except AttributeError:  # not Linux
            return
        while call(ctypes.c_int(file.descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size_bytes)):
            code = ctypes.get_errno()
            if code in NOT_SUPPORTED:
                return
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), str(file.path))

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        """How many bytes at the beginning of a block, which is not empty, have been written: one at least."""
        with named(file.path):
            moved = os.pwrite(file.descriptor, block, offset)
        if moved == 0:  # asked again it would do the same for ever
            raise OSError(errno.EIO, "the system writes no byte and gives no reason", str(file.path))
        return moved

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        """How many bytes at the beginning of a block have been read; 0 at the end of the file."""
        with named(file.path):
            return os.preadv(file.descriptor, [block], offset)

    def truncate(self, file: OpenFile, size_bytes: int) -> None:
        with named(file.path):
            os.ftruncate(file.descriptor, size_bytes)

    def sync(self, file: OpenFile) -> None:
        with named(file.path):
            os.fsync(file.descriptor)

    def forget_pages(self, file: OpenFile) -> None:
        """Drop the system's copies of what is on the drive: a file as large as the host's memory would push out all else."""
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self, file: OpenFile) -> None:
        with named(file.path):
            os.close(file.descriptor)
