"""Lanes: FIFOs of tasks on one resource each."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class LaneKind(StrEnum):
    """Which resource: a stream of a GPU, a thread of the host, or a drive's queue."""

    COMPUTE = "compute"
    H2D = "h2d"
    D2H = "d2h"
    HOST_UPDATE = "host_update"
    GPU_UPDATE = "gpu_update"
    SSD_READ = "ssd_read"
    SSD_WRITE = "ssd_write"
    COPY = "copy"  # of other systems: both directions in one FIFO
    HOST_CAST = "host_cast"  # of other systems


HOST_LANES = (LaneKind.HOST_UPDATE, LaneKind.HOST_CAST, LaneKind.SSD_READ, LaneKind.SSD_WRITE)


class Lane(NamedTuple):
    """A FIFO of tasks. `device`: number of the GPU that it is, or serves."""

    kind: LaneKind
    device: int = 0

    @property
    def name(self) -> str:
        """As records and reports call it: the kind, with the device's number but for the first one's."""
        return str(self.kind) if self.device == 0 else f"{self.kind}@{self.device}"

    def __str__(self) -> str:
        return self.name


def order_of(lane: Lane) -> tuple[int, int]:
    """In which order lanes are listed: by device, then as their kinds are declared."""
    return lane.device, _PLACES[lane.kind]


_PLACES = {kind: place for place, kind in enumerate(LaneKind)}
