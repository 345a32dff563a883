"""Is host memory as fast for every process, everywhere in it, at all times?

    python benchmarks/host_placement.py -o placement.json

One process after the other takes as much memory as asked, in blocks, and updates them in turn (AdamW, 15 of 16 threads, say),
twice for some seconds; a process that lives all the while updates its own block before, between and after. What moves
with it is time; what differs from it, and stays, is place. Between the blocks of a process it is place alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ELEMENTS = 100_000_000  # of a block
STATE_BYTES, TRAFFIC_BYTES = 14, 26  # an element
GIGABYTES = (10, 40, 90, 40, 10, 90, 3, 40, 70)
SECONDS, REFERENCE_SECONDS = 1.5, 0.8


def worker(threads: int) -> None:
    """Takes memory and updates it as it is told, line by line."""
    import torch  # noqa: PLC0415 - the asking process needs none

    from runtime.memory.host_memory import host_buffer  # noqa: PLC0415
    from runtime.optimizer.adamw import HostUpdate, Rehearsal  # noqa: PLC0415

    update = HostUpdate(threads)
    update.compile()
    blocks: list[Any] = []
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        what, much = line.split()
        if what == "take":
            for _ in range(max(1, round(float(much) * 1e9 / (STATE_BYTES * ELEMENTS)))):
                weights, gradient = (host_buffer(2 * ELEMENTS).view(torch.bfloat16) for _ in range(2))
                remainder = host_buffer(2 * ELEMENTS).view(torch.int16)
                blocks.append((weights, remainder, host_buffer(8 * ELEMENTS).view(torch.float32).view(2, -1), gradient))
            print(json.dumps(len(blocks)), flush=True)
        else:
            found: list[list[float]] = [[] for _ in blocks]
            end, turn = time.time() + float(much), 0
            while time.time() < end or turn < len(blocks):
                started = time.perf_counter()
                update(*blocks[turn % len(blocks)], Rehearsal(), 0)
                found[turn % len(blocks)].append(TRAFFIC_BYTES * ELEMENTS / (time.perf_counter() - started) / 1e9)
                turn += 1
            print(json.dumps([statistics.harmonic_mean(rates) for rates in found]), flush=True)


class Worker:
    """A process that is ready to take memory."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", "--threads", str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, what: str, much: float) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {much}\n")
        self._process.stdin.flush()
        return self.answer()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gigabytes", nargs="+", type=float, default=GIGABYTES, help="that processes take, one after the other"
    )
    parser.add_argument("--threads", type=int, default=15)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    if options.worker:
        worker(options.threads)
        return
    started = time.time()
    reference, *workers = (Worker(options.threads) for _ in range(len(options.gigabytes) + 1))
    for each in (reference, *workers):
        each.answer()
    reference.ask("take", 0)
    rows = []
    for gigabytes, process in zip(options.gigabytes, workers, strict=True):
        beside = [reference.ask("update", REFERENCE_SECONDS)[0]]
        process.ask("take", gigabytes)
        blocks = []
        for _ in range(2):
            blocks.append(process.ask("update", SECONDS))
            beside += reference.ask("update", REFERENCE_SECONDS)
        process.end()
        rows.append({
            "after_s": round(time.time() - started, 1), "gigabytes": gigabytes,
            "reference_gb_per_s": [round(rate, 1) for rate in beside],
            "mean_gb_per_s": [round(statistics.harmonic_mean(rates), 1) for rates in blocks],
            "blocks_gb_per_s": [[round(rate, 1) for rate in rates] for rates in blocks],
        })  # fmt: skip
        print({name: value for name, value in rows[-1].items() if name != "blocks_gb_per_s"}, flush=True)
    reference.end()
    if options.output:
        result = {"cpu": platform.processor(), "threads": options.threads, "command": " ".join(sys.argv), "rows": rows}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
