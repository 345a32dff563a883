"""What the commands share where they read their arguments."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Any

from typer.core import TyperGroup


class Interrupted(Exception):  # noqa: N818 - no error, and typer must not see a KeyboardInterrupt
    """A KeyboardInterrupt on its way out of a command. Typer would turn it into an exit code that tells nothing more."""

    def __init__(self, stop: KeyboardInterrupt) -> None:
        super().__init__()
        self.stop = stop


class CommandGroup(TyperGroup):
    """A group of commands whose interrupts reach the caller, as `Interrupted`."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(stop) from stop


class Device(StrEnum):
    """Choices of --device."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


def path(text: str) -> Path:
    """The path that an option names, `~` expanded: a shell leaves it as it is in `--data=~/texts`.

    Where there is no such home it stays in the path, which will then not be found.
    """
    return Path(os.path.expanduser(text))  # noqa: PTH111 - pathlib's takes ./~ for a home, and raises where there is none


def check_folders(folders: Sequence[Path], remedy: str) -> None:
    """Raise ValueError for what --ssd names that is no folder, or that it names twice."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--ssd {folder}: is not a folder; {remedy}")
    for one, other in combinations(folders, 2):
        if one.samefile(other):
            raise ValueError(f"--ssd {one}, --ssd {other}: are the same folder; name each drive once")


def on_one_device(folders: Sequence[Path]) -> list[str]:
    """A warning for each two folders that gain nothing from each other."""
    return [
        f"warning: --ssd {one} and --ssd {other} are on one device: both together are no faster than one of them"
        for one, other in combinations(folders, 2)
        if one.stat().st_dev == other.stat().st_dev
    ]
