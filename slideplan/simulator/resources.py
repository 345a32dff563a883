"""What tasks of different lanes share."""

from __future__ import annotations

from enum import StrEnum

from slideplan.plan.machine import MachineProfile


class Resource(StrEnum):
    """Bandwidth that several lanes draw on at once."""

    PCIE = "pcie"  # both directions together
    HOST_DRAM = "host_dram"  # the CPU optimizer, copies and SSD I/O
    SSD = "ssd"  # reads and writes together


def capacities(machine: MachineProfile) -> dict[Resource, int]:
    """Bytes/s that each shared resource of the machine offers in total; no SSD entry without an SSD."""
    found = {Resource.PCIE: machine.link.duplex_bytes_per_s, Resource.HOST_DRAM: machine.host.dram_bytes_per_s}
    if machine.ssd is not None:
        found[Resource.SSD] = machine.ssd.duplex_bytes_per_s
    return found
