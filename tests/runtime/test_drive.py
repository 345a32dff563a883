"""State on the SSD: what its drive does when it works, is full, fails, or is not there."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from builders import tiny_model
from runtime import rehearsal
from runtime.checkpoints.manifest import Saving
from runtime.lanes import patience, watchdog
from runtime.lanes.backend import CpuBackend
from runtime.lanes.clock import Hung, LaneError
from runtime.lanes.executor import Executor
from runtime.lanes.helpers import held_up
from runtime.memory import drive as drive_module
from runtime.memory.drive import Drive
from runtime.memory.speeds import MEASURED_BYTES, measured_speeds
from runtime.memory.striping import Striping
from runtime.memory.volume import PIECE_BYTES, THREADS, Move
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from saved_runs import CUT, STEPS, Run, check_same, notes_of, planned
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import Dependency, SlotPool, Task, TaskGraph, tier_bytes
from slideplan.placement import TensorClass, Tier
from slideplan.progress import Progress
from storage import DelayedCalls, Fault, FaultyDisk, open_descriptors, small_drive

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
    drive = Drive(FaultyDisk(**disk), [tmp_path], POOLS)
    if not disk.get("direct", True):
        assert drive.buffered == [tmp_path]
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
    drive, chance = Drive(Disk(), [tmp_path], POOLS), random.Random(0)
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
    (tmp_path / "small").mkdir()
    with small_drive(tmp_path / "small", 1 << 20), pytest.raises(OSError) as refused:
        Drive(Disk(), [tmp_path / "small"], POOLS)
    assert refused.value.errno == errno.ENOSPC
    assert open_descriptors() == before


# Of the file of slots: checkpoints and their files are others.
SCRATCH = ".scratch-*"


class Armed(list[Progress]):
    """What a run shows. `on` from the step on in whose midst the lanes are then, and no save."""

    def __init__(self, step: int = 3) -> None:
        self.on = threading.Event()
        self._step = step

    def append(self, shown: Progress) -> None:
        super().append(shown)
        if shown.phase == "training" and shown.done == self._step:
            self.on.set()


class FailingCalls(Calls):
    """The next move of this kind fails, once lanes move slots: with an error; or `short`, from the midst of the slot on."""

    def __init__(self, operation: str, code: int, armed: Armed, short: bool = False) -> None:
        self._operation, self._code, self._armed, self._short = operation, code, armed, short
        self._lock = threading.Lock()  # protects what is left to do, by the drive's threads
        self._half = False

    def _fails(self, operation: str, file: OpenFile, block: memoryview) -> memoryview:
        if operation != self._operation or not self._armed.on.is_set() or not file.path.match(SCRATCH):
            return block
        with self._lock:
            if self._short and not self._half and len(block) > PAGE:
                self._half = True
                return block[:PAGE]
            self._armed.on.clear()
            raise OSError(self._code, os.strerror(self._code), str(file.path))

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        return super().read(file, self._fails("read", file, block), offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        return super().write(file, self._fails("write", file, block), offset)


EVERY = Saving(every=2)


@pytest.mark.parametrize("folders", [1, 2])
@pytest.mark.parametrize("short", [False, True], ids=["at once", "after a short move"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize(("operation", "move"), [("read", "ssd>host"), ("write", "host>ssd")])
def test_a_drive_that_fails_in_mid_run_ends_it_by_name(
    tmp_path: Path, whole: Run, operation: str, move: str, code: int, short: bool, folders: int
) -> None:
    """Once: what was saved is whole, and the run goes on from there bit for bit."""
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()
    ssd = several(tmp_path, folders)
    with pytest.raises(LaneError) as raised:
        cut.train(disk=Disk(FailingCalls(operation, code, armed, short)), ssd=ssd)
    lane = "ssd_read" if operation == "read" else "ssd_write"
    said = str(raised.value)
    assert re.match(rf"lane {lane}, step [234], task \w+ {move}/\w+.*, unit \d: ", said), said
    assert re.search(rf"{os.strerror(code)}: '({'|'.join(map(str, ssd))})/.scratch-\w+'$", said), said
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    cut.resume()
    check_same(whole, cut)


class EndingCalls(Calls):
    """A file that ends in the midst of a slot once lanes read: another program has cut it."""

    def __init__(self, armed: Armed) -> None:
        self._armed = armed

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        if self._armed.on.is_set() and file.path.match(SCRATCH):
            return 0
        return super().read(file, block, offset)


def test_a_read_that_finds_the_end_of_the_file_ends_the_run_by_name(tmp_path: Path, whole: Run) -> None:
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()
    with pytest.raises(LaneError, match=r"^lane ssd_read, step \d, task .*, unit \d: OSError: .* ends at byte \d+ instead of"):
        cut.train(disk=Disk(EndingCalls(armed)))
    cut.resume()
    check_same(whole, cut)


def several(folder: Path, count: int) -> list[Path]:
    found = [folder / f"drive-{number}" for number in range(count)]
    for each in found:
        each.mkdir()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
        run = Run(tmp_path_factory.mktemp("whole") / "whole", PLAN, EVERY)
        run.train()
    return run


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


def named(folder: Path, *names: str) -> list[Path]:
    found = [folder / name for name in names]
    for each in found:
        each.mkdir()
    return found


def test_shares_follow_speeds(tmp_path: Path) -> None:
    """A drive that takes three times as long for a piece gets about a third of what the other one gets."""
    folders = named(tmp_path, "quick", "slow")
    quick, slow = measured_speeds(Disk(DelayedCalls(quick=0.02, slow=0.06)), folders)
    assert 2 < quick / slow < 3.5
    pools = [SlotPool("ssd.moments", Tier.SSD, TensorClass.MOMENTS, 37 * PIECE_BYTES // 4 + PAGE, 30)]
    sizes = Striping(pools, (quick, slow)).sizes
    assert sum(sizes) == pools[0].total_bytes
    assert sizes[0] / sizes[1] == pytest.approx(quick / slow, rel=0.05)


@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 1.0), (5.0, 1.0), (1.0, 7.0, 2.0), (1.0, 1000.0)])
def test_every_byte_has_one_place(speeds: tuple[float, ...]) -> None:
    """On whole pages, and in parts of a MiB at least but for the end of a slot."""
    pools = [
        SlotPool("ssd.small", Tier.SSD, TensorClass.MOMENTS, 3 * PAGE, 5),
        SlotPool("ssd.odd", Tier.SSD, TensorClass.REMAINDER, PIECE_BYTES + PAGE, 7),
        SlotPool("ssd.large", Tier.SSD, TensorClass.MOMENTS, 9 * PIECE_BYTES - PAGE, 6),
    ]
    striping = Striping(pools, speeds)
    taken: list[list[tuple[int, int]]] = [[] for _ in speeds]
    for pool in pools:
        for number in range(pool.count):
            slot = pool.name, number
            assert striping.slot_bytes(slot) == pool.slot_bytes
            place = 0
            for extent in striping.extents(slot, 0, pool.slot_bytes, 1 << 40):
                assert extent.first_byte == place
                assert extent.offset % PAGE == extent.size_bytes % PAGE == 0
                place += extent.size_bytes
                assert extent.size_bytes >= 1 << 20 or place == pool.slot_bytes
                taken[extent.drive].append((extent.offset, extent.size_bytes))
            assert place == pool.slot_bytes
            if pool.name == "ssd.large" and max(speeds) / min(speeds) < 9:
                assert len(striping.extents(slot, 0, pool.slot_bytes, 1 << 40)) == len(speeds), "one slot keeps all busy"
    for drive, size in zip(taken, striping.sizes, strict=True):
        place = 0
        for offset, length in sorted(drive):
            assert offset == place
            place += length
        assert place == size
    total = sum(striping.sizes)
    for speed, size in zip(speeds, striping.sizes, strict=True):
        assert size == pytest.approx(total * speed / sum(speeds), abs=2 << 20)


@pytest.mark.parametrize("speeds", [(1.0, 1.0), (1.0, 3.0, 2.0)])
def test_slots_and_parts_are_the_same_on_several_drives(tmp_path: Path, speeds: tuple[float, ...]) -> None:
    drive = Drive(Disk(), several(tmp_path, len(speeds)), POOLS, speeds)
    chance = random.Random(0)
    expected = {slot: noise(size_of(slot), seed) for seed, slot in enumerate(SLOTS)}
    for seed, slot in enumerate(SLOTS):
        drive.write(slot, filled(slot, seed))
    for number in range(30):
        slot = chance.choice(SLOTS)
        first = chance.randrange(size_of(slot))
        values = noise(chance.randint(1, size_of(slot) - first), 1000 + number)
        drive.part(slot, first, len(values)).write(0, values)
        expected[slot][first : first + len(values)] = values
    for slot, values in expected.items():
        into = aligned(size_of(slot))
        drive.read(slot, into)
        assert torch.equal(into, values)
    assert drive.close()


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


def test_lanes_keep_a_drive_busy_between_slots(tmp_path: Path) -> None:
    """Slots of five pieces, four of which move at a time: one by one each slot would take as long as eight."""
    pool = SlotPool("ssd.moments", Tier.SSD, TensorClass.MOMENTS, 5 * PIECE_BYTES, 12)
    copy = next(task for task in PLAN.graph.tasks if task.lane.kind is LaneKind.SSD_READ)
    tasks = tuple(
        msgspec.structs.replace(copy, name=f"copy {number}", dependencies=(), accesses=(), chunk=number)
        for number in range(pool.count)
    )
    compute = next(task for task in PLAN.graph.tasks if task.lane.kind is LaneKind.COMPUTE)
    last = msgspec.structs.replace(compute, dependencies=(Dependency(task=len(tasks) - 1, distance=0),))
    drive = Drive(Disk(DelayedCalls(**{tmp_path.name: 0.05})), [tmp_path], [pool])
    into = aligned(pool.slot_bytes)

    def handler(task: Task, step: int) -> Move | None:
        return drive.begin("read", [((pool.name, task.chunk), into)]) if task.lane == copy.lane else None

    begun = time.perf_counter()
    list(Executor(TaskGraph(pools=(pool,), tasks=(*tasks, last)), CpuBackend(), handler, 1))
    took_s = time.perf_counter() - begun
    assert drive.close()
    rounds = 5 * pool.count / THREADS
    assert took_s < 1.35 * rounds * 0.05, "1.6 times as long where each slot waits for the one before"


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


class BlockedCalls(Calls):
    """A drive that answers nothing any more once the event is set, until it is let go."""

    def __init__(self, blocked: threading.Event, operation: str) -> None:
        self.let_go, self.reached = threading.Event(), threading.Event()
        self._blocked, self._operation = blocked, operation

    def _pass(self, operation: str, file: OpenFile) -> None:
        if operation == self._operation and file.path.match(SCRATCH) and self._blocked.is_set():
            self.reached.set()
            assert self.let_go.wait(60)

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._pass("read", file)
        return super().read(file, block, offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._pass("write", file)
        return super().write(file, block, offset)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_NS", 100_000_000)
    monkeypatch.setattr(watchdog, "LEAST_PATIENCE_NS", 1_000_000_000)
    monkeypatch.setattr(patience, "PATIENCE_NS", 1_000_000_000)


def check_threads_end(before: set[threading.Thread]) -> None:
    end = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.usefixtures("impatient")
def test_a_drive_that_never_answers_is_not_waited_for_before_the_first_step(tmp_path: Path, operation: str) -> None:
    """Nor where weights are filled in."""
    always, before = threading.Event(), set(threading.enumerate())
    always.set()
    run, held = Run(tmp_path / "run", PLAN), BlockedCalls(always, operation)
    with pytest.raises(Hung, match=rf"^the drive has not answered for 1,.* ms, asked for {tmp_path}/.scratch-\w+$"):
        run.train(disk=Disk(held))
    assert "rehearsing the drive" in [each.phase for each in run.shown]
    assert "training" not in [each.phase for each in run.shown]
    held.let_go.set()
    check_threads_end(before)


@pytest.mark.usefixtures("impatient")
def test_drives_that_never_answer_are_not_measured_for_ever(tmp_path: Path) -> None:
    always, before = threading.Event(), set(threading.enumerate())
    always.set()
    held = BlockedCalls(always, "read")
    with pytest.raises(Hung, match=r"asked for .*/one/.scratch-\w+, .*/other/.scratch-\w+$"):
        measured_speeds(Disk(held), named(tmp_path, "one", "other"))
    held.let_go.set()
    check_threads_end(before)


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.usefixtures("impatient")
def test_a_lane_whose_drive_never_answers_ends_the_run_by_name(tmp_path: Path, whole: Run, operation: str) -> None:
    cut, before = Run(tmp_path / "cut", PLAN, EVERY), set(threading.enumerate())
    cut.shown = armed = Armed()
    held = BlockedCalls(armed.on, operation)
    with pytest.raises(Hung) as raised:
        cut.train(disk=Disk(held))
    said = (
        rf"lane ssd_{operation}, step [234], task .*, unit \d: has not moved for 1,.* ms \(planned: .*\); the drive does not "
    )
    assert re.search(rf"{said}answer, asked for {tmp_path}/.scratch-\w+", str(raised.value))
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    held.let_go.set()
    check_threads_end(before)
    cut.resume()
    check_same(whole, cut)


@pytest.mark.usefixtures("impatient")
def test_a_save_that_copies_from_a_slow_drive_is_waited_for(tmp_path: Path) -> None:
    """As long as the drive answers; so is the rest that comes through parts."""
    run = Run(tmp_path / "run", PLAN)
    run.shown = armed = Armed(1)
    run.train(steps=1, ssd=named(tmp_path, "one"), disk=Disk(DelayedCalls(armed.on, one=0.1)))
    assert float(re.search(r"training paused for ([\d,.]+ (?:s|ms))", run.notes)[1].split()[0].replace(",", "")) > 1.2


@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_interrupt_leaves_lanes_that_the_drive_holds_up(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The second one, that is; the memory that the drive still fills stays, and the page locks of all memory with it."""
    cut, before, closed = Run(tmp_path / "cut", PLAN, EVERY), set(threading.enumerate()), []
    monkeypatch.setattr(CpuBackend, "close", closed.append)
    cut.shown = armed = Armed()
    held = BlockedCalls(armed.on, operation)

    def interrupt() -> None:
        assert held.reached.wait(60)
        time.sleep(0.3)
        for _ in range(2):  # the first one waits for the end of the step
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    user = threading.Thread(target=interrupt)
    user.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        cut.train(disk=Disk(held))
    user.join()
    assert not closed
    assert held_up()
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    held.let_go.set()
    check_threads_end(before)
    monkeypatch.undo()
    cut.resume()
    check_same(whole, cut)


# Real filesystems that are small: a tmpfs, mounted by root, or an ext4 in a file.
NEED = tier_bytes(PLAN.graph.pools, Tier.SSD)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    with contextlib.ExitStack() as stack:

        def mounted(size_bytes: int) -> Path:
            folder = tmp_path / f"small-{size_bytes}"
            folder.mkdir()
            stack.enter_context(small_drive(folder, size_bytes))
            return folder

        yield mounted


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


def test_a_filesystem_that_promises_no_room_and_fills_in_mid_run_ends_the_run(
    tmp_path: Path, small: Callable[[int], Path], whole: Run
) -> None:
    """What is written there fails by name; the checkpoint is whole, and the run goes on once there is room."""
    folder = small(NEED + (2 << 20))
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()

    class Promising(Calls):
        """Writes no block twice, as some filesystems do: another program takes what is given back."""

        def allocate(self, file: OpenFile, size_bytes: int) -> None:
            pass

        def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
            if armed.on.is_set() and file.path.match(SCRATCH):
                size = os.fstat(file.descriptor).st_size
                os.ftruncate(file.descriptor, offset)
                os.ftruncate(file.descriptor, size)
                with contextlib.suppress(OSError), (folder / "others").open("ab", buffering=0) as others:
                    while others.write(bytes(PAGE)):
                        pass
            return super().write(file, block, offset)

    with pytest.raises(LaneError, match=rf"^lane ssd_write, step \d, task .*, unit \d: .*No space left.*'{folder}/.scratch-"):
        cut.train(ssd=[folder], disk=Disk(Promising()))
    (folder / "others").unlink()
    cut.resume(ssd=[folder])
    check_same(whole, cut)
