"""How the lanes of a machine share its bandwidth: as fitted to measurements, or by default."""

from __future__ import annotations

from slideplan.graph.lanes import LaneKind
from slideplan.machine.profile import MachineProfile
from slideplan.machine.sharing import Resource, Sharing


def sharing(machine: MachineProfile) -> Sharing:
    """The model fitted to the machine's measured combinations of lanes; without those, `default_sharing`."""
    return default_sharing(machine) if machine.interference is None else machine.interference.fitted


def default_sharing(machine: MachineProfile) -> Sharing:
    """Every byte takes one byte of what it passes, and every flow has the same share. Compute shares nothing.

    On the "cpu" backend a copy is a memcpy in RAM: it reads and writes DRAM.
    """
    copy = {Resource.PCIE: 1.0, Resource.HOST_DRAM: 2.0 if machine.gpu.backend == "cpu" else 1.0}
    capacities = {Resource.PCIE: machine.link.duplex_bytes_per_s, Resource.HOST_DRAM: machine.host.dram_bytes_per_s}
    usage = {LaneKind.H2D: copy, LaneKind.D2H: copy, LaneKind.HOST_UPDATE: {Resource.HOST_DRAM: 1.0}}
    if machine.ssd is not None:
        capacities[Resource.SSD] = machine.ssd.duplex_bytes_per_s
        io = {Resource.SSD: 1.0, Resource.HOST_DRAM: 1.0}
        usage |= {LaneKind.SSD_READ: io, LaneKind.SSD_WRITE: io}
    return Sharing(capacities=capacities, usage=usage)


def capacities(machine: MachineProfile) -> dict[Resource, int]:
    """Bytes/s that each shared resource of the machine offers in total; no SSD entry without an SSD."""
    return sharing(machine).capacities
