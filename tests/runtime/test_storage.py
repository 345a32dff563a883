"""Disk: bytes come back as they were written, whatever the calls below do, and what fails says which file it was."""

import errno
import mmap
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from runtime.storage.calls import Calls
from runtime.storage.disk import Disk
from runtime.storage.files import ALIGN_BYTES, FileReader, FileWriter
from storage import Fault, FaultyDisk, open_descriptors, small_drive

PAGE = ALIGN_BYTES
SHM = Path("/dev/shm")
# Around a page, a sector, a block and nothing.
SIZES = [0, 1, 511, 512, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 5 * PAGE + 77, 40 * PAGE - 5, 40 * PAGE]
BLOCK = 4 * PAGE


@pytest.fixture(autouse=True)
def no_descriptor_left() -> Iterator[None]:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def arena(content: bytes) -> memoryview:
    """Page-aligned memory with this content."""
    memory = memoryview(mmap.mmap(-1, max(1, len(content))))[: len(content)]
    memory[:] = content
    return memory


def content_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def blocks_of(size: int, block: int = BLOCK) -> list[tuple[int, int]]:
    return [(start, min(start + block, size)) for start in range(0, size, block)]


def write(disk: Disk, path: Path, content: bytes, threads: int = 1) -> FileWriter:
    """All blocks, in any order."""
    memory = arena(content)
    writer = disk.create(path, len(content))
    blocks = blocks_of(len(content))
    random.Random(1).shuffle(blocks)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda block: writer.write(memory[block[0] : block[1]], block[0]), blocks))
        writer.finish()
    finally:
        writer.abandon()
    return writer


def read(disk: Disk, path: Path, threads: int = 1) -> bytes:
    with disk.open(path) as reader:
        memory = arena(bytes(reader.size_bytes))
        with ThreadPoolExecutor(threads) as pool:
            blocks = blocks_of(reader.size_bytes)
            list(pool.map(lambda block: reader.read(memory[block[0] : block[1]], block[0]), blocks))
    return bytes(memory)


def raised(code: int, path: Path, action, *arguments) -> OSError:
    with pytest.raises(OSError) as caught:
        action(*arguments)
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert str(path) in str(caught.value)
    return caught.value


DISKS = {
    "direct": Disk,
    "refused": lambda: FaultyDisk(direct=False),
    "granted, then refused": lambda: FaultyDisk(Fault("write", errno.EINVAL), Fault("read", errno.EINVAL)),
    "refused in the midst": lambda: FaultyDisk(Fault("write", errno.EINVAL, number=3), Fault("read", errno.EINVAL, number=3)),
    "a page a call": lambda: FaultyDisk(most_bytes=PAGE),
    "a sector a call": lambda: FaultyDisk(most_bytes=512),
    "some bytes a call": lambda: FaultyDisk(most_bytes=1237),
    "some bytes a call, refused": lambda: FaultyDisk(most_bytes=1237, direct=False),
}


class TestLargeFiles:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("name", DISKS)
    def test_bytes_come_back(self, tmp_path, name, size):
        content, path = content_of(size), tmp_path / "file"
        write(DISKS[name](), path, content)
        assert path.read_bytes() == content
        assert read(DISKS[name](), path) == content

    @pytest.mark.parametrize("name", DISKS)
    def test_by_many_threads(self, tmp_path, name):
        content, path, disk = content_of(300 * PAGE + 99), tmp_path / "file", DISKS[name]()
        write(disk, path, content, threads=8)
        assert path.read_bytes() == content
        assert read(disk, path, threads=8) == content

    @pytest.mark.parametrize("size", SIZES)
    def test_in_memory_filesystems(self, size):
        if not SHM.is_dir():
            pytest.skip("no tmpfs here")
        path = SHM / f"slideplan-test-{os.getpid()}"
        try:
            content = content_of(size)
            write(Disk(), path, content, threads=2)
            assert read(Disk(), path, threads=2) == content
        finally:
            path.unlink()

    def test_says_whether_io_was_direct(self, tmp_path):
        refused = FaultyDisk(direct=False)
        assert not write(refused, tmp_path / "refused", content_of(BLOCK)).direct
        with refused.open(tmp_path / "refused") as reader:
            assert not reader.direct
        empty = write(Disk(), tmp_path / "empty", b"")
        if empty.direct:
            assert write(Disk(), tmp_path / "direct", content_of(BLOCK)).direct
            assert not write(FaultyDisk(Fault("write", errno.EINVAL)), tmp_path / "late", content_of(BLOCK)).direct

    def test_a_tail_keeps_what_lies_behind_the_block(self, tmp_path):
        memory = arena(content_of(2 * PAGE))
        writer = Disk().create(tmp_path / "file", PAGE + 5)
        writer.write(memory[: PAGE + 5], 0)
        writer.finish()
        before = bytes(memory)
        with Disk().open(tmp_path / "file") as reader:
            reader.read(memory[: PAGE + 5], 0)
        assert bytes(memory) == before

    @pytest.mark.parametrize(
        ("size", "start", "end", "offset"),
        [
            (4 * PAGE, 0, PAGE, 512),
            (4 * PAGE, 0, 100, 0),
            (4 * PAGE, 512, 512 + PAGE, 0),
            (4 * PAGE, 0, 2 * PAGE, 3 * PAGE),
            (4 * PAGE, 0, PAGE, -PAGE),
            (PAGE + 9, 0, 10, PAGE),
        ],
    )
    def test_blocks_out_of_line_are_refused_everywhere(self, tmp_path, size, start, end, offset):
        memory = arena(bytes(4 * PAGE))
        path = tmp_path / "file"
        for disk in (Disk(), FaultyDisk(direct=False)):
            writer = disk.create(path, size)
            with pytest.raises(ValueError, match="file: a block"):
                writer.write(memory[start:end], offset)
            writer.finish()
            with disk.open(path) as reader, pytest.raises(ValueError, match="file: a block"):
                reader.read(memory[start:end], offset)
            disk.remove_file(path)

    def test_blocks_of_other_things_than_bytes_are_refused(self, tmp_path):
        writer = Disk().create(tmp_path / "file", 4 * PAGE)
        for block in (arena(bytes(PAGE)).cast("i"), arena(bytes(2 * PAGE))[::2]):
            with pytest.raises(ValueError, match="must be bytes"):
                writer.write(block, 0)
        writer.abandon()

    def test_a_file_that_ends_early_is_named(self, tmp_path):
        path = tmp_path / "file"
        write(Disk(), path, content_of(10 * PAGE))
        for left in (0, 3 * PAGE, 9 * PAGE + 100, 10 * PAGE - 1):
            with Disk().open(path) as reader:
                os.truncate(path, left)
                error = raised(errno.ENODATA, path, reader.read, arena(bytes(10 * PAGE)), 0)
                assert "instead of 40960" in str(error)
            os.truncate(path, 10 * PAGE)

    def test_nothing_is_overwritten(self, tmp_path):
        path, disk = tmp_path / "file", Disk()
        path.write_bytes(b"there")
        raised(errno.EEXIST, path, disk.create, path, PAGE)
        raised(errno.EEXIST, path, disk.write, path, b"new")
        assert path.read_bytes() == b"there"

    def test_a_closed_file_is_refused_and_closing_twice_is_nothing(self, tmp_path):
        writer = Disk().create(tmp_path / "file", PAGE)
        writer.finish()
        for action in (lambda: writer.write(arena(bytes(PAGE)), 0), writer.finish):
            with pytest.raises(ValueError, match="is closed"):
                action()
        writer.abandon()
        reader = Disk().open(tmp_path / "file")
        reader.close()
        reader.close()
        with pytest.raises(ValueError, match="is closed"):
            reader.read(arena(bytes(PAGE)), 0)

    def test_a_file_is_not_closed_under_a_thread_that_writes(self, tmp_path):
        writing, may_go_on = threading.Event(), threading.Event()
        order = []

        class Slow(Calls):
            def write(self, file, block, offset):
                writing.set()
                assert may_go_on.wait(60)
                order.append("written")
                return super().write(file, block, offset)

            def close(self, file):
                order.append("closed")
                super().close(file)

        writer = Disk(Slow()).create(tmp_path / "file", PAGE)
        thread = threading.Thread(target=writer.write, args=(arena(bytes(PAGE)), 0))
        thread.start()
        assert writing.wait(60)
        closing = threading.Thread(target=writer.abandon)
        closing.start()
        time.sleep(0.05)
        may_go_on.set()
        thread.join()
        closing.join()
        assert order == ["written", "closed"]


class TestFaults:
    @pytest.mark.parametrize("operation", ["create", "write", "truncate", "sync", "close"])
    def test_writing(self, tmp_path, operation):
        path = tmp_path / "file"
        disk = FaultyDisk(Fault(operation, errno.EIO))
        raised(errno.EIO, path, write, disk, path, content_of(PAGE + 1))

    @pytest.mark.parametrize("operation", ["create", "write", "sync", "close"])
    def test_writing_small_files(self, tmp_path, operation):
        disk = FaultyDisk(Fault(operation, errno.EIO))
        raised(errno.EIO, tmp_path / "file", disk.write, tmp_path / "file", b"content")

    @pytest.mark.parametrize("operation", ["open", "size_bytes", "read"])
    def test_reading(self, tmp_path, operation):
        path = tmp_path / "file"
        path.write_bytes(content_of(PAGE + 1))
        for action in (read, lambda disk, path: disk.read(path)):
            raised(errno.EIO, path, action, FaultyDisk(Fault(operation, errno.EIO)), path)

    def test_of_many_threads(self, tmp_path):
        path = tmp_path / "file"
        disk = FaultyDisk(Fault("write", errno.EIO, number=20, forever=True))
        raised(errno.EIO, path, write, disk, path, content_of(100 * BLOCK), 8)

    def test_short_small_reads_and_writes(self, tmp_path):
        disk = FaultyDisk(most_bytes=3)
        disk.write(tmp_path / "file", b"some content")
        assert disk.read(tmp_path / "file") == b"some content"
        assert disk.counts["write"] == disk.counts["read"] == 4

    def test_names_and_folders(self, tmp_path):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "file").touch()
        for operation, act in {
            "make_folder": lambda disk: disk.make_folder(tmp_path / "b"),
            "rename": lambda disk: disk.rename(tmp_path / "a", tmp_path / "b"),
            "sync_folder": lambda disk: disk.sync_folder(tmp_path / "a"),
            "entries": lambda disk: disk.remove_folder(tmp_path / "a"),
            "free_bytes": lambda disk: disk.free_bytes(tmp_path / "a"),
        }.items():
            with pytest.raises(OSError, match=str(tmp_path)) as caught:
                act(FaultyDisk(Fault(operation, errno.EROFS)))
            assert caught.value.errno == errno.EROFS
        assert (tmp_path / "a" / "file").exists()
        raised(errno.EIO, tmp_path / "a" / "file", FaultyDisk(Fault("remove_file", errno.EIO)).remove_folder, tmp_path / "a")
        raised(errno.EIO, tmp_path / "a", FaultyDisk(Fault("remove_empty_folder", errno.EIO)).remove_folder, tmp_path / "a")

    def test_faults_are_counted_by_file_and_kind(self, tmp_path):
        disk = FaultyDisk(Fault("create", errno.EIO, number=2, path="*.bin"))
        for name in ("1.bin", "1.json", "2.json"):
            disk.write(tmp_path / name, b"")
        raised(errno.EIO, tmp_path / "2.bin", disk.write, tmp_path / "2.bin", b"")
        disk.write(tmp_path / "3.bin", b"")  # once
        with pytest.raises(ValueError, match="no such operation"):
            FaultyDisk(Fault("wriet", errno.EIO))


class TestFullDrives:
    def test_no_room_is_found_out_before_the_first_block(self, tmp_path):
        drive = tmp_path / "drive"
        drive.mkdir()
        with small_drive(drive, 4 << 20):
            disk = Disk()
            free = disk.free_bytes(drive)
            assert 1 << 20 < free <= 4 << 20
            raised(errno.ENOSPC, drive / "large", disk.create, drive / "large", 8 << 20)
            disk.remove_file(drive / "large")
            write(disk, drive / "fits", content := content_of(1 << 20))
            assert read(disk, drive / "fits") == content

    def test_no_room_for_what_was_not_promised(self, tmp_path):
        drive = tmp_path / "drive"
        drive.mkdir()
        with small_drive(drive, 4 << 20):
            writer = Disk(NoPromises()).create(drive / "large", 8 << 20)
            memory = arena(content_of(8 << 20))
            with pytest.raises(OSError, match=str(drive / "large")) as caught:
                for start, end in blocks_of(8 << 20):
                    writer.write(memory[start:end], start)
                writer.finish()
            assert caught.value.errno == errno.ENOSPC
            writer.abandon()
            Disk().remove_file(drive / "large")
            raised(errno.ENOSPC, drive / "small", Disk().write, drive / "small", content_of(8 << 20))

    def test_a_log_on_a_full_drive_keeps_whole_lines(self, tmp_path):
        drive = tmp_path / "drive"
        drive.mkdir()
        with small_drive(drive, 4 << 20), Disk().open_log(drive / "log", 0) as log:
            line = b"x" * 300_000 + b"\n"
            with pytest.raises(OSError, match="log") as caught:
                for _ in range(40):
                    log.append(line)
            assert caught.value.errno == errno.ENOSPC
            assert log.size_bytes % len(line) == 0
            assert (drive / "log").stat().st_size == log.size_bytes

    def test_files_as_long_as_a_limit(self, tmp_path):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * PAGE, hard))
        try:
            raised(errno.EFBIG, tmp_path / "large", Disk().create, tmp_path / "large", 20 * PAGE)
            writer = Disk(NoPromises()).create(tmp_path / "late", 20 * PAGE)
            raised(errno.EFBIG, tmp_path / "late", writer.write, arena(bytes(20 * PAGE)), 0)
            writer.abandon()
            raised(errno.EFBIG, tmp_path / "small", Disk().write, tmp_path / "small", bytes(20 * PAGE))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class NoPromises(Calls):
    """A filesystem that gives out room as it is written."""

    def allocate(self, file, size_bytes):
        pass


class TestLogs:
    def test_goes_on_where_it_is_told(self, tmp_path):
        path, disk = tmp_path / "log", Disk()
        with disk.open_log(path, 0) as log:
            log.append(b"one\n")
            kept = log.size_bytes
            log.append(b"two\nthree\n")
            log.sync()
        with disk.open_log(path, kept) as log:
            assert path.read_bytes() == b"one\n"
            log.append(b"four\n")
        assert path.read_bytes() == b"one\nfour\n"
        with disk.open_log(path, 0) as log:
            assert path.read_bytes() == b""
            with pytest.raises(ValueError, match="line's end"):
                log.append(b"half")
        with pytest.raises(ValueError, match="is closed"):
            log.append(b"late\n")

    def test_shorter_than_told(self, tmp_path):
        path = tmp_path / "log"
        raised(errno.ENOENT, path, Disk().open_log, path, 4)
        assert not path.exists()
        path.write_bytes(b"one\n")
        raised(errno.ENODATA, path, Disk().open_log, path, 5)
        assert path.read_bytes() == b"one\n"

    def test_a_line_that_fails_is_not_there(self, tmp_path):
        path = tmp_path / "log"
        disk = FaultyDisk(Fault("write", errno.EIO, number=4), most_bytes=3)
        with disk.open_log(path, 0) as log:
            log.append(b"one\n")
            raised(errno.EIO, path, log.append, b"another\n")
            assert path.read_bytes() == b"one\n"
            log.append(b"two\n")
        assert path.read_bytes() == b"one\ntwo\n"


class TestNames:
    def test_folders(self, tmp_path):
        disk = Disk()
        disk.make_folder(tmp_path / "a")
        raised(errno.EEXIST, tmp_path / "a", disk.make_folder, tmp_path / "a")
        raised(errno.ENOENT, tmp_path / "no" / "a", disk.make_folder, tmp_path / "no" / "a")
        disk.write(tmp_path / "a" / "file", b"content")
        disk.make_folder(tmp_path / "a" / "b")
        disk.write(tmp_path / "a" / "b" / "file", b"content")
        disk.sync_folder(tmp_path / "a")
        disk.rename(tmp_path / "a", tmp_path / "c")
        assert disk.read(tmp_path / "c" / "b" / "file") == b"content"
        (tmp_path / "beside").write_bytes(b"stays")
        (tmp_path / "c" / "link").symlink_to(tmp_path)
        disk.remove_folder(tmp_path / "c")
        assert [entry.name for entry in tmp_path.iterdir()] == ["beside"]
        disk.remove_file(tmp_path / "beside")
        raised(errno.ENOENT, tmp_path / "beside", disk.remove_file, tmp_path / "beside")
        raised(errno.ENOENT, tmp_path / "c", disk.remove_folder, tmp_path / "c")
        raised(errno.ENOENT, tmp_path / "c", disk.sync_folder, tmp_path / "c")

    def test_rename_never_replaces(self, tmp_path):
        disk = Disk()
        for name in ("a", "b"):
            disk.write(tmp_path / name, name.encode())
        (tmp_path / "empty").mkdir()
        (tmp_path / "broken").symlink_to("nowhere")
        for target in ("b", "empty", "broken"):
            raised(errno.EEXIST, tmp_path / target, disk.rename, tmp_path / "a", tmp_path / target)
        assert disk.read(tmp_path / "b") == b"b"
        raised(errno.ENOENT, tmp_path / "no", disk.rename, tmp_path / "no", tmp_path / "new")

    def test_free_bytes(self, tmp_path):
        status = os.statvfs(tmp_path)
        assert 0 <= Disk().free_bytes(tmp_path) <= status.f_blocks * status.f_frsize
        assert FaultyDisk(free_bytes=12).free_bytes(tmp_path) == 12
        raised(errno.ENOENT, tmp_path / "no", Disk().free_bytes, tmp_path / "no")


def test_signals_do_not_cut_a_write_short(tmp_path):
    """A handler that returns: the call goes on (PEP 475)."""
    content = content_of(2000 * PAGE)
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        for number in range(5):
            write(Disk(), tmp_path / str(number), content)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all((tmp_path / str(number)).read_bytes() == content for number in range(5))


def test_blocks_of_arrays(tmp_path):
    """Blocks are parts of arenas, which are arrays."""
    array = np.frombuffer(arena(content_of(4 * PAGE)), np.uint8)
    writer = Disk().create(tmp_path / "file", array.nbytes)
    assert isinstance(writer, FileWriter)
    writer.write(memoryview(array), 0)
    writer.finish()
    with Disk().open(tmp_path / "file") as reader:
        assert isinstance(reader, FileReader)
        found = np.frombuffer(arena(bytes(4 * PAGE)), np.uint8)
        reader.read(memoryview(found), 0)
    assert (found == array).all()
