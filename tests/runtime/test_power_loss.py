"""The model of power losses loses what it may and keeps what it must, and so finds programs that sync too little."""

import mmap
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.storage.disk import Disk
from runtime.storage.files import ALIGN_BYTES
from storage import SECTOR_BYTES, CrashingDisk, PowerLoss, open_descriptors, power_losses

SEEDS = range(60)
PAGE = ALIGN_BYTES


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder with None, by their names from here."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


def outcomes(disk: CrashingDisk, scratch: Path, seeds=SEEDS) -> list[dict[str, bytes | None]]:
    """What is left, by seed."""
    found = []
    for seed in seeds:
        target = scratch / f"left-{len(list(scratch.iterdir()))}"
        disk.after_power_loss(seed, target)
        found.append(contents(target))
    return found


def outcome_of(tmp_path: Path, folder: Path, act: Callable[[Disk], object]) -> list[dict[str, bytes | None]]:
    disk = CrashingDisk(folder)
    act(disk)
    return outcomes(disk, tmp_path)


def large(disk: Disk, path: Path, content: bytes, sync: bool = True, threads: int = 1) -> None:
    """A large file in blocks of one page."""
    memory = memoryview(mmap.mmap(-1, max(1, len(content))))
    memory[: len(content)] = content
    writer = disk.create(path, len(content))
    try:
        with ThreadPoolExecutor(threads) as pool:
            ends = [(start, min(start + PAGE, len(content))) for start in range(0, len(content), PAGE)]
            list(pool.map(lambda block: writer.write(memory[block[0] : block[1]], block[0]), ends))
        if sync:
            writer.finish()
    finally:
        writer.abandon()


def test_without_syncs_everything_may_be_lost_and_may_be_there(tmp_path, folder):
    content = b"\xff" * 10 * PAGE
    found = outcome_of(tmp_path, folder, lambda disk: large(disk, folder / "file", content, sync=False))
    assert found[0] == {}
    assert found[1] == {"file": content}
    assert {} in found[2:]
    partial = [left["file"] for left in found[2:] if left and left["file"] != content]
    sectors = {left[start : start + SECTOR_BYTES] for left in partial for start in range(0, len(left), SECTOR_BYTES)}
    assert {bytes(SECTOR_BYTES), content[:SECTOR_BYTES]} < sectors, "old, new, and garbage"
    # Torn between the sectors of one write, and in any order.
    assert any(len({left[s] for s in range(0, PAGE, SECTOR_BYTES)}) > 1 for left in partial)
    pages = [[left[start : start + PAGE] for start in range(0, len(left), PAGE)] for left in partial]
    assert any(bytes(PAGE) in left[: left.index(content[:PAGE])] for left in pages if content[:PAGE] in left)
    assert len({len(left) for left in partial}) > 1, "the length may be lost"


def test_a_file_is_safe_with_its_sync_and_its_name_with_the_folder(tmp_path, folder):
    content = bytes(range(256)) * 50 + b"tail"
    for write in (lambda disk, path: disk.write(path, content), lambda disk, path: large(disk, path, content, threads=3)):
        (before := tmp_path / f"before-{len(list(tmp_path.iterdir()))}").mkdir()
        disk = CrashingDisk(before)
        write(disk, before / "file")
        found = outcomes(disk, tmp_path)
        assert {} in found
        assert {"file": content} in found
        assert all(left in ({}, {"file": content}) for left in found)
        disk.sync_folder(before)
        assert all(left == {"file": content} for left in outcomes(disk, tmp_path))


def test_a_folder_is_safe_with_its_parent_and_not_what_is_in_it(tmp_path, folder):
    def act(disk: Disk) -> None:
        disk.make_folder(folder / "new")
        disk.write(folder / "new" / "file", b"content")
        disk.sync_folder(folder)

    found = outcome_of(tmp_path, folder, act)
    assert all(left in ({"new": None}, {"new": None, "new/file": b"content"}) for left in found)
    assert found[0] != found[1]

    other = tmp_path / "other"
    other.mkdir()

    def only_within(disk: Disk) -> None:
        disk.make_folder(other / "new")
        disk.write(other / "new" / "file", b"content")
        disk.sync_folder(other / "new")

    found = outcome_of(tmp_path, other, only_within)
    assert all(left in ({}, {"new": None, "new/file": b"content"}) for left in found)
    assert found[0] != found[1]


def test_a_rename_shows_either_name_until_its_folder_is_synced(tmp_path, folder):
    (folder / "old").write_bytes(b"content")
    disk = CrashingDisk(folder)
    disk.rename(folder / "old", folder / "new")
    found = outcomes(disk, tmp_path)
    assert {"old": b"content"} in found
    assert {"new": b"content"} in found
    assert all(left in ({"old": b"content"}, {"new": b"content"}) for left in found)
    disk.sync_folder(folder)
    assert all(left == {"new": b"content"} for left in outcomes(disk, tmp_path))


def test_a_rename_to_another_folder_may_lose_both_names_or_leave_both(tmp_path, folder):
    for name in ("a", "b"):
        (folder / name).mkdir()
    (folder / "a" / "file").write_bytes(b"content")
    disk = CrashingDisk(folder)
    disk.rename(folder / "a" / "file", folder / "b" / "file")
    counts = {len(left) - 2 for left in outcomes(disk, tmp_path)}
    assert counts == {0, 1, 2}
    disk.sync_folder(folder / "b")
    assert {len(left) - 2 for left in outcomes(disk, tmp_path)} == {1, 2}
    disk.sync_folder(folder / "a")
    assert all(left == {"a": None, "b": None, "b/file": b"content"} for left in outcomes(disk, tmp_path))


def test_removals_come_before_what_they_follow(tmp_path, folder):
    """What was renamed without a sync may be lost, though what was removed after it is gone."""
    (folder / "old").write_bytes(b"old")
    (folder / "new.tmp").write_bytes(b"new")
    found = outcome_of(
        tmp_path, folder, lambda disk: (disk.rename(folder / "new.tmp", folder / "new"), disk.remove_file(folder / "old"))
    )
    assert {"new.tmp": b"new"} in found

    (folder / "full").mkdir()
    (folder / "full" / "a").touch()
    (folder / "full" / "b").touch()
    left = outcome_of(tmp_path, folder, lambda disk: disk.remove_folder(folder / "full"))
    names = {tuple(name for name in each if name.startswith("full")) for each in left}
    assert {(), ("full",), ("full", "full/a"), ("full", "full/b"), ("full", "full/a", "full/b")} == names


def test_logs_lose_lines_but_not_those_that_were_synced(tmp_path, folder):
    def act(disk: Disk) -> None:
        with disk.open_log(folder / "log", 0) as log:
            log.append(b"one\n")
            log.sync()
            disk.sync_folder(folder)
            log.append(b"two\n")
            log.append(b"three\n")

    found = {left["log"] for left in outcome_of(tmp_path, folder, act)}
    assert all(left.startswith(b"one\n") for left in found)
    assert {b"one\n", b"one\ntwo\n", b"one\ntwo\nthree\n"} < found
    assert b"one\n\0\0\0\0three\n" in found


def test_a_log_cut_without_a_sync_may_be_as_long_as_before(tmp_path, folder):
    (folder / "log").write_bytes(b"one\ntwo\n")
    disk = CrashingDisk(folder)
    with disk.open_log(folder / "log", 4) as log:
        assert {left["log"] for left in outcomes(disk, tmp_path)} == {b"one\n", b"one\ntwo\n"}
        log.sync()
    assert {left["log"] for left in outcomes(disk, tmp_path)} == {b"one\n"}


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path, folder):
    old, new = b"old" * 3000, b"new" * 2000
    (folder / "file").write_bytes(old)
    found = []
    (scratch := tmp_path / "scratch").mkdir()
    for disk in power_losses(scratch, folder, lambda disk, at: disk.replace(at / "file", new)):
        for left in outcomes(disk, tmp_path, range(8)):
            assert left["file"] in ((old, new) if disk.stopped else (new,))
            found.append(left["file"])
    assert {old, new} == set(found)
    (folder / ".file.new").write_bytes(b"of a process that was killed")
    Disk().replace(folder / "file", new)
    assert contents(folder) == {"file": new}


def test_what_was_there_is_safe(tmp_path, folder):
    (folder / "a").mkdir()
    (folder / "a" / "file").write_bytes(b"content")
    assert all(left == contents(folder) for left in outcome_of(tmp_path, folder, lambda disk: disk.sync_folder(folder)))


def test_when_the_power_is_off_nothing_is_done_any_more(folder):
    before = open_descriptors()
    disk = CrashingDisk(folder, stop_at=4)
    with pytest.raises(PowerLoss):
        large(disk, folder / "file", bytes(5 * PAGE), threads=4)
    assert disk.stopped
    assert open_descriptors() == before
    for act in (
        lambda: disk.write(folder / "other", b""),
        lambda: disk.open(folder / "file"),
        lambda: disk.free_bytes(folder),
        lambda: disk.remove_file(folder / "file"),
    ):
        with pytest.raises(PowerLoss):
            act()
    assert disk.changes == 4


def test_the_last_change_may_have_happened(tmp_path, folder):
    (folder / "old").touch()
    disk = CrashingDisk(folder, stop_at=1)
    with pytest.raises(PowerLoss):
        disk.rename(folder / "old", folder / "new")
    assert (folder / "old").exists()
    assert {tuple(left) for left in outcomes(disk, tmp_path)} == {("old",), ("new",)}


def test_a_sync_that_did_not_return_has_promised_nothing(tmp_path, folder):
    disk = CrashingDisk(folder, stop_at=3)
    with pytest.raises(PowerLoss):
        disk.write(folder / "file", b"content")  # create, write, sync
    lefts = outcomes(disk, tmp_path)
    assert {"file": b""} in lefts
    assert {"file": b"content"} in lefts


def test_seeds_repeat(tmp_path, folder):
    found = outcome_of(tmp_path, folder, lambda disk: large(disk, folder / "file", bytes(range(256)) * 100, sync=False))
    other = tmp_path / "other"
    other.mkdir()
    assert outcome_of(tmp_path, other, lambda disk: large(disk, other / "file", bytes(range(256)) * 100, sync=False)) == found


# Programs that replace what "now" names, as saving does: whole, or not at all.


def careful(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder / "next.tmp")
    large(disk, folder / "next.tmp" / "data", b"new" * 3000)
    disk.write(folder / "next.tmp" / "manifest", b"new")
    disk.sync_folder(folder / "next.tmp")
    disk.rename(folder / "next.tmp", folder / "next")
    disk.sync_folder(folder)
    disk.remove_folder(folder / "now")


def without_the_sync_of_the_data(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder / "next.tmp")
    large(disk, folder / "next.tmp" / "data", b"new" * 3000, sync=False)
    disk.write(folder / "next.tmp" / "manifest", b"new")
    disk.sync_folder(folder / "next.tmp")
    disk.rename(folder / "next.tmp", folder / "next")
    disk.sync_folder(folder)
    disk.remove_folder(folder / "now")


def without_the_sync_of_the_names(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder / "next.tmp")
    large(disk, folder / "next.tmp" / "data", b"new" * 3000)
    disk.write(folder / "next.tmp" / "manifest", b"new")
    disk.rename(folder / "next.tmp", folder / "next")
    disk.sync_folder(folder)
    disk.remove_folder(folder / "now")


def without_the_sync_of_the_rename(disk: Disk, folder: Path) -> None:
    disk.make_folder(folder / "next.tmp")
    large(disk, folder / "next.tmp" / "data", b"new" * 3000)
    disk.write(folder / "next.tmp" / "manifest", b"new")
    disk.sync_folder(folder / "next.tmp")
    disk.rename(folder / "next.tmp", folder / "next")
    disk.remove_folder(folder / "now")


def whole(folder: Path) -> bool:
    """Whether a reader finds what it needs: the new one if it has a manifest, else the old one."""
    for name in ("next", "now"):
        manifest, data = folder / name / "manifest", folder / name / "data"
        if manifest.exists():
            expected = {b"new": b"new" * 3000, b"old": b"old"}.get(manifest.read_bytes())
            return expected is not None and data.exists() and data.read_bytes() == expected
    return False


def losses(tmp_path: Path, program: Callable[[Disk, Path], None]) -> Iterator[bool]:
    """Whether what is left is whole, for every change and some seeds."""
    before = tmp_path / "before"
    (before / "now").mkdir(parents=True)
    for name in ("manifest", "data"):
        (before / "now" / name).write_bytes(b"old")
    (scratch := tmp_path / "scratch").mkdir()
    for disk in power_losses(scratch, before, program):
        for seed in range(12):
            target = tmp_path / f"left-{disk.changes}-{disk.stopped}-{seed}"
            disk.after_power_loss(seed, target)
            yield whole(target)


def test_a_careful_program_loses_nothing(tmp_path):
    found = list(losses(tmp_path, careful))
    assert len(found) > 12 * 15, "every change is one at which the power goes off"
    assert all(found)


@pytest.mark.parametrize(
    "program", [without_the_sync_of_the_data, without_the_sync_of_the_names, without_the_sync_of_the_rename]
)
def test_careless_programs_are_found_out(tmp_path, program):
    assert not all(losses(tmp_path, program))
