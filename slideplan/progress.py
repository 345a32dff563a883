"""How long work tells how far it is: the search, the profiler and a run, in one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A phase with its share done. What a command shows is its own choice.

    total: of the phase, in the unit of `done`; 0 where nobody knows it
    loss, norm: of a training step
    note: something that the user should know, to be shown once and to stay
    """

    phase: str
    done: int = 0
    total: int = 0
    loss: float | None = None
    norm: float | None = None
    note: str = ""


Show = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Shows nothing."""
