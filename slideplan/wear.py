"""What a plan does to the drive that state lies on: bytes a step and a day, and for how long the drive is made for it."""

from __future__ import annotations

from slideplan.codec import Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import TaskGraph
from slideplan.machine.profile import SsdProfile

DAY_NS = 86_400 * 1_000_000_000


class DriveWear(Spec, frozen=True):
    """What training does to the drive, step after step without a pause. Saves are not counted.

    read_bytes, write_bytes: in one step
    written_bytes_per_day:   at the predicted step time
    capacity_bytes:          of the drive, or of the part of it that was planned for
    writes_per_day:          how often that capacity is written in a day
    endurance_bytes:         that may be written to the drive, by its warranty; None where the profile does not say
    endurance_days:          until all of these are written, by a new drive; None where the profile does not say
    """

    read_bytes: int
    write_bytes: int
    written_bytes_per_day: int
    capacity_bytes: int
    writes_per_day: float
    endurance_bytes: int | None = None
    endurance_days: float | None = None

    @classmethod
    def of(cls, graph: TaskGraph, drive: SsdProfile | None, step_ns: int) -> DriveWear | None:
        """Of a step of this graph, which takes `step_ns`. None where nothing lies on a drive."""
        read_bytes, write_bytes = (
            sum(graph.tasks[number].bytes_moved for number in graph.queue(lane))
            for lane in (LaneKind.SSD_READ, LaneKind.SSD_WRITE)
        )
        if drive is None or not write_bytes:
            return None
        daily_bytes = write_bytes * DAY_NS // max(1, step_ns)
        endurance = drive.endurance_bytes
        return cls(
            read_bytes=read_bytes,
            write_bytes=write_bytes,
            written_bytes_per_day=daily_bytes,
            capacity_bytes=drive.capacity_bytes,
            writes_per_day=daily_bytes / max(1, drive.capacity_bytes),
            endurance_bytes=endurance,
            endurance_days=None if endurance is None else endurance / max(1, daily_bytes),
        )
