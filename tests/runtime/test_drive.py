"""State on the SSD: what its drive does when it works, is full, fails, or is not there."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from builders import tiny_model
from runtime import rehearsal
from runtime.checkpoints.manifest import Saving
from runtime.lanes.clock import LaneError
from runtime.memory.drive import PIECE_BYTES, Drive
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from saved_runs import CUT, Run, check_same, notes_of, planned
from slideplan.graph.tasks import SlotPool
from slideplan.placement import TensorClass, Tier
from storage import Fault, FaultyDisk, open_descriptors, small_drive

PAGE = 4096
POOLS = [
    SlotPool("ssd.moments.passing", Tier.SSD, TensorClass.MOMENTS, 3 * PAGE, 5),
    SlotPool("ssd.remainder.passing", Tier.SSD, TensorClass.REMAINDER, PIECE_BYTES + PAGE, 2),
]
SLOTS = [(pool.name, number) for pool in POOLS for number in range(pool.count)]
PLAN = planned(tiny_model(vocabulary=256), ssd_state=(0, 2, 5), ssd_moments=(1,), kernels="fused")


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


def aligned(size: int) -> torch.Tensor:
    room = torch.zeros(size + PAGE, dtype=torch.uint8)
    return room[-room.data_ptr() % PAGE :][:size]


def size_of(slot: tuple[str, int]) -> int:
    return next(pool.slot_bytes for pool in POOLS if pool.name == slot[0])


def noise(size: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def filled(slot: tuple[str, int], seed: int) -> torch.Tensor:
    found = aligned(size_of(slot))
    found.copy_(noise(len(found), seed))
    return found


@pytest.mark.parametrize("disk", [{}, {"most_bytes": 1000}, {"direct": False}], ids=["whole", "short moves", "buffered"])
def test_slots_hold_what_was_written_and_zeros_before(tmp_path: Path, disk: dict[str, Any]) -> None:
    before = open_descriptors()
    drive = Drive(FaultyDisk(**disk), tmp_path, POOLS)
    assert drive.direct == (disk.get("direct", True) and drive.direct)
    assert not any(tmp_path.iterdir())  # the file has no name: nothing stays of a process that is killed
    for slot in SLOTS:
        into = aligned(size_of(slot)).fill_(1)
        drive.read(slot, into)
        assert not into.any()
    for seed, slot in enumerate(SLOTS):
        drive.write(slot, filled(slot, seed))
    for seed, slot in enumerate(SLOTS):
        into = aligned(size_of(slot))
        drive.read(slot, into)
        assert torch.equal(into, noise(size_of(slot), seed))
    drive.close()
    drive.close()
    assert open_descriptors() == before


def test_parts_are_read_and_written_at_any_byte(tmp_path: Path) -> None:
    """And leave what lies beside them alone."""
    drive, chance = Drive(Disk(), tmp_path, POOLS), random.Random(0)
    expected = {slot: noise(size_of(slot), seed) for seed, slot in enumerate(SLOTS)}
    for seed, slot in enumerate(SLOTS):
        drive.write(slot, filled(slot, seed))
    for number in range(60):
        slot = chance.choice(SLOTS)
        first = chance.randrange(size_of(slot))
        size = chance.randint(1, min(size_of(slot) - first, chance.choice([10, PAGE, 1 << 20, 1 << 30])))
        part = drive.part(slot, first, size)
        assert part.nbytes == size
        inner = chance.randrange(size)
        values = noise(chance.randint(1, size - inner), 1000 + number)
        part.write(inner, values)
        expected[slot][first + inner : first + inner + len(values)] = values
        found = torch.zeros(size, dtype=torch.uint8)
        part.read(0, found)
        assert torch.equal(found, expected[slot][first : first + size])
    for slot, values in expected.items():
        into = aligned(size_of(slot))
        drive.read(slot, into)
        assert torch.equal(into, values)
    drive.close()


def test_a_drive_without_room_leaves_nothing(tmp_path: Path) -> None:
    before = open_descriptors()
    with small_drive(tmp_path / "small", 1 << 20), pytest.raises(OSError) as refused:
        Drive(Disk(), tmp_path / "small", POOLS)
    assert refused.value.errno == errno.ENOSPC
    assert open_descriptors() == before


# Of the file of slots: checkpoints and their files are others.
SCRATCH = ".scratch-*"


class FailingCalls(Calls):
    """One of the moves of a lane fails; parts that are filled or saved go by other threads."""

    def __init__(self, operation: str, code: int, number: int) -> None:
        self._operation, self._code, self._left = operation, code, number
        self._lock = threading.Lock()  # protects the count, which the lanes' threads lower

    def _fail(self, operation: str, file: OpenFile) -> None:
        if operation != self._operation or not threading.current_thread().name.startswith("drive"):
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                raise OSError(self._code, os.strerror(self._code), str(file.path))

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._fail("read", file)
        return super().read(file, block, offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._fail("write", file)
        return super().write(file, block, offset)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize(("operation", "move"), [("read", "ssd>host"), ("write", "host>ssd")])
def test_a_drive_that_fails_in_mid_run_ends_it_by_name(tmp_path: Path, operation: str, move: str, code: int) -> None:
    """Once: what was saved is whole, and the run goes on from there bit for bit."""
    whole, cut = Run(tmp_path / "whole", PLAN, Saving(every=1)), Run(tmp_path / "cut", PLAN, Saving(every=1))
    whole.train()
    with pytest.raises(LaneError) as raised:
        cut.train(disk=Disk(FailingCalls(operation, code, number=60)))
    lane = "ssd_read" if operation == "read" else "ssd_write"
    said = str(raised.value)
    assert said.startswith(f"lane {lane}, step ")
    assert f" {move}/" in said
    assert ", unit " in said
    assert f"{os.strerror(code)}: '{tmp_path}/.scratch-" in said
    assert notes_of(raised.value).startswith(f"`runtime resume {cut.folder}` goes on from step-0000000")
    cut.resume()
    check_same(whole, cut)


def test_the_drive_may_be_another_one_after_a_resume_and_none_where_nothing_lies_there(tmp_path: Path) -> None:
    whole, cut = Run(tmp_path / "whole", PLAN, Saving(every=1)), Run(tmp_path / "cut", PLAN, Saving(every=1))
    whole.train()
    cut.train(steps=CUT)
    on_host = planned(tiny_model(vocabulary=256), kernels="fused")
    cut.resume(plan=on_host, ssd=None, steps=CUT + 1)
    (tmp_path / "other").mkdir()
    cut.resume(plan=PLAN, ssd=tmp_path / "other")
    check_same(whole, cut)


def test_a_plan_with_state_on_the_ssd_asks_for_a_folder_with_room(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", PLAN)
    with pytest.raises(ValueError, match=r" of state lie on the ssd; name a folder on that drive with --ssd$"):
        run.train(ssd=None)
    with pytest.raises(ValueError, match=r"^--ssd .*/nowhere: is not a folder; name one on the drive"):
        run.train(ssd=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"^--ssd .* needs .* there, 0 B are free: lacks .*; free some, name a folder on another"
    ):
        run.train(ssd=tmp_path, disk=FaultyDisk(free_bytes=0))
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
