"""Slots on drives: where they lie, that they hold what was written, and that lanes keep drives busy."""

from __future__ import annotations

import errno
import gc
import random
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from drives import PAGE, PLAN, aligned, named, several
from runtime.lanes.backend import CpuBackend
from runtime.lanes.executor import Executor
from runtime.memory.drive import Drive
from runtime.memory.speeds import measured_speeds
from runtime.memory.striping import Striping
from runtime.memory.volume import PIECE_BYTES, THREADS, Move
from runtime.storage.disk import Disk
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import Dependency, SlotPool, Task, TaskGraph
from slideplan.placement import TensorClass, Tier
from storage import DelayedCalls, FaultyDisk, open_descriptors, small_drive

POOLS = [
    SlotPool("ssd.moments.passing", Tier.SSD, TensorClass.MOMENTS, 3 * PAGE, 5),
    SlotPool("ssd.remainder.passing", Tier.SSD, TensorClass.REMAINDER, PIECE_BYTES + PAGE, 2),
]


SLOTS = [(pool.name, number) for pool in POOLS for number in range(pool.count)]


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


def test_a_drive_that_nobody_has_any_more_ends_its_threads(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    drive = Drive(Disk(), [tmp_path], POOLS)
    drive.read(SLOTS[0], aligned(size_of(SLOTS[0])))
    assert len(set(threading.enumerate()) - before) == 2 * THREADS
    del drive
    gc.collect()
    end = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end
        time.sleep(0.01)


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
