"""What control groups leave to this process: memory and cores, by both versions of the kernel's interface.

A container, a batch system and a service manager all limit a process by its control group, and any group above may limit it
further. The groups are those that the kernel names in /proc/self/cgroup, from the process's own up to the root.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
CONVENTIONAL = "sys/fs/cgroup"
# Version 1 writes "no limit" as the largest number of whole pages.
UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Limits:
    """What all groups together allow. None where nothing is limited, or nobody says.

    memory_bytes:    the least limit
    available_bytes: that can still be taken before the tightest group is full; its page cache counts as available
    cores:           of the least CPU quota, rounded up to a whole one
    """

    memory_bytes: int | None
    available_bytes: int | None
    cores: int | None


def read_limits(root: Path = ROOT) -> Limits:
    """Limits of the control groups of this process. `root`: where proc/ and sys/ lie; another one in tests."""
    rooms = [room for group in _groups(root, "memory") if (room := _memory(group)) is not None]
    quotas = [cores for group in _groups(root, "cpu") if (cores := _cores(group)) is not None]
    available = [max(0, limit - used) for limit, used in rooms if used is not None]
    return Limits(
        memory_bytes=min((limit for limit, _ in rooms), default=None),
        available_bytes=min(available, default=None),
        cores=min(quotas, default=None),
    )


def _groups(root: Path, controller: str) -> list[Path]:
    """Folders of the process's groups that may have this controller, from its own group up to each mount's root."""
    found: dict[Path, None] = {}
    for version, path in _memberships(root, controller):
        for mount, top in _mounts(root, controller, version):
            # A mount may show a part of the tree only; the path counts from the tree's root, or from the namespace's.
            below = path.removeprefix(top) if top != "/" and f"{path}/".startswith(f"{top}/") else path
            parts = [part for part in below.split("/") if part not in ("", ".", "..")]
            for depth in range(len(parts), -1, -1):
                found.setdefault(mount.joinpath(*parts[:depth]))
    return [folder for folder in found if folder.is_dir()]


def _memberships(root: Path, controller: str) -> Iterator[tuple[int, str]]:
    """(version, path) of the process's groups in trees that may have this controller."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            yield 2, path
        elif controller in controllers.split(","):
            yield 1, path


def _mounts(root: Path, controller: str, version: int) -> Iterator[tuple[Path, str]]:
    """(mount point, the tree's path that it shows) of trees of this version that may have the controller."""
    for line in _lines(root / "proc/self/mountinfo"):
        # ID parent device ROOT POINT options [optional fields] - TYPE source SUPEROPTIONS
        mounted, _, kind = line.partition(" - ")
        fields, kinds = mounted.split(), kind.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        of_version = kinds[0] == "cgroup2" if version == 2 else kinds[0] == "cgroup" and controller in kinds[2].split(",")
        if of_version:
            yield root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])
    # Where they lie by convention, should the list of mounts not be readable or speak of another namespace.
    conventional = root / CONVENTIONAL
    yield (conventional if version == 2 else conventional / controller), "/"


def _unescaped(path: str) -> str:
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        path = path.replace(code, character)
    return path


def _memory(group: Path) -> tuple[int, int | None] | None:
    """(limit, what is taken of it beyond page cache) in bytes of a group; None where it limits nothing."""
    statistics = _table(group / "memory.stat")
    if (group / "memory.limit_in_bytes").exists():
        # memory.stat knows the limits of groups above, which a container may not see.
        limits = [_number(group / "memory.limit_in_bytes"), statistics.get("hierarchical_memory_limit")]
        used = _number(group / "memory.usage_in_bytes")
        # Of the group and those below, as usage is.
        reclaimable = statistics.get("total_active_file", 0) + statistics.get("total_inactive_file", 0)
    else:
        # Beyond memory.high a process is slowed to a crawl rather than killed, which is no better.
        limits = [_number(group / "memory.max"), _number(group / "memory.high")]
        used = _number(group / "memory.current")
        reclaimable = sum(statistics.get(name, 0) for name in ("active_file", "inactive_file", "slab_reclaimable"))
    limit = min((each for each in limits if each is not None and each < UNLIMITED), default=None)
    if limit is None:
        return None
    return limit, None if used is None else max(0, used - reclaimable)


def _cores(group: Path) -> int | None:
    """Cores that a group's CPU quota amounts to, rounded up; None where there is none."""
    if (group / "cpu.cfs_quota_us").exists():
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
    else:
        words = [*_text(group / "cpu.max").split(), "", ""]
        quota, period = (int(word) if word.isdecimal() else None for word in words[:2])
    # Version 1 writes "no quota" as -1.
    return max(1, math.ceil(quota / period)) if quota and period and quota > 0 else None


def _number(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def _table(path: Path) -> dict[str, int]:
    """{name: value} of lines "name value"."""
    pairs = (line.split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    return _text(path).splitlines()


def _text(path: Path) -> str:
    """A file's text; "" where it is not there or cannot be read, as in many containers."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
