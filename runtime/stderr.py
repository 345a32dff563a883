"""stderr for as long as somebody reads it."""

from __future__ import annotations

import contextlib
import sys
from typing import Any, TextIO

from rich.console import Console


class _Heedless:
    """A stream that drops what cannot be written: a run goes on though nobody can be told how far it is."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def stderr_console(width: int | None = None) -> Console:
    """A console on stderr. What it cannot write is dropped."""
    stream: Any = None if sys.stderr is None else _Heedless(sys.stderr)
    return Console(stderr=True, file=stream, width=width)
