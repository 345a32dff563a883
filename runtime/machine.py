"""The machine that this process runs on: identity, capacities, and what the process takes of them."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import psutil
import torch

from runtime.lanes.backend import Backend
from slideplan.machine.profile import MachineIdentity

CGROUP = Path("/sys/fs/cgroup")


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def usable_cores() -> int:
    """Cores that this process may run on: its affinity, and the quota of its container."""
    cores = len(psutil.Process().cpu_affinity() or [0])
    quota = _cgroup("cpu.max").split()
    if len(quota) == 2 and quota[0] != "max":
        cores = min(cores, max(1, math.ceil(int(quota[0]) / int(quota[1]))))
    return cores


def total_host_bytes() -> int:
    """RAM of the machine, or of the container where that is less."""
    limit = _cgroup("memory.max")
    total = int(psutil.virtual_memory().total)
    return min(total, int(limit)) if limit.isdigit() else total


def available_host_bytes() -> int:
    """RAM that can still be taken: what the system calls available, within the container's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return min(available, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else available


def _cgroup(name: str) -> str:
    """A value of this process's control group (version 2), or "" where there is none."""
    try:
        return (CGROUP / name).read_text().strip()
    except OSError:
        return ""


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
