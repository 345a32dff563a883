"""A plan with state on the SSD, its run, and folders on drives, for tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from builders import tiny_model
from runtime import rehearsal
from runtime.checkpoints.manifest import Saving
from saved_runs import Run, planned
from slideplan.graph.tasks import tier_bytes
from slideplan.placement import Tier
from slideplan.progress import Progress
from storage import small_drive

PAGE = 4096
PLAN = planned(tiny_model(vocabulary=256), ssd_state=(0, 2, 5), ssd_moments=(1,), kernels="fused")
EVERY = Saving(every=2)
NEED = tier_bytes(PLAN.graph.pools, Tier.SSD)
# Of the file of slots: checkpoints and their files are others.
SCRATCH = ".scratch-*"


def aligned(size: int) -> torch.Tensor:
    room = torch.zeros(size + PAGE, dtype=torch.uint8)
    return room[-room.data_ptr() % PAGE :][:size]


class Armed(list[Progress]):
    """What a run shows. `on` from the step on in whose midst the lanes are then, and no save."""

    def __init__(self, step: int = 3) -> None:
        self.on = threading.Event()
        self._step = step

    def append(self, shown: Progress) -> None:
        super().append(shown)
        if shown.phase == "training" and shown.done == self._step:
            self.on.set()


def named(folder: Path, *names: str) -> list[Path]:
    found = [folder / name for name in names]
    for each in found:
        each.mkdir()
    return found


def several(folder: Path, count: int) -> list[Path]:
    found = [folder / f"drive-{number}" for number in range(count)]
    for each in found:
        each.mkdir()
    return found


def whole_run(folder: Path) -> Run:
    """A run that nothing interrupts, with a second for no rehearsal."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
        run = Run(folder / "whole", PLAN, EVERY)
        run.train()
    return run


@contextlib.contextmanager
def small_drives(folder: Path) -> Iterator[Callable[[int], Path]]:
    """Makes real filesystems of so many bytes in a folder: an ext4 in a file, or a tmpfs, mounted by root."""
    with contextlib.ExitStack() as stack:

        def mounted(size_bytes: int) -> Path:
            found = folder / f"small-{size_bytes}"
            found.mkdir()
            stack.enter_context(small_drive(found, size_bytes))
            return found

        yield mounted
