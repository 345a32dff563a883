"""What the tests of tests/killing.py run in processes of their own."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import torch

from runtime.checkpoints.export import export
from runtime.checkpoints.resuming import candidates
from runtime.optimizer.adamw import HostUpdate
from runtime.storage.disk import Disk
from slideplan.progress import silent


def identity(disk: Disk, *values: object) -> tuple[object, ...]:
    return os.getpid(), *values


def three_files(disk: Disk, folder: Path) -> str:
    """Eleven changes: of a folder, of three files, and the sync of their names."""
    disk.make_folder(folder)
    for number in range(3):
        disk.write(folder / str(number), b"x" * 100)
    disk.sync_folder(folder)
    return "done"


def large_file(disk: Disk, path: Path) -> None:
    """Three changes before the file is finished: created, room for it, its only block."""
    memory = memoryview(mmap.mmap(-1, 1 << 20))
    memory[:] = b"x" * len(memory)
    writer = disk.create(path, len(memory))
    writer.write(memory, 0)
    writer.finish()


def for_ever(disk: Disk) -> None:
    while True:
        time.sleep(1)


def raises(disk: Disk) -> None:
    raise KeyboardInterrupt("of its own")


def ends_itself(disk: Disk) -> None:
    os._exit(3)


def computes(disk: Disk) -> float:
    """On threads of numba and of torch."""
    HostUpdate(2).compile()
    torch.set_num_threads(2)
    return float(torch.ones(512, 512).matmul(torch.ones(512, 512)).sum())


def exports(disk: Disk, run: Path, out: Path) -> None:
    export(candidates(run, silent), out, "bf16", disk, silent)
