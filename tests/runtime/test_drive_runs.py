"""Runs with state on the SSD: which drives they take, how many, and which they refuse."""

from __future__ import annotations

import errno
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from builders import tiny_model
from drives import EVERY, NEED, PAGE, PLAN, SCRATCH, named, several, small_drives, whole_run
from runtime import rehearsal
from runtime.checkpoints.manifest import Saving
from runtime.memory import drive as drive_module
from runtime.memory.speeds import MEASURED_BYTES
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from saved_runs import CUT, STEPS, Run, check_same, planned
from slideplan.progress import Progress
from storage import Fault, FaultyDisk


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    with small_drives(tmp_path) as mounted:
        yield mounted


def test_the_drive_may_be_another_one_after_a_resume_and_none_where_nothing_lies_there(tmp_path: Path) -> None:
    whole, cut = Run(tmp_path / "whole", PLAN, Saving(every=1)), Run(tmp_path / "cut", PLAN, Saving(every=1))
    whole.train()
    cut.train(steps=CUT)
    on_host = planned(tiny_model(vocabulary=256), kernels="fused")
    cut.resume(plan=on_host, ssd=(), steps=CUT + 1)
    (tmp_path / "other").mkdir()
    cut.resume(plan=PLAN, ssd=[tmp_path / "other"])
    check_same(whole, cut)


def test_a_plan_with_state_on_the_ssd_asks_for_a_folder_with_room(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PLAN)
    with pytest.raises(ValueError, match=r" of state lie on the ssd; name a folder on that drive with --ssd$"):
        run.train(ssd=())
    with pytest.raises(ValueError, match=r"^--ssd .*/nowhere: is not a folder; name one on the drive"):
        run.train(ssd=[tmp_path / "nowhere"])
    with pytest.raises(
        ValueError, match=r"^--ssd .* needs .* there, 0 B are free: lacks .*; free some, name a folder on another"
    ):
        run.train(ssd=[tmp_path], disk=FaultyDisk(free_bytes=0))
    with pytest.raises(ValueError, match=r"cannot be written: Permission denied"):
        run.train(disk=FaultyDisk(Fault("create_scratch", errno.EACCES)))
    assert not (run.folder / "metrics.jsonl").exists()


def test_checkpoints_get_what_state_leaves_of_their_drive(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PLAN)
    room = FaultyDisk(free_bytes=17 << 20)  # for a checkpoint alone, which wants 16 MiB to spare
    with pytest.raises(ValueError, match=r"a checkpoint need"):
        run.train(disk=room)


class SlowCalls(Calls):
    """A drive that takes its time."""

    def __init__(self, second: float) -> None:
        self._second = second

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        if file.path.match(SCRATCH):
            time.sleep(self._second)
        return super().write(file, block, offset)


@pytest.mark.parametrize("slow", [True, False])
def test_a_drive_that_is_slower_than_planned_is_said_before_the_first_step(tmp_path: Path, slow: bool) -> None:
    """The plan gives every task a microsecond or a second."""
    record = PLAN.prediction.record
    spans = tuple(msgspec.structs.replace(span, start_ns=0, end_ns=1000 if slow else 10**9) for span in record.spans)
    record = msgspec.structs.replace(record, step_ns=10**9, spans=spans)
    plan = msgspec.structs.replace(PLAN, prediction=msgspec.structs.replace(PLAN.prediction, record=record))
    run = Run(tmp_path / "run", plan)
    run.train(steps=1, disk=Disk(SlowCalls(0.001 if slow else 0)))
    said = [each.phase for each in run.shown if "the drive moves" in each.note]
    assert said == (["rehearsing the drive"] if slow else [])
    phases = [each.phase for each in run.shown]
    assert phases.index("rehearsing the drive") < phases.index("training")


def test_buffered_moves_are_said(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PLAN)
    run.train(disk=FaultyDisk(direct=False), steps=1)
    assert "its filesystem refuses direct I/O; reads and writes go through the system's page cache" in run.notes


def test_bits_do_not_depend_on_drives(tmp_path: Path, whole: Run) -> None:
    """Two drives, one after a resume, then three."""
    run = Run(tmp_path / "run", PLAN, EVERY)
    run.train(steps=2, ssd=several(tmp_path, 2))
    assert "drives, read and written at once: " in run.notes
    assert "are on one device: both together are no faster than one of them" in run.notes
    run.resume(steps=4)
    run.resume(ssd=named(tmp_path, "a", "b", "c"))
    check_same(whole, run)


class JitteringCalls(Calls):
    """Pieces end in any order."""

    def __init__(self) -> None:
        self._chance = random.Random(0)

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        time.sleep(self._chance.random() * 5e-3)
        return super().read(file, block, offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        time.sleep(self._chance.random() * 5e-3)
        return super().write(file, block, offset)


def test_bits_do_not_depend_on_which_piece_ends_first(tmp_path: Path, whole: Run) -> None:
    """Slots are issued ahead, in pieces of a page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive_module, "PIECE_BYTES", 4 * PAGE)
        run = Run(tmp_path / "run", PLAN, EVERY)
        run.train(disk=Disk(JitteringCalls()))
    check_same(whole, run)


def test_folders_of_several_drives_are_checked(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PLAN)
    one, other = named(tmp_path, "one", "other")
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^--ssd .*/one, --ssd .*/link: are the same folder; name each drive once$"):
        run.train(ssd=[one, other, tmp_path / "link"])
    with pytest.raises(ValueError, match=r"^--ssd .*/file: is not a folder"):
        run.train(ssd=[one, tmp_path / "file"])
    refused = FaultyDisk(Fault("create_scratch", errno.EROFS, path="other/*"))
    with pytest.raises(ValueError, match=r"/other: cannot be written: Read-only file system$"):
        run.train(ssd=[one, other], disk=refused)
    full = FaultyDisk(Fault("allocate", errno.ENOSPC, path="other/*"))
    with pytest.raises(ValueError, match=r"^--ssd .*/other: 64.0 MiB are needed to measure the drive, .* are free; free some"):
        run.train(ssd=[one, other], disk=full)
    taken = FaultyDisk(Fault("allocate", errno.ENOSPC, number=2, path="other/*"))
    with pytest.raises(
        ValueError,
        match=r"^--ssd .*/other: plan.json needs .* there \(of .*, shared out by the drives' speeds\), and the filesystem "
        r"gives no room for it \(No space left on device\), .* are free now; free some",
    ):
        run.train(ssd=[one, other], disk=taken)
    assert not (run.folder / "metrics.jsonl").exists()


def test_a_small_filesystem_that_has_no_room_is_refused(tmp_path: Path, small: Callable[[int], Path]) -> None:
    folder = small(NEED // PAGE * PAGE - 16 * PAGE)
    with pytest.raises(
        ValueError, match=rf"^--ssd {folder}: plan.json needs .* there, .* are free: lacks .* KiB; free some, name"
    ):
        Run(tmp_path / "run", PLAN).train(ssd=[folder])
    assert not list(folder.glob(".scratch*"))


def test_a_second_run_on_one_folder_needs_room_of_its_own(tmp_path: Path, small: Callable[[int], Path], whole: Run) -> None:
    """What the first one has reserved counts, though no file shows it and little was written there."""
    folder = small(NEED * 3 // 2 // PAGE * PAGE + (1 << 20))
    first, second = Run(tmp_path / "first", PLAN, EVERY), Run(tmp_path / "second", PLAN, EVERY)
    refused: list[str] = []

    class Beside(list[Progress]):
        def append(self, shown: Progress) -> None:
            super().append(shown)
            if shown.phase == "training" and shown.done == 3:
                assert not list(folder.glob(".scratch*"))
                with pytest.raises(ValueError) as error:
                    second.train(ssd=[folder])
                refused.append(str(error.value))

    first.shown = Beside()
    first.train(ssd=[folder])
    assert re.match(rf"^--ssd {folder}: plan.json needs .* there, .* are free: lacks .*; free some, name a folder", refused[0])
    check_same(whole, first)
    second.train(ssd=[folder])
    check_same(whole, second)


def test_a_folder_that_is_removed_and_a_filesystem_that_others_fill_harm_no_run(
    tmp_path: Path, small: Callable[[int], Path], whole: Run
) -> None:
    """What it needs was reserved before."""
    folder = small(NEED + (2 << 20))
    inner = folder / "inner"
    inner.mkdir()
    cut = Run(tmp_path / "cut", PLAN, EVERY)

    class Removing(list[Progress]):
        def append(self, shown: Progress) -> None:
            super().append(shown)
            if shown.phase == "training" and shown.done == 3:
                inner.rmdir()
                with pytest.raises(OSError, match="No space left"), (folder / "others").open("wb") as file:
                    while True:
                        file.write(bytes(1 << 16))
                        file.flush()

    cut.shown = Removing()
    cut.train(ssd=[inner])
    check_same(whole, cut)
    with pytest.raises(ValueError, match=rf"^--ssd {inner}: is not a folder"):
        cut.resume(ssd=[inner], steps=STEPS + 1)


def test_drives_that_are_two_filesystems_are_shared_out(tmp_path: Path, small: Callable[[int], Path], whole: Run) -> None:
    one, large, little = tmp_path / "one", small(96 << 20), small(MEASURED_BYTES + (8 << 20))
    one.mkdir()
    run = Run(tmp_path / "run", PLAN, EVERY)
    run.train(ssd=[one, large])
    assert "on one device" not in run.notes
    assert f"{one} moves " in run.notes
    check_same(whole, run)
    (little / "others").write_bytes(bytes(8 << 20))
    with pytest.raises(ValueError, match=rf"^--ssd {little}: 64.0 MiB are needed to measure the drive, .* are free; free some"):
        Run(tmp_path / "refused", PLAN).train(ssd=[one, little])
