"""The probe of the SSD: what it says of drives that are quick, tire, or cannot be measured."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from runtime.lanes.backend import CpuBackend
from runtime.memory.volume import PIECE_BYTES
from runtime.probes import drive as module
from runtime.probes.drive import SsdProbe
from runtime.probes.timing import Effort
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from slideplan.machine.profile import SsdProfile
from storage import DelayedCalls, FaultyDisk, open_descriptors

EFFORT = dataclasses.replace(Effort.of(True, "cpu"), ssd_bytes=64 << 20)


def measured(folder: Path) -> SsdProfile:
    with SsdProbe.open(CpuBackend(), [folder], EFFORT) as probe:
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


class TiringCalls(Calls):
    """A drive that takes a second for each piece beyond its first large slot."""

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        if offset >= module.SMALL.total_bytes + (16 << 20):
            time.sleep(1.0)
        return super().write(file, block, offset)


def test_a_drive_that_tires_is_planned_with_the_rate_that_it_comes_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Disk", lambda: Disk(TiringCalls()))
    found = measured(tmp_path)
    assert found.write.points[-1].rate.p50 < 17 << 20
    assert found.burst_write_bytes_per_s is not None
    assert found.burst_write_bytes_per_s > 1.1 * found.write.points[-1].rate.p50


def test_several_drives_are_measured_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both together are faster than each, and the room is that of which each has its share."""
    folders = [tmp_path / "quick", tmp_path / "slow"]
    for folder in folders:
        folder.mkdir()
    free = {"quick": 300 << 20, "slow": 900 << 20}
    disk = Disk(DelayedCalls(quick=0.02, slow=0.06))
    monkeypatch.setattr(disk, "free_bytes", lambda folder: free[folder.name])
    monkeypatch.setattr(module, "Disk", lambda: disk)
    with SsdProbe.open(CpuBackend(), folders, EFFORT) as probe:
        if probe is None:
            pytest.skip("no direct I/O here")
        quick, slow = probe.speeds
        assert 2 < quick / slow < 3.5
        found = probe.profile(duplex_bytes_per_s=10**9)
    assert found.path == f"{tmp_path}/quick, {tmp_path}/slow"
    assert found.capacity_bytes == pytest.approx((300 << 20) * (quick + slow) / quick, rel=1e-6)
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("disk", [FaultyDisk(direct=False), FaultyDisk(free_bytes=1 << 20)], ids=["buffered", "full"])
def test_a_drive_that_cannot_be_measured_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk) -> None:
    monkeypatch.setattr(module, "Disk", lambda: disk)
    with SsdProbe.open(CpuBackend(), [tmp_path], EFFORT) as probe:
        assert probe is None
