"""Lines of metrics.jsonl, which a full drive holds up and does not lose."""

from __future__ import annotations

from pathlib import Path

from runtime.storage.files import Log


class Metrics:
    """A log of one line a step. What the drive refuses waits in memory and is tried again with the next line."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._waiting = b""

    @property
    def path(self) -> Path:
        return self._log.path

    def append(self, line: bytes) -> OSError | None:
        """Write a line, and those that wait. The drive's error where they have to wait from now on; it is told once."""
        waited = bool(self._waiting)
        self._waiting += line
        try:
            self._write()
        except OSError as error:
            return None if waited else error
        return None

    def sync(self) -> None:
        """All lines are on the drive when this returns. Raises OSError, which names the file."""
        self._write()
        self._log.sync()

    def close(self) -> None:
        """Close; a second time does nothing. Lines that wait are lost: whoever wants them has synced before."""
        self._log.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self) -> None:
        if self._waiting:
            self._log.append(self._waiting)
            self._waiting = b""
