"""The drives of a run: folders that were named, how slots are shared out among them, and the room that they have."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.memory.drive import Drive, on_drive
from runtime.memory.speeds import MEASURED_BYTES, measured_speeds
from runtime.memory.striping import Striping
from runtime.storage.disk import Disk
from slideplan.codec import unwritable
from slideplan.command import check_folders, on_one_device
from slideplan.graph.tasks import tier_bytes
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes

PHASE = "reserving memory"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_REMEDY = "free some, name a folder on another drive, or plan with a smaller --ssd-memory"


@dataclass(frozen=True)
class Drives:
    """Folders for what a plan has on the SSD, one on each drive. shares: bytes in each of them"""

    plan: Plan
    where: str
    folders: tuple[Path, ...]
    speeds: tuple[float, ...]
    shares: tuple[int, ...]

    def taken_bytes(self, folder: Path) -> int:
        """What the run takes of the drive that a folder is on."""
        device = folder.stat().st_dev
        return sum(share for each, share in zip(self.folders, self.shares, strict=True) if each.stat().st_dev == device)

    def reserve(self, disk: Disk, show: Show) -> Drive:
        """Take the room. Raises ValueError where another program has it now, or the folder cannot be written."""
        try:
            drive = Drive(disk, self.folders, on_drive(self.plan.graph), self.speeds)
        except OSError as error:
            raise self._refused(error, disk) from None
        for folder in drive.buffered:
            note = f"--ssd {folder}: its filesystem refuses direct I/O; reads and writes go through the system's page cache"
            show(Progress(PHASE, note=note))
        return drive

    def check_room(self, disk: Disk) -> None:
        """Raise ValueError where a drive has less room than its share."""
        for folder in self.folders:
            need, free = self.taken_bytes(folder), disk.free_bytes(folder)
            if need > free:
                raise ValueError(
                    f"--ssd {folder}: {self.where} needs {format_bytes(need)} there{self._of_all}, {format_bytes(free)} are "
                    f"free: lacks {format_bytes(need - free)}; {_REMEDY}"
                )

    @property
    def _of_all(self) -> str:
        if len(self.folders) == 1:
            return ""
        return f" (of {format_bytes(sum(self.shares))}, shared out by the drives' speeds)"

    def _refused(self, error: OSError, disk: Disk) -> Exception:
        folder = Path(error.filename)
        if error.errno not in _FULL:
            return unwritable(folder, error)
        need, free = self.taken_bytes(folder), disk.free_bytes(folder)
        return ValueError(
            f"--ssd {folder}: {self.where} needs {format_bytes(need)} there{self._of_all}, and the filesystem gives no room "
            f"for it ({error.strerror}), {format_bytes(free)} are free now; {_REMEDY}"
        )


def find_drives(plan: Plan, folders: Sequence[Path], disk: Disk, where: str, show: Show) -> Drives | None:
    """Share out what a plan has on the SSD among the folders that were named; None where it has nothing there.

    where: the plan's path. Several drives are measured first. Raises ValueError where there is no folder, one that is none or
    cannot be written, one twice, or one without room; Hung where a drive does not answer.
    """
    need = tier_bytes(plan.graph.pools, Tier.SSD)
    if not need:
        return None
    check_folders(folders, "name one on the drive that the plan was made for")
    if not folders:
        raise ValueError(f"{where}: {format_bytes(need)} of state lie on the ssd; name a folder on that drive with --ssd")
    for note in on_one_device(folders):
        show(Progress(PHASE, note=note))
    if len(folders) > 1:
        show(Progress("measuring the drives", 0, 1))
    try:
        speeds = measured_speeds(disk, folders)
    except OSError as error:
        raise unmeasured(error, disk) from None
    found = Drives(plan, where, tuple(folders), tuple(speeds), tuple(Striping(on_drive(plan.graph), speeds).sizes))
    found.check_room(disk)
    if len(folders) > 1:
        show(Progress("measuring the drives", 1, 1, note=said_of_drives(folders, speeds, found.shares)))
    return found


def unmeasured(error: OSError, disk: Disk) -> Exception:
    """What to raise where a drive that is one of several cannot be measured."""
    folder = Path(error.filename).parent
    if error.errno not in _FULL:
        return unwritable(folder, error)
    free = format_bytes(disk.free_bytes(folder))
    return ValueError(
        f"--ssd {folder}: {format_bytes(MEASURED_BYTES)} are needed to measure the drive, {free} are free; free some, or name "
        "a folder on another drive"
    )


def said_of_drives(folders: Sequence[Path], speeds: Sequence[float], shares: Sequence[int] | None = None) -> str:
    """How fast each of several drives is beside the others, and what it gets."""
    said = []
    for number, (folder, speed) in enumerate(zip(folders, speeds, strict=True)):
        gets = "" if shares is None else f", gets {format_bytes(shares[number])}"
        said.append(f"{folder} moves {format_bytes(round(speed))}/s{gets}")
    return f"drives, read and written at once: {'; '.join(said)}"
