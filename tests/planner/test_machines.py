from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import tiny_machine, tiny_workload
from planner.catalogue import machines as catalogue
from planner.catalogue.datasheets import datasheet_machines
from planner.catalogue.here import ThisMachine
from planner.catalogue.machines import DEFAULT_MACHINE, default_machine, find_machine, machines, with_budget
from planner.catalogue.models import find_model
from planner.commands.searching import machine_named
from planner.search.best import search
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions
from slideplan import codec
from slideplan.machine.profile import MachineProfile, SsdProfile
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.policy import Workload
from slideplan.quantities import GIB

SHIPPED = [
    "a100-80gib-1tib", "a6000-48gib-512gib", "h200-503gib", "rtx3090-128gib", "rtx4090-64gib", "rtx4090-128gib",
    "rtx4090-256gib", "rtx4090-2tib",
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
    assert "machine 'rtx4090-2tb' is neither a known profile nor a file; did you mean rtx4090-2tib" in message
    assert all(name in message for name in SHIPPED)


HERE = ThisMachine(gpus=("test gpu",), cpu="test cpu", cores=4, host_memory_bytes=4 * GIB)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Says what this machine is; by default that of `tiny_machine`."""

    def be(**changes: Any) -> None:
        monkeypatch.setattr(catalogue, "this_machine", lambda: replace(HERE, **changes))

    be()
    return be


def other_machine(name: str, date: str) -> MachineProfile:
    profile = measured(name, date)
    other = msgspec.structs.replace(profile, host=msgspec.structs.replace(profile.host, cores=96))
    codec.save(Path("profiles") / f"{name}.json", other)
    return other


def test_default_is_a_shipped_datasheet_where_nothing_measured_is_of_this_machine(here: Callable[..., None]):
    shipped = find_machine("rtx4090-256gib")
    for _ in range(2):
        choice = default_machine()
        assert (choice.machine, choice.is_here) == (shipped, False)
        (note,) = choice.notes
        assert note.startswith("no profile of this machine in profiles/: taking the shipped rtx4090-256gib (NVIDIA GeForce")
        assert "`planner profile` measures this machine, --machine names another" in note
        measured("sheet", "2027-01-01", source="datasheet")
        other_machine("copied", "2027-01-02")


def test_default_is_the_profile_of_this_machine_and_not_the_newest(here: Callable[..., None]):
    mine = measured("mine", "2026-05-01")
    other_machine("copied", "2026-05-02")
    choice = default_machine()
    assert (choice.machine, choice.is_here, choice.notes) == (mine, True, ())


def test_of_several_profiles_of_this_machine_the_newest_is_taken_and_that_is_said(here: Callable[..., None]):
    measured("a", "2026-05-02T09:00:00+00:00")
    newest = measured("b", "2026-05-02T10:00:00+00:00")
    measured("c", "2026-05-01")
    choice = default_machine()
    assert choice.machine == newest
    assert choice.notes == (
        "3 profiles of this machine: taking the newest, b of 2026-05-02T10:00:00+00:00; --machine names another",
    )


def test_a_profile_that_differs_in_memory_alone_is_named_and_not_taken(here: Callable[..., None]):
    """Some virtual machines show only the part of their RAM that is in use."""
    measured("mine", "2026-05-01")
    here(host_memory_bytes=GIB)
    choice = default_machine()
    assert choice.machine.name == DEFAULT_MACHINE
    assert choice.notes[0] == (
        "profile mine has the GPU, processor and cores of this machine, but 4.00 GiB of RAM, of which 1.00 GiB show here: "
        "not taken; --machine mine takes it"
    )
    full = measured("full", "2026-04-01")
    codec.save("profiles/full.json", msgspec.structs.replace(full, host=msgspec.structs.replace(full.host, memory_bytes=GIB)))
    choice = default_machine()
    assert choice.machine.name == "full"
    assert len(choice.notes) == 1


def test_a_shipped_profile_of_a_machine_like_this_one_is_taken_and_that_is_said(here: Callable[..., None]):
    shipped = find_machine("h100-80gb-125gib")
    here(gpus=(shipped.gpu.name,), cpu=shipped.host.cpu, cores=shipped.host.cores, host_memory_bytes=shipped.host.memory_bytes)
    choice = default_machine()
    assert (choice.machine, choice.is_here) == (shipped, True)
    assert choice.notes[0].startswith("taking the shipped h100-80gb-125gib, measured on a machine like this one; `planner")
    here(gpus=(shipped.gpu.name,), cpu=shipped.host.cpu, cores=shipped.host.cores, host_memory_bytes=30 * GIB)
    choice = default_machine()
    assert choice.machine.name == DEFAULT_MACHINE
    assert "--machine h100-80gb-125gib takes it" in choice.notes[0]


FOREIGN = {
    "another program's": ("aws.json", b'{"region": "eu-west-1"}', "expected a 'machine_profile' document"),
    "a list": ("list.json", b"[1, 2]", "not a valid machine_profile"),
    "cut off": ("mine.json", b"{", "not valid JSON"),
    "empty": ("mine.json", b"", "not valid JSON"),
    "not text": ("mine.json", b"\xff\xfe\x00", "not valid JSON"),
    "of a later version": ("new.json", b'{"document": "machine_profile", "format_version": 99}', "`format_version` is 99"),
    "nested": ("deep.json", b'{"document": "x", "a":' + b"[" * 200_000, "nested too deep"),
    "called as the default": (f"{DEFAULT_MACHINE}.json", b"{}", "expected a 'machine_profile' document"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_profile_is_left_out_in_one_line(kind: str, here: Callable[..., None]):
    name, content, reason = FOREIGN[kind]
    mine = measured("here", "2026-05-01")
    (Path("profiles") / name).write_bytes(content)
    choice = default_machine()
    assert choice.machine == mine
    (note,) = choice.notes
    assert note.startswith(f"left out: profiles/{name}: ")
    assert reason in note
    assert "\n" not in note
    Path("profiles/here.json").unlink()
    assert default_machine().machine.name == DEFAULT_MACHINE


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_broken_file_does_not_hide_the_shipped_profile_of_its_name(kind: str, capsys: pytest.CaptureFixture[str]):
    _, content, reason = FOREIGN[kind]
    shipped = find_machine("h200-503gib")
    Path("profiles").mkdir()
    Path("profiles/H200-503gib.json").write_bytes(content)
    said: list[str] = []
    assert find_machine("h200-503GIB", said.append) == shipped
    (line,) = said
    assert line.startswith("left out: profiles/H200-503gib.json: ")
    assert reason in line
    assert line.endswith("h200-503gib.json")
    assert machine_named("h200-503gib") == shipped
    assert line in capsys.readouterr().err
    # Named by its path it is what was asked for, and where no other has its name too.
    for name in ("profiles/H200-503gib.json", "alone"):
        Path("profiles/alone.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^profiles/"):
            find_machine(name)


def test_a_broken_file_does_not_hide_what_a_model_would_fit_on(here: Callable[..., None]):
    workload, small = tiny_workload(seq_len=2048, global_batch=1), find_machine("rtx3090-128gib")
    small = msgspec.structs.replace(small, ssd=None)
    Path("profiles").mkdir()
    Path("profiles/rtx4090-2tib.json").write_text("{")
    answer = search(find_model("123b"), workload, small, SearchOptions())
    assert isinstance(answer, DoesNotFit)
    assert "rtx4090-2tib" in answer.machines


@pytest.mark.skipif(os.geteuid() == 0, reason="root may search every folder")
def test_a_folder_that_may_not_be_searched_is_left_out(here: Callable[..., None]):
    measured("mine", "2026-05-01")
    Path("profiles").chmod(0o400)
    try:
        assert default_machine().notes[0] == "left out: profiles/mine.json: cannot be read: Permission denied"
    finally:
        Path("profiles").chmod(0o700)


def test_many_files_that_are_no_profiles_are_one_line_still(here: Callable[..., None]):
    Path("profiles").mkdir()
    for number in range(20):
        (Path("profiles") / f"{number:02}.json").write_text("{}")
    note, _ = default_machine().notes
    assert note.endswith("(and 17 more)")


def test_names_of_files_do_not_reach_the_terminal_as_they_are(here: Callable[..., None]):
    Path("profiles").mkdir()
    for name in ("a\x1b[31m", "b\n", os.fsdecode(b"c\xff")):
        (Path("profiles") / f"{name}.json").write_text("{}")
    note = default_machine().notes[0]
    assert note.isprintable()
    assert all(name in note for name in ("a\\x1b[31m.json", "c\\udcff.json"))


def test_broken_files_are_not_listed_as_known():
    Path("profiles").mkdir()
    Path("profiles/h100-mine.json").write_text("{")
    with pytest.raises(ValueError, match="did you mean h100-80gb-125gib") as raised:
        find_machine("h100")
    assert "h100-mine" not in str(raised.value)


def test_only_regular_files_are_profiles(here: Callable[..., None]):
    """A pipe of that name would be waited for, without an end."""
    Path("profiles/folder.json").mkdir(parents=True)
    os.mkfifo("profiles/pipe.json")
    Path("profiles/gone.json").symlink_to("nowhere")
    assert len(default_machine().notes) == 1
    assert {"folder", "pipe", "gone"}.isdisjoint(machines())


@pytest.mark.parametrize("profiles", ["file", "link"])
def test_profiles_need_not_be_a_folder(profiles: str, here: Callable[..., None]):
    Path("profiles").write_text("") if profiles == "file" else Path("profiles").symlink_to("nowhere")
    assert default_machine().machine.name == DEFAULT_MACHINE


@pytest.mark.parametrize(
    "meant, suggested",
    [
        ("h100", "h100-80gb-125gib"),
        ("H100", "h100-80gb-125gib"),
        ("h100-80gb", "h100-80gb-125gib"),
        ("H100 80GB", "h100-80gb-125gib"),
        ("h200", "h200-503gib"),
        ("a100", "a100-80gib-1tib"),
        ("a6000", "a6000-48gib-512gib"),
        ("4090", "rtx4090-128gib or rtx4090-256gib or rtx4090-2tib"),
        ("RTX 4090", "rtx4090-128gib or rtx4090-256gib or rtx4090-2tib"),
        ("rtx3090", "rtx3090-128gib"),
        ("profiles/h100.json", "h100-80gb-125gib"),
        ("rtx4090-2tb", "rtx4090-2tib"),
        ("h100-80gb-125gb", "h100-80gb-125gib"),
    ],
)
def test_a_part_of_a_name_suggests_the_whole(meant: str, suggested: str):
    with pytest.raises(ValueError, match=f"neither a known profile nor a file; did you mean {suggested}"):
        find_machine(meant)


@pytest.mark.parametrize("meant", ["zzz", "~nobody-of-this-name/zzz.json", "a\0b", "-", "..json"])
def test_where_nothing_is_near_nothing_is_suggested(meant: str):
    with pytest.raises(ValueError) as raised:
        find_machine(meant)
    assert "did you mean" not in str(raised.value)


def test_budget_changes_capacities_only():
    machine = find_machine("a100-80gib-1tib")
    small = with_budget(machine, 24 * GIB, None)
    assert (small.gpu.memory_bytes, small.host) == (24 * GIB, machine.host)
    assert with_budget(machine, None, 64 * GIB).host.memory_bytes == 64 * GIB
    assert with_budget(machine, None, None) == machine
    with pytest.raises(ValueError, match=r"host\.memory_bytes is 0, must be positive"):
        with_budget(machine, None, 0)


# -- drives ------------------------------------------------------------------------------------


DRIVES = {machine.name: machine.ssd for machine in datasheet_machines() if machine.ssd is not None}


@pytest.mark.parametrize("drive", DRIVES.values(), ids=DRIVES)
def test_a_drive_reads_and_writes_at_once_no_more_than_it_reads(drive: SsdProfile):
    read, write = (curve.points[-1].rate.p50 for curve in (drive.read, drive.write))
    assert min(read, write) < drive.duplex_bytes_per_s < read + write


@pytest.mark.parametrize("name", ["rtx3090-128gib", "rtx4090-64gib", "rtx4090-128gib", "rtx4090-256gib"])
def test_desktops_plan_with_what_a_drive_writes_once_its_cache_is_full(name: str):
    machine = find_machine(name)
    drive = machine.ssd
    assert drive is not None
    assert drive.write.points[-1].rate.p50 == pytest.approx(1.8e9, rel=0.01)
    assert (drive.burst_write_bytes_per_s, drive.endurance_bytes) == (6 * 10**9, 2400 * 10**12)
    assert "Assumed, not measured: what a desktop's drive writes once its cache is full" in machine.provenance.notes


def test_profiles_from_before_drives_had_a_warranty_are_read():
    drive = find_machine("h100-80gb-125gib").ssd
    assert drive is not None
    assert (drive.burst_write_bytes_per_s, drive.endurance_bytes) == (None, None)


@pytest.mark.parametrize("field", ["burst_write_bytes_per_s", "endurance_bytes"])
def test_a_drive_that_can_write_nothing_is_refused(field: str):
    for drive in DRIVES.values():
        with pytest.raises(ValueError, match=rf"ssd\.{field} is 0, must be positive"):
            msgspec.structs.replace(drive, **{field: 0})


def test_123b_fits_the_default_machine_and_says_what_that_does_to_its_drive():
    """Weights alone take 228 of its 256 GiB; all state lies on the drive."""
    model = find_model("123b")
    cheap = SearchOptions(micro_batch=8, lowered_tasks=1, simulated_tasks=1)
    plan = search(model, Workload(seq_len=1024, global_batch=8), find_machine(DEFAULT_MACHINE), cheap)
    assert isinstance(plan, Plan)
    assert {placement.moments for placement in plan.policy.units} == {Tier.SSD}
    wear = plan.prediction.drive
    assert wear is not None
    state = sum(plan.ledger.tiers[Tier.SSD].items.values())
    assert wear.read_bytes == wear.write_bytes == state
