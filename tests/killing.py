"""Processes that are killed (SIGKILL) while they run a function: after a while, or at a change of what the drive holds.

Children are forked from a server that has imported torch and the runtime, so that each starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from runtime.storage.disk import Disk
from storage import CHANGES, SECTOR_BYTES, WatchedCalls, path_of

# What the server imports, once. Modules of functions that children run belong here too: a child imports others by itself.
PRELOADED = ["pytest", "torch", "runtime.run", "runtime.cli", "builders", "storage", "killing", "killed_things"]
PRELOADED += ["killed_runs", "preloaded"]
TIMEOUT_S = 120.0


class Change(NamedTuple):
    """What a disk was asked to change: the name of a method of `Calls`, and the file or folder."""

    operation: str
    path: Path


class Ended(NamedTuple):
    """How a child came to its end.

    killed: before the function returned
    result: what the function returned, which must be picklable; None if it was killed
    changes: what the function's disk was asked to change until it returned; 0 if it was killed
    start_s: from the wish for a child to the function's first line
    run_s: from there to the end
    at: the change at which it was killed; None if it was not killed at one
    """

    killed: bool
    result: Any
    changes: int
    start_s: float
    run_s: float
    at: Change | None


class KillingDisk(Disk):
    """A disk that kills its own process at its n-th change: before it, after it, or, if it is a write, in its midst.

    at_change: from 1; None counts only
    seed: of the moment, and of how much of a write is done
    last: told the change at which it kills
    changes: all that were asked for, in their order
    """

    def __init__(
        self, at_change: int | None = None, seed: int = 0, last: Callable[[Change], None] = lambda change: None
    ) -> None:
        self.changes: list[Change] = []
        super().__init__(_KillingCalls(at_change, seed, last, self.changes))


class _KillingCalls(WatchedCalls):
    def __init__(self, at_change: int | None, seed: int, last: Callable[[Change], None], changes: list[Change]) -> None:
        self._at_change = at_change
        self._draw = random.Random(seed)
        self._last = last
        self._changes = changes
        self._lock = threading.Lock()  # protects the list, to which several threads' changes are added

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if operation in CHANGES:
            with self._lock:
                self._changes.append(Change(operation, path_of(arguments[0])))
                is_last = len(self._changes) == self._at_change
            if is_last:
                self._last(self._changes[-1])
                self._end(operation, call, *arguments)
        return call(*arguments)

    def _end(self, operation: str, call: Callable[..., Any], *arguments: Any) -> None:
        moment = self._draw.choice(("before", "midst", "after"))
        if operation == "write" and moment == "midst":
            file, block, offset = arguments
            part = self._draw.randrange(1, len(block) + 1)
            # Direct I/O refuses parts of a sector.
            arguments = file, block[: part - part % SECTOR_BYTES or part], offset
        if moment == "after" or (operation == "write" and moment == "midst"):
            # What fails now is not done.
            with contextlib.suppress(OSError):
                call(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)


def in_child(
    function: Callable[..., Any],
    *arguments: Any,
    after_s: float | None = None,
    at_change: int | None = None,
    seed: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> Ended:
    """Run `function(disk, *arguments)` in a process of its own, to its end or until it is killed.

    function: at the top level of a module that can be imported (PRELOADED); gets a KillingDisk
    after_s: kill it so long after it has begun; None: never
    at_change: kill it at this change of the disk, from 1; None: never
    Raises AssertionError with the child's traceback where the function raises, where the child ends in any other way, and
    where it does not end in time.
    """
    asked = time.monotonic()
    ours, theirs = _server().Pipe()
    process = _server().Process(target=_child, args=(theirs, function, arguments, at_change, seed, timeout_s))
    process.start()
    theirs.close()
    with ours:
        try:
            if not ours.poll(timeout_s):
                raise AssertionError(f"{function.__name__}: its process has not begun in {timeout_s:.0f} s")
            _received(ours)
            begun = time.monotonic()
            if not ours.poll(timeout_s if after_s is None else after_s):
                if after_s is None:
                    raise AssertionError(f"{function.__name__}: has not ended in {timeout_s:.0f} s; its threads are on stderr")
                process.kill()
            end = _received(ours)
            at = end if isinstance(end, Change) else None
            if at is not None:
                end = _received(ours)
            ended = time.monotonic()
            process.join(timeout_s)
            if process.exitcode is None:
                raise AssertionError(f"{function.__name__}: has ended, its process has not in {timeout_s:.0f} s")
        finally:
            process.kill()
            process.join()
    if end is None and process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"{function.__name__}: its process ended by itself, with exit code {process.exitcode}")
    if end is not None and end.failure:
        raise AssertionError(f"{function.__name__}: raised in its process\n{end.failure}")
    result, changes = (None, 0) if end is None else (end.result, end.changes)
    return Ended(end is None, result, changes, begun - asked, ended - begun, at)


def _received(connection: Connection) -> Any:
    """What the child says next; None where it is dead."""
    try:
        return connection.recv()
    except EOFError:
        return None


class _End(NamedTuple):
    result: Any
    changes: int
    failure: str


def _child(
    parent: Connection,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    at_change: int | None,
    seed: int,
    timeout_s: float,
) -> None:
    # What the server has imported is not looked through for garbage: that would copy all of it, page by page.
    gc.freeze()
    # Semaphores that libraries make (numba does) have no name then, and none is left where the process is killed.
    multiprocessing.set_start_method("fork", force=True)
    faulthandler.dump_traceback_later(0.9 * timeout_s)
    disk = KillingDisk(at_change, seed, parent.send)
    parent.send(None)
    result, failure = None, ""
    try:
        result = function(disk, *arguments)
    except BaseException:
        failure = traceback.format_exc()
    parent.send(_End(result, len(disk.changes), failure))
    faulthandler.cancel_dump_traceback_later()


@functools.cache
def _server() -> Any:
    """The context of children, its server running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with _python_path():
        forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _python_path() -> Iterator[None]:
    """What can be imported here can be in the server, which takes no path from its parent before it imports."""
    before = os.environ.get("PYTHONPATH")
    here = [str(Path(__file__).parent), *filter(None, sys.path)]
    os.environ["PYTHONPATH"] = os.pathsep.join(here)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
