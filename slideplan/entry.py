"""How a command starts and ends: loading, signals, and what is said where something that it needs is not installed.

Loading takes seconds, in which a command must answer a signal too. This module imports nothing that is slow to import.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import NoReturn, TextIO

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: of a batch system, say, or of a container that is stopped. It ends a command as Ctrl-C does."""


def enter(program: str, module: str, distribution: str) -> None:
    """Load a command's module and run its `main`.

    SIGINT and SIGTERM end it with a word on stderr, exit codes 130 and 143, and no traceback. An import that fails is one
    line that says to install `distribution`, and exit code 2.
    """
    signals = _heeded()
    _handle(signals, lambda number, _: _leave(program, number))
    try:
        main: Callable[[], None] = import_module(module).main
    except (ImportError, OSError) as error:  # OSError: of a shared library
        missing = f"{error.name} is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded: {error}"
        print(f"{program}: {missing}; `pip install '{distribution}'` installs what it needs", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    _spare_forks()
    _handle(signals, _raise)
    try:
        try:
            main()
        finally:
            _flush(program)
    except KeyboardInterrupt as stop:
        end_interrupted(program, stop)
    finally:  # nothing is left to be told while the interpreter ends
        _handle(signals, signal.SIG_DFL)


def end_interrupted(program: str, stop: KeyboardInterrupt, end: Callable[[int], NoReturn] = sys.exit) -> NoReturn:
    """Say that a command was interrupted, and what the exception's notes add, and end with its exit code."""
    word, code = ("terminated", EXIT_TERMINATED) if isinstance(stop, Terminated) else ("interrupted", EXIT_INTERRUPTED)
    print(f"{program}: {'; '.join([word, *getattr(stop, '__notes__', [])])}", file=sys.stderr)
    end(code)


def in_words(error: OSError) -> str:
    """What a system's error says, headed by the file that it is about. Of those that we write, stdout alone has no name."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return f"{error.filename or ('stdout' if full else 'system')}: {error.strerror or error}"


@contextmanager
def first_stop(notice: Callable[[KeyboardInterrupt], None]) -> Iterator[None]:
    """Within, the first SIGINT or SIGTERM raises nothing: `notice` gets what it would have raised, for the caller to raise it
    when all is in order. The second one is heeded at once, as without this.

    `notice` is called between any two instructions of the main thread: it should keep what it gets, and not print, nor wait
    for a lock. Signals that the process ignores stay ignored. In another thread than the main one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _heeded()}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def first(number: int, _: FrameType | None) -> None:
        restore()
        notice(_stop(number))

    try:
        _handle(list(before), first)
        yield
    finally:
        restore()


def leave(code: int) -> NoReturn:
    """End the process at once, after all was said, though some thread never ends: nothing waits for it, or frees its memory."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # what cannot be written keeps nobody here
            stream.flush()
    os._exit(code)


def give_up(stream: TextIO) -> None:
    """Let what a stream holds and cannot write go nowhere. The interpreter would try again at its end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _heeded() -> list[signal.Signals]:
    """Signals that nobody told this process to ignore, as shells do for what they leave in the background."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return [number for number, handler in usual.items() if signal.getsignal(number) in (handler, _raise)]


def _handle(signals: list[signal.Signals], handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in signals:
        signal.signal(number, handler)


def _spare_forks() -> None:
    """Let SIGTERM end what is forked from here, a pool's processes say, in silence as it would without us.

    It is held back meanwhile: a signal that reaches a process between its fork and its first instruction is lost otherwise.
    """

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM]),
        after_in_child=in_child,
    )


def _stop(number: int) -> KeyboardInterrupt:
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


def _raise(number: int, _: FrameType | None) -> None:
    raise _stop(number)


def _leave(program: str, number: int) -> None:
    """End at once. An exception would be raised in the middle of some import, and not every import lets it through."""
    end_interrupted(program, _stop(number), leave)


def _flush(program: str) -> None:
    """Write what stdout still holds while somebody can be told that it cannot be written. Of stderr nobody can."""
    try:
        if sys.stderr is not None:
            sys.stderr.flush()
    except OSError:
        give_up(sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        give_up(sys.stdout)
        if not isinstance(error, BrokenPipeError):  # whose reader has seen enough
            print(f"{program}: stdout: {error.strerror}", file=sys.stderr)
            sys.exit(EXIT_FAILED)
