from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from builders import tiny_machine
from planner.catalogue.datasheets import datasheet_machines
from planner.catalogue.machines import default_machine, find_machine, machines, with_budget
from slideplan import codec
from slideplan.machine.profile import MachineProfile
from slideplan.quantities import GIB

SHIPPED = [
    "a100-80gib-1tib", "a6000-48gib-512gib", "h200-503gib", "rtx3090-128gib", "rtx4090-128gib", "rtx4090-2tib",
]  # fmt: skip


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(name: str, date: str, source: str = "measured") -> MachineProfile:
    provenance = msgspec.structs.replace(tiny_machine().provenance, date=date, source=source)
    machine = tiny_machine(name=name, provenance=provenance)
    codec.save(Path("profiles") / f"{name}.json", machine)
    return machine


@pytest.mark.parametrize("machine", datasheet_machines(), ids=lambda machine: machine.name)
def test_shipped_files_are_what_the_table_gives(machine: MachineProfile):
    assert codec.load(machines()[machine.name], MachineProfile) == machine, "run python -m planner.catalogue.datasheets"


@pytest.mark.parametrize("machine", datasheet_machines(), ids=lambda machine: machine.name)
def test_datasheet_rates_stay_below_what_carries_them(machine: MachineProfile):
    assert machine.provenance.source == "datasheet"
    assert "Assumed" in machine.provenance.notes
    assert machine.costs == ()
    assert machine.optimizer.host_bytes_per_s.p50 < machine.host.dram_bytes_per_s
    assert machine.optimizer.gpu_bytes_per_s.p50 < machine.gpu.memory_bytes_per_s
    h2d, d2h = machine.link.h2d.points[-1].rate.p50, machine.link.d2h.points[-1].rate.p50
    assert max(h2d, d2h) < machine.link.duplex_bytes_per_s < h2d + d2h
    for curve in (machine.link.h2d, machine.link.d2h, machine.efficiency.gemm):
        rates = [point.rate.p50 for point in curve.points]
        assert rates == sorted(rates)


def test_shipped_machines_are_listed():
    assert set(machines()) >= set(SHIPPED)
    for name in machines():
        assert find_machine(name.upper()).name == name


def test_local_profiles_win():
    local = measured("rtx4090-2tib", "2026-01-01")
    assert machines()["rtx4090-2tib"] == Path("profiles/rtx4090-2tib.json")
    assert find_machine("rtx4090-2tib") == local


def test_a_file_is_read_by_its_path(tmp_path: Path):
    path = tmp_path / "elsewhere" / "mine.json"
    codec.save(path, tiny_machine())
    assert find_machine(str(path)) == tiny_machine()


def test_unknown_machine_lists_the_known_ones():
    with pytest.raises(ValueError) as raised:
        find_machine("rtx4090-2tb")
    message = str(raised.value)
    assert "machine 'rtx4090-2tb' is neither a known profile nor a file; did you mean rtx4090-2tib?" in message
    assert all(name in message for name in SHIPPED)


def test_default_is_the_newest_measurement_else_a_shipped_one():
    assert default_machine() == (find_machine("rtx4090-2tib"), False)
    measured("sheet", "2027-01-01", source="datasheet")
    assert default_machine() == (find_machine("rtx4090-2tib"), False)
    newer = measured("a", "2026-05-02")
    measured("b", "2026-05-01")
    assert default_machine() == (newer, True)


def test_a_broken_local_profile_is_not_passed_over():
    Path("profiles").mkdir()
    Path("profiles/mine.json").write_text("{")
    with pytest.raises(ValueError, match=r"profiles/mine\.json: not valid JSON"):
        default_machine()


def test_budget_changes_capacities_only():
    machine = find_machine("a100-80gib-1tib")
    small = with_budget(machine, 24 * GIB, None)
    assert (small.gpu.memory_bytes, small.host) == (24 * GIB, machine.host)
    assert with_budget(machine, None, 64 * GIB).host.memory_bytes == 64 * GIB
    assert with_budget(machine, None, None) == machine
    with pytest.raises(ValueError, match=r"host\.memory_bytes is 0, must be positive"):
        with_budget(machine, None, 0)
