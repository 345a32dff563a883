"""The probe of the SSD: what it says of drives that are quick, tire, or cannot be measured."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest
import torch

from runtime.lanes.backend import CpuBackend
from runtime.memory.drive import PIECE_BYTES, Drive
from runtime.probes import drive as module
from runtime.probes.drive import SsdProbe
from runtime.probes.timing import Effort
from runtime.storage.disk import Disk
from slideplan.machine.profile import SsdProfile
from storage import FaultyDisk, open_descriptors

EFFORT = dataclasses.replace(Effort.of(True, "cpu"), ssd_bytes=64 << 20)


def measured(folder: Path) -> SsdProfile:
    with SsdProbe.open(CpuBackend(), folder, EFFORT) as probe:
        if probe is None:
            pytest.skip("no direct I/O here")
        for _, move in probe.work().values():
            move()
        return probe.profile(duplex_bytes_per_s=10**9)


def test_pieces_and_slots_are_measured_and_nothing_stays(tmp_path: Path) -> None:
    before = open_descriptors()
    found = measured(tmp_path)
    for curve in (found.read, found.write):
        assert [point.size for point in curve.points] == [PIECE_BYTES, 16 << 20]
    assert (found.path, found.duplex_bytes_per_s) == (str(tmp_path), 10**9)
    assert not any(tmp_path.iterdir())
    assert open_descriptors() == before


def test_a_drive_that_tires_is_planned_with_the_rate_that_it_comes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Drive.write, []

    def tiring(drive: Drive, slot: tuple[str, int], values: torch.Tensor) -> None:
        written.append(slot)
        write(drive, slot, values)
        if slot[0] == "ssd.large" and slot[1] > 0:
            time.sleep(1.0)

    monkeypatch.setattr(Drive, "write", tiring)
    found = measured(tmp_path)
    assert found.write.points[-1].rate.p50 < 17 << 20
    assert found.burst_write_bytes_per_s is not None
    assert found.burst_write_bytes_per_s > 1.1 * found.write.points[-1].rate.p50


@pytest.mark.parametrize("disk", [FaultyDisk(direct=False), FaultyDisk(free_bytes=1 << 20)], ids=["buffered", "full"])
def test_a_drive_that_cannot_be_measured_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    monkeypatch.setattr(module, "Disk", lambda: disk)
    with SsdProbe.open(CpuBackend(), tmp_path, EFFORT) as probe:
        assert probe is None
