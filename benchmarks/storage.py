"""How fast files are written and read for keeps, beside a bare loop of os.pwritev and os.preadv on the same drive.

    python benchmarks/storage.py --folder /mnt/nvme --gib 8 -o storage.json
    python benchmarks/storage.py --gib 0.25 --threads 1,2 --blocks 1,8 --rounds 3

Each round does all in turn, in the same process: `Disk` writes a new file, the loop writes over that file, by direct I/O
and with an fsync like `Disk`, then writes a new file of its own; then both read it. Rates are medians over rounds. "share"
is the rate of `Disk` to that of each loop. Writing over a file takes no new room from the drive: on a virtual drive that
finds its room as it is written this is far faster, and no new file can be written at that rate.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import mmap
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.machine.host import cpu_name, usable_cores
from slideplan.quantities import format_bytes

MIB = 1 << 20
THREADS, BLOCKS_MIB = (1, 2, 4, 8), (1, 4, 8, 16)
Move = Callable[[memoryview, int], object]


class Blocks:
    """A file's blocks, moved by threads that take them as they come free, each with memory of its own."""

    def __init__(self, threads: int, block_bytes: int, size_bytes: int) -> None:
        self._offsets = range(0, size_bytes, block_bytes)
        self._memory = [memoryview(mmap.mmap(-1, block_bytes)) for _ in range(threads)]
        for memory in self._memory:
            memory[:] = os.urandom(block_bytes)  # some drives compress
        self._pool = ThreadPoolExecutor(threads)

    def __call__(self, move: Move) -> None:
        left = iter(self._offsets)  # one thread at a time takes from it: `next` of a range's iterator is atomic

        def work(memory: memoryview) -> None:
            for offset in left:
                move(memory, offset)

        list(self._pool.map(work, self._memory))

    def close(self) -> None:
        self._pool.shutdown()


@contextlib.contextmanager
def direct(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def disk_writes(disk: Disk, path: Path, size_bytes: int, blocks: Blocks) -> None:
    writer = disk.create(path, size_bytes)
    try:
        blocks(writer.write)
        writer.finish()
    finally:
        writer.abandon()


def disk_reads(disk: Disk, path: Path, blocks: Blocks) -> None:
    with disk.open(path) as reader:
        blocks(reader.read)


def loop_writes(path: Path, blocks: Blocks, new_bytes: int = 0) -> None:
    with direct(path, os.O_WRONLY | (os.O_CREAT | os.O_EXCL if new_bytes else 0)) as descriptor:
        if new_bytes:
            os.posix_fallocate(descriptor, 0, new_bytes)
        blocks(lambda memory, offset: os.pwritev(descriptor, [memory], offset))
        os.fsync(descriptor)


def loop_reads(path: Path, blocks: Blocks) -> None:
    with direct(path, os.O_RDONLY) as descriptor:
        blocks(lambda memory, offset: os.preadv(descriptor, [memory], offset))


def measured(folder: Path, size_bytes: int, threads: int, block_bytes: int, rounds: int) -> dict[str, Any]:
    disk, blocks = Disk(), Blocks(threads, block_bytes, size_bytes)
    ours, theirs = folder / f"slideplan-{os.getpid()}", folder / f"slideplan-{os.getpid()}-loop"
    actions: dict[str, Callable[[], None]] = {
        "write": lambda: disk_writes(disk, ours, size_bytes, blocks),
        "write, loop over a file": lambda: loop_writes(ours, blocks),
        "write, loop into a new file": lambda: loop_writes(theirs, blocks, size_bytes),
        "read": lambda: disk_reads(disk, ours, blocks),
        "read, loop": lambda: loop_reads(ours, blocks),
    }
    rates: dict[str, list[float]] = {name: [] for name in actions}
    try:
        for _ in range(rounds):
            for name, action in actions.items():
                started = time.perf_counter()
                action()
                rates[name].append(size_bytes / (time.perf_counter() - started) / 1e9)
            disk.remove_file(ours)
            disk.remove_file(theirs)
    finally:
        for path in (ours, theirs):
            path.unlink(missing_ok=True)
        blocks.close()
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "threads": threads, "block_mib": block_bytes // MIB,
        "gb_per_s": {name: round(rate, 3) for name, rate in median.items()},
        "gb_per_s_lowest_highest": {name: [round(min(values), 3), round(max(values), 3)] for name, values in rates.items()},
        "share": {name: round(median[name.split(",")[0]] / rate, 3) for name, rate in median.items() if "loop" in name},
    }  # fmt: skip


def drive(folder: Path) -> dict[str, str]:
    """The device and the filesystem below a folder, as far as the system says."""
    command = ["findmnt", "--noheadings", "--raw", "--output", "SOURCE,FSTYPE", "--target", str(folder)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return {}
    source, filesystem = found[:2]
    model = Path("/sys/class/block") / Path(source).name / "device" / "model"
    name = model.read_text().strip() if model.exists() else ""
    return {"source": source, "filesystem": filesystem, "model": name}


def numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of at least 1, with commas between them")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the drive to be measured; default: this one")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file")
    parser.add_argument("--threads", type=numbers, default=THREADS, help="how many at once: 1,2,4,8")
    parser.add_argument("--blocks", type=numbers, default=BLOCKS_MIB, help="in MiB: 1,4,8,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    # Whole blocks of every size: the loop knows no others.
    largest = max(options.blocks) * MIB
    size_bytes = int(options.gib * (1 << 30)) // largest * largest
    if not size_bytes or options.rounds < 1 or any(size_bytes % (block * MIB) for block in options.blocks):
        parser.error("--gib must hold whole blocks of every size, and --rounds must be at least 1")
    disk = Disk()
    if (free := disk.free_bytes(options.folder)) < 2 * size_bytes:
        parser.error(f"--folder {options.folder}: {format_bytes(free)} are free, two files take {format_bytes(2 * size_bytes)}")
    probe = disk.create(options.folder / f"slideplan-{os.getpid()}-probe", 0)
    probe.abandon()
    disk.remove_file(probe.path)
    if not probe.direct:
        parser.error(f"--folder {options.folder}: its filesystem refuses direct I/O, which is what is measured here")
    result: dict[str, Any] = {
        "device": cpu_name(), "cores": usable_cores(), "drive": drive(options.folder),
        "slideplan": __version__, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "kernel": platform.release()},
        "command": " ".join(sys.argv), "size_bytes": size_bytes, "rounds": options.rounds, "results": [],
    }  # fmt: skip
    for block, threads in product(options.blocks, options.threads):
        found = measured(options.folder, size_bytes, threads, block * MIB, options.rounds)
        print(json.dumps(found), file=sys.stderr, flush=True)
        result["results"].append(found)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
