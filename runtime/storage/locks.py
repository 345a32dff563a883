"""Locks of the kernel on files and folders. They go when the process that holds them does, however it ends.

A folder that can only be read can be locked too. Locks on folders are those of one machine, also where a drive has several.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from runtime.storage.calls import named


class HeldError(Exception):
    """Somebody else holds a lock."""


@contextlib.contextmanager
def shared(path: Path) -> Iterator[None]:
    """Hold a file or folder together with others. Waits for whoever has it alone."""
    with _opened(path, os.O_RDONLY) as descriptor:
        with named(path):
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield


@contextlib.contextmanager
def exclusive(path: Path, flags: int = os.O_RDONLY) -> Iterator[None]:
    """Hold a file or folder alone, opened with these flags. Raises HeldError where somebody else has it."""
    with _opened(path, flags) as descriptor:
        try:
            with named(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HeldError(path) from None
        # Who held it before may have removed or renamed it since it was opened: another may have that name, and hold that.
        if not _is_at(descriptor, path):
            raise HeldError(path)
        yield


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    with named(path):
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
