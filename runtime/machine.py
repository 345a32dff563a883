"""The machine that this process runs on, as plans name it, and what the process takes of its memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil
import torch

from runtime.lanes.backend import Backend
from slideplan.machine.host import cpu_name, usable_cores
from slideplan.machine.profile import MachineIdentity


def identity(backend: Backend) -> MachineIdentity:
    """The machine that this process runs on, as plans name it."""
    gpu = torch.cuda.get_device_name(backend.device) if backend.name == "cuda" else cpu_name()
    return MachineIdentity(gpu=gpu, backend=backend.name, cpu=cpu_name(), cores=usable_cores())


def resident_bytes() -> int:
    """Resident set of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Largest resident set since the process started or `reset_peak_resident` was called."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resident_bytes()


def reset_peak_resident() -> None:
    """Forget earlier peaks, where the system lets a process do so."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
