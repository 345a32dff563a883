"""The host that this process runs on: its processor, and the cores and memory that the process may take."""

from __future__ import annotations

import os
from pathlib import Path

from slideplan.machine.limits import ROOT, read_limits


def cpu_name(root: Path = ROOT) -> str:
    """Model name of the processor. `root`: where proc/ and sys/ lie, here and below."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else "unknown CPU"


def usable_cores(root: Path = ROOT) -> int:
    """Cores that this process may run on: its affinity, and the CPU quotas of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, read_limits(root).cores or cores)


def total_host_bytes(root: Path = ROOT) -> int:
    """RAM of the machine, or what the control groups leave of it."""
    total = _meminfo(root).get("MemTotal") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, read_limits(root).memory_bytes or total)


def available_host_bytes(root: Path = ROOT) -> int:
    """RAM that can still be taken: what the system calls available, within the limits of the control groups."""
    found = _meminfo(root).get("MemAvailable")
    available = total_host_bytes(root) if found is None else found
    limited = read_limits(root).available_bytes
    return available if limited is None else min(available, limited)


def _meminfo(root: Path) -> dict[str, int]:
    """Bytes by name."""
    try:
        text = (root / "proc/meminfo").read_text()
    except OSError:
        return {}
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}
