"""Disks that fail: calls that return errors or do half of what they are asked, and power that goes off at any call."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk

# Operations, by the names of their methods: those that change what the drive holds, and all that can fail.
CHANGES = ("make_folder", "rename", "remove_file", "remove_empty_folder", "sync_folder", "create", "open_or_create")
CHANGES += ("allocate", "write", "truncate", "sync")
OPERATIONS = (*CHANGES, "create_scratch", "open", "open_to_append", "read", "entries", "size_bytes", "free_bytes", "close")
SECTOR_BYTES = 512


class WatchedCalls(Calls):
    """Calls that all pass by `around`, which does them or something else."""

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """`call(*arguments)` does what was asked; the first argument is a Path or an OpenFile."""
        raise NotImplementedError


def _watched(operation: str) -> Callable[..., Any]:
    original = getattr(Calls, operation)

    def method(self: WatchedCalls, *arguments: Any) -> Any:
        return self.around(operation, functools.partial(original, self), *arguments)

    return method


for _operation in OPERATIONS:
    setattr(WatchedCalls, _operation, _watched(_operation))


def path_of(argument: Path | OpenFile) -> Path:
    return argument if isinstance(argument, Path) else argument.path


class Fault(NamedTuple):
    """What fails, and how.

    operation: the name of a method of `Calls`
    number: which of the operations of this name, from 1
    code: errno
    forever: all later ones of this name fail too
    path: a pattern of `Path.match` (`*.safetensors`, `step-00000002/*`); other files neither fail nor count
    """

    operation: str
    code: int
    number: int = 1
    forever: bool = False
    path: str = "*"


class FaultyDisk(Disk):
    """A disk with faults.

    most_bytes: a write or read moves so many at most
    free_bytes: said to be free, if not what is
    direct: False refuses direct I/O
    counts: how often each operation was asked for
    """

    def __init__(
        self, *faults: Fault, most_bytes: int | None = None, free_bytes: int | None = None, direct: bool = True
    ) -> None:
        calls = _FaultyCalls(faults, most_bytes, free_bytes, direct)
        self.counts = calls.counts
        super().__init__(calls)


class _FaultyCalls(WatchedCalls):
    def __init__(self, faults: tuple[Fault, ...], most_bytes: int | None, free_bytes: int | None, direct: bool) -> None:
        unknown = [fault.operation for fault in faults if fault.operation not in OPERATIONS]
        if unknown:
            raise ValueError(f"no such operation: {unknown[0]}")
        self.counts = dict.fromkeys(OPERATIONS, 0)
        self._faults = faults
        self._met = [0] * len(faults)
        self._most_bytes = most_bytes
        self._free_bytes = free_bytes
        self._direct = direct
        self._lock = threading.Lock()  # protects the counters, which several threads' operations advance

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        path = path_of(arguments[0])
        code = self._code(operation, path)
        if code is not None:
            if operation == "close":
                call(*arguments)  # a descriptor whose close fails is closed
            raise OSError(code, os.strerror(code), str(path))
        if operation == "free_bytes" and self._free_bytes is not None:
            return self._free_bytes
        if operation in ("write", "read"):
            file, block, offset = arguments
            return call(file, block[: self._most_bytes], offset)
        return call(*arguments)

    def _code(self, operation: str, path: Path) -> int | None:
        failed = None
        with self._lock:
            self.counts[operation] += 1
            for index, fault in enumerate(self._faults):
                if fault.operation == operation and path.match(fault.path):
                    self._met[index] += 1
                    if self._met[index] == fault.number or (fault.forever and self._met[index] > fault.number):
                        failed = fault.code
        return failed

    def set_direct(self, file: OpenFile, direct: bool) -> bool:
        return (self._direct or not direct) and super().set_direct(file, direct)


class DelayedCalls(Calls):
    """Drives that take so many seconds for each read and write, by the names of their folders, once an event is set."""

    def __init__(self, on: threading.Event | None = None, /, **seconds: float) -> None:
        self._seconds, self._on = seconds, on

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._delay(file)
        return super().read(file, block, offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._delay(file)
        return super().write(file, block, offset)

    def _delay(self, file: OpenFile) -> None:
        if self._on is None or self._on.is_set():
            time.sleep(self._seconds.get(file.path.parent.name, 0))


class PowerLoss(BaseException):
    """The machine is off: no code of the program runs any more, whatever it catches."""


@dataclass(eq=False)
class _File:
    """Bytes as the program sees them, as they were at the last sync, and what has been done since."""

    now: bytearray = field(default_factory=bytearray)
    safe: bytes = b""
    since: list[tuple[str, int, bytes]] = field(default_factory=list)  # ("write", offset, bytes) or ("resize", size, b"")


@dataclass(eq=False)
class _Folder:
    """Names as the program sees them, as they were at the last sync, and changes since, each atomic.

    A change lists names with what they name from then on; None: nothing.
    """

    now: dict[str, _File | _Folder] = field(default_factory=dict)
    safe: dict[str, _File | _Folder] = field(default_factory=dict)
    since: list[list[tuple[str, _File | _Folder | None]]] = field(default_factory=list)

    def change(self, *names: tuple[str, _File | _Folder | None]) -> None:
        self.since.append(list(names))
        _apply(self.now, names)


def _apply(entries: dict[str, _File | _Folder], names: Any) -> None:
    for name, what in names:
        if what is None:
            entries.pop(name, None)
        else:
            entries[name] = what


class CrashingDisk(Disk):
    """A disk on a real folder whose power goes off at its n-th change, in the manner of SQLite's tests.

    The model is stricter than any filesystem is:

    - A file's bytes are safe from the return of its `sync`. Names in a folder are safe from the return of its `sync_folder`:
      names that are new, gone or others, in this folder alone. A file's sync says nothing about its name, a folder's nothing
      about its own name, nor about folders within it.
    - What was there when the disk was made is safe.
    - Of what is not safe everything may be there or not, each change for itself and whatever came before or after it. Of a
      write each sector of 512 bytes (of the file's offsets) may be old, new or garbage, but nothing beside the bytes written
      is touched. A change of length may be there without the bytes, and bytes without it: they make the file longer.
    - A rename within one folder is atomic. One from folder to folder is two changes, each safe with its folder's sync, so
      that what was renamed may have both names or none.
    - The change at which the power goes off is one of those that may or may not have happened. If it is a sync, it has
      promised nothing.

    From then on every operation of every thread raises PowerLoss. Operations come one at a time.

    stop_at: the number of the change, from 1, or None
    changes: how many were asked for, this one included
    """

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self._crashing = _CrashingCalls(folder, stop_at)
        super().__init__(self._crashing)

    @property
    def changes(self) -> int:
        return self._crashing.changes

    @property
    def stopped(self) -> bool:
        return self._crashing.stopped

    def after_power_loss(self, seed: int, target: Path) -> None:
        """Make `target`, a new folder, what the drive may hold after a power loss now, or where the power went off.

        seed: 0 leaves only what is safe, 1 everything; others draw how much is lost, and what
        """
        draw = random.Random(seed)
        loss = {0: 1.0, 1: 0.0}.get(seed)
        _build(self._crashing.root, target, draw, draw.choice((0.1, 0.5, 0.9)) if loss is None else loss)


class _CrashingCalls(WatchedCalls):
    def __init__(self, folder: Path, stop_at: int | None) -> None:
        self.root = _snapshot(folder)
        self.changes = 0
        self.stopped = False
        self._top = folder.absolute()
        self._stop_at = stop_at
        self._open: dict[int, _File] = {}
        self._lock = threading.RLock()  # one operation at a time, so that all have one order

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        with self._lock:
            if operation == "close":  # the test's own process lives on, and keeps no descriptors
                return call(*arguments)
            if self.stopped:
                raise PowerLoss
            if operation in CHANGES:
                self.changes += 1
                if self.changes == self._stop_at:
                    self.stopped = True
                    self._record(operation, arguments, None)
                    raise PowerLoss
            result = call(*arguments)
            self._record(operation, arguments, result)
            return result

    def _record(self, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        """Take an operation into the model; of one without a result it is not known whether it was done."""
        path = path_of(arguments[0])
        if operation == "make_folder":
            self._parent(path).change((path.name, _Folder()))
        elif operation in ("remove_file", "remove_empty_folder"):
            self._parent(path).change((path.name, None))
        elif operation == "rename":
            self._rename(path, arguments[1])
        elif operation == "sync_folder" and not self.stopped:
            folder = self._find(path)
            assert isinstance(folder, _Folder)
            folder.safe, folder.since = dict(folder.now), []
        elif operation in ("create", "open_or_create", "open_to_append"):
            parent = self._parent(path)
            if path.name not in parent.now:
                parent.change((path.name, _File()))
            if result is not None:
                file = parent.now[path.name]
                assert isinstance(file, _File)
                self._open[result.descriptor] = file
        elif operation in ("allocate", "write", "truncate", "sync"):
            self._change(self._open[arguments[0].descriptor], operation, arguments, result)

    def _rename(self, source: Path, target: Path) -> None:
        old, new = self._parent(source), self._parent(target)
        what = old.now[source.name]
        if old is new:
            old.change((source.name, None), (target.name, what))
        else:
            old.change((source.name, None))
            new.change((target.name, what))

    def _change(self, file: _File, operation: str, arguments: tuple[Any, ...], result: Any) -> None:
        if operation == "sync":
            if not self.stopped:
                file.safe, file.since = bytes(file.now), []
            return
        if operation == "write":
            _, block, offset = arguments
            change = "write", offset, bytes(block[:result])
        else:
            size = arguments[1] if operation == "truncate" else max(arguments[1], len(file.now))
            change = "resize", size, b""
        file.since.append(change)
        _do(file.now, change)

    def _parent(self, path: Path) -> _Folder:
        folder = self._find(path.parent)
        assert isinstance(folder, _Folder)
        return folder

    def _find(self, path: Path) -> _File | _Folder:
        found: _File | _Folder = self.root
        for name in path.absolute().relative_to(self._top).parts:
            assert isinstance(found, _Folder)
            found = found.now[name]
        return found


def _snapshot(path: Path) -> Any:
    """What is there, as safe."""
    if path.is_dir():
        entries = {entry.name: _snapshot(entry) for entry in path.iterdir()}
        return _Folder(now=entries, safe=dict(entries))
    content = path.read_bytes()
    return _File(now=bytearray(content), safe=content)


def _do(content: bytearray, change: tuple[str, int, bytes]) -> None:
    kind, place, written = change
    size = place if kind == "resize" else max(len(content), place + len(written))
    del content[size:]
    content.extend(bytes(size - len(content)))
    content[place : place + len(written)] = written


def _build(what: _File | _Folder, target: Path, draw: random.Random, loss: float) -> None:
    """What may be left of a file or folder. loss: the share of what is not safe that is lost."""
    if isinstance(what, _File):
        content = bytearray(what.safe)
        for change in what.since:
            for part in _left(change, draw, loss):
                _do(content, part)
        target.write_bytes(content)
        return
    entries = dict(what.safe)
    for names in what.since:
        if draw.random() >= loss:
            _apply(entries, names)
    target.mkdir()
    for name, entry in entries.items():
        _build(entry, target / name, draw, loss)


def _left(change: tuple[str, int, bytes], draw: random.Random, loss: float) -> Iterator[tuple[str, int, bytes]]:
    """What is left of one change of a file: it, nothing, or some of its sectors."""
    kind, place, written = change
    torn = kind == "write" and 0 < loss < 1 and draw.random() < 0.5
    if not torn:
        if draw.random() >= loss:
            yield change
        return
    start = place
    while start < place + len(written):
        end = min((start // SECTOR_BYTES + 1) * SECTOR_BYTES, place + len(written))
        if draw.random() >= loss:
            yield kind, start, written[start - place : end - place]
        elif draw.random() < 0.2:
            yield kind, start, draw.randbytes(end - start)
        start = end


def power_losses(scratch: Path, before: Path | None, act: Callable[[CrashingDisk, Path], object]) -> Iterator[CrashingDisk]:
    """Do the same thing again and again, with the power going off at change 1, 2, 3, ... until it comes to its end.

    Yields the disk of every time; the last one is not stopped.

    scratch: a folder for those in which it is done
    before: a folder whose copy is there when it begins; None: an empty one
    act: does it with a disk in a folder; raises PowerLoss where the disk does
    """
    for stop_at in count(1):
        folder = scratch / f"stopped-{stop_at}"
        _build(_Folder() if before is None else _snapshot(before), folder, random.Random(), 0.0)
        disk = CrashingDisk(folder, stop_at)
        try:
            act(disk, folder)
        except PowerLoss:
            assert disk.stopped
        yield disk
        if not disk.stopped:
            return


def open_descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


@contextlib.contextmanager
def small_drive(folder: Path, size_bytes: int) -> Iterator[str]:
    """A filesystem of this size on an empty folder, whose type is returned: ext4 in a file, or else tmpfs.

    Skips the test where neither can be mounted: that takes root, and devices for files.
    """
    image = folder.with_name(f"{folder.name}.image")
    with image.open("wb") as file:
        file.truncate(size_bytes)
    attempts = {
        "ext4": (["mkfs.ext4", "-q", "-m", "0", str(image)], ["mount", "-o", "loop", str(image), str(folder)]),
        "tmpfs": (["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)],),
    }
    mounted = next((kind for kind, commands in attempts.items() if all(map(_succeeds, commands))), None)
    if mounted is None:
        pytest.skip("no filesystem can be mounted here")
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(folder)], check=True)
        image.unlink()


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False
