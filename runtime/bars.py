"""Progress of a run on a terminal."""

from __future__ import annotations

import threading

from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from runtime.stderr import stderr_console
from slideplan.progress import Progress


class ProgressBars:
    """Bars on stderr: one per phase, and for training loss, tokens/s and time left."""

    def __init__(self, tokens_per_step: int) -> None:
        self._tokens = tokens_per_step
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=stderr_console(),
        )
        self._ids: dict[str, TaskID] = {}
        self._started = False
        self._lock = threading.RLock()  # a signal's handler may show something while something is shown

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._started:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar of the phase; one that begins again starts anew."""
        with self._lock:  # protects the bars by phase: saves tell of themselves from threads of their own
            self._show(progress)

    def _show(self, progress: Progress) -> None:
        self._started = True
        self._bars.start()  # not before there is something to show: refused input gets its one line alone
        if progress.note:
            self._bars.console.print(progress.note, soft_wrap=True, highlight=False, markup=False)
            if not progress.total:
                return
        if progress.phase not in self._ids:
            self._ids[progress.phase] = self._bars.add_task(progress.phase, total=progress.total, detail="")
        bar = self._ids[progress.phase]
        if progress.done == 0:
            self._bars.reset(bar, total=progress.total)
        detail = f"{100 * progress.done // max(1, progress.total)}%"
        if progress.loss is not None:
            speed = self._bars.tasks[bar].speed
            rate = f"  {speed * self._tokens:,.0f} tokens/s" if speed else ""
            norm = "" if progress.norm is None else f"  norm {progress.norm:.3g}"
            detail = f"{progress.done}/{progress.total}  loss {progress.loss:.3f}{norm}{rate}"
        self._bars.update(bar, completed=progress.done, detail=detail)
