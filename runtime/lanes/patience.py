"""How long a run waits for a drive that does not answer."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from runtime.lanes import watchdog
from runtime.lanes.clock import Hung
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from slideplan.quantities import format_ns

# A network drive may be away for minutes and come back. Then the save goes on, and the run with it.
PATIENCE_NS = 600 * 1_000_000_000


class Patience:
    """Knows what a drive is asked for, and for how long it has answered nothing. Some threads wait, others ask.

    what:   named where the drive is asked for nothing
    beside: another drive, whose answers count too: what is waited for passes from one to the other
    """

    def __init__(self, what: str, beside: Patience | None = None) -> None:
        self._what = what
        self._beside = beside
        self._asked: Counter[Path] = Counter()
        self._answers = 0
        self._lock = threading.Lock()
        self._looks = watchdog.Looks()
        self._seen = 0
        self._still_ns = 0

    def watched(self, disk: Disk) -> Disk:
        """The same disk; what it is asked for is known here."""
        return disk.through(lambda calls: cast(Calls, _Watched(calls, self.asked)))

    @contextlib.contextmanager
    def asked(self, path: Path) -> Iterator[None]:
        """Within, the drive is asked for something of this file or folder."""
        with self._lock:  # protects what is asked for, by several threads
            self._asked[path] += 1
        try:
            yield
        finally:
            with self._lock:
                self._asked[path] -= 1
                if not self._asked[path]:
                    del self._asked[path]
                self._answers += 1

    @property
    def answers(self) -> int:
        """How many there have been: each piece of a slot is one."""
        return self._answers + (0 if self._beside is None else self._beside.answers)

    @property
    def unanswered(self) -> list[str]:
        """Files and folders for which the drive is asked now."""
        with self._lock:
            own = sorted(map(str, self._asked))
        return own + ([] if self._beside is None else self._beside.unanswered)

    def wait(self, over: Callable[[float], bool]) -> None:
        """Wait until something is over, which `over` waits for, so many seconds at most. A signal is heeded between.

        Raises Hung where the drive answers nothing for PATIENCE_NS; asked again it does so soon.
        """
        while not over(watchdog.LOOK_NS / 1e9):
            self._look()

    def _look(self) -> None:
        answers, asked = self.answers, ", ".join(self.unanswered) or self._what
        with self._lock:  # protects what was seen, by several threads that wait
            since_ns = self._looks.since_ns()
            self._still_ns = self._still_ns + since_ns if answers == self._seen else 0
            self._seen = answers
            if self._still_ns > PATIENCE_NS:
                raise Hung(f"the drive has not answered for {format_ns(self._still_ns)}, asked for {asked}")


class _Watched:
    """Calls of a disk, each of which is asked for within `asked`."""

    def __init__(self, calls: Calls, asked: Callable[[Path], contextlib.AbstractContextManager[None]]) -> None:
        self._calls = calls
        self._asked = asked

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._calls, name)

        def watched(first: Path | OpenFile, *others: Any) -> Any:
            with self._asked(first if isinstance(first, Path) else first.path):
                return call(first, *others)

        return watched
