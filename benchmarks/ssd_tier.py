"""Training with state on the SSD, against the drive alone: rates of the same file at the same depth, step and memory planned.

    python benchmarks/ssd_tier.py PLAN FOLDER -o OUT.json [--steps 4] [--raw-gib 24]

PLAN has state on the SSD. FOLDER is on the drive. The file that the plan wants is written, read, and both at once, slot
by slot as lanes do it; then the plan is run; then the file is read and written once more. Drives slow down when they are
busy for longer: what the run's drive moves is held against the rate of both directions at once before and after.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from runtime.memory.drive import Drive
from runtime.memory.host_memory import host_buffer
from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.codec import load
from slideplan.graph.tasks import TaskGraph
from slideplan.measurement import Measurement
from slideplan.placement import Tier
from slideplan.plan import Plan

Move = Callable[[tuple[str, int], torch.Tensor], None]
Rates = dict[str, list[float]]  # bytes/s, SAMPLES one after the other
SAMPLES = 8


def timed(move: Move, slots: list[tuple[str, int]], slot_bytes: int, until_bytes: int) -> list[float]:
    """Bytes/s of moves of slots in turn, over each of SAMPLES parts."""
    memory, found, places = host_buffer(slot_bytes), [], itertools.cycle(slots)
    for _ in range(SAMPLES):
        moved, started = 0, time.perf_counter()
        while moved < until_bytes / SAMPLES:
            move(next(places), memory)
            moved += slot_bytes
        found.append(moved / (time.perf_counter() - started))
    return found


def raw(graph: TaskGraph, folder: Path, until_bytes: int, apart: bool) -> Rates:
    """Rates of the drive alone, through the class that runs use: both directions at once, and before that each `apart`."""
    drive = Drive.for_graph(Disk(), [folder], graph)
    assert drive is not None, "the plan has state on the SSD"
    pool = max((pool for pool in graph.pools if pool.tier is Tier.SSD), key=lambda pool: pool.total_bytes)
    slots = [(pool.name, number) for number in range(pool.count)]
    found: Rates = {}
    if apart:
        found["write"] = timed(drive.write, slots, pool.slot_bytes, until_bytes)
        found["read"] = timed(drive.read, slots, pool.slot_bytes, until_bytes)

    def move(name: str, how: Move, half: list[tuple[str, int]]) -> None:
        found[name] = timed(how, half, pool.slot_bytes, until_bytes)

    threads = [
        threading.Thread(target=move, args=("write beside read", drive.write, slots[: len(slots) // 2])),
        threading.Thread(target=move, args=("read beside write", drive.read, slots[len(slots) // 2 :])),
    ]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found["both"] = [2 * until_bytes / (time.perf_counter() - started)]
    drive.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--raw-gib", type=int, default=24)
    wanted = parser.parse_args()
    plan = load(wanted.plan, Plan)
    wear = plan.prediction.drive
    assert wear is not None, "the plan has state on the SSD"
    bytes_per_step = {"ssd_read": wear.read_bytes, "ssd_write": wear.write_bytes}
    before = raw(plan.graph, wanted.folder, wanted.raw_gib << 30, apart=True)
    print(json.dumps(before), flush=True)
    run = wanted.folder / "run"
    command = [
        "execute",
        str(wanted.plan),
        "--steps",
        str(wanted.steps),
        "--no-save",
        "--ssd",
        str(wanted.folder),
        "-o",
        str(run),
    ]
    subprocess.run([sys.executable, "-m", "runtime", *command, "--warmup", "1"], check=True, stdout=subprocess.DEVNULL)
    measured = load(run / "measurement.json", Measurement)
    after = raw(plan.graph, wanted.folder, wanted.raw_gib << 30, apart=False)
    steady = [measured.step_ns[step - measured.first_step] for step in measured.steady_steps]
    step_s = sorted(steady)[len(steady) // 2] / 1e9
    found = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"slideplan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "raw_bytes_per_s": {"before": before, "after": after},
        "ssd_bytes": sum(pool.total_bytes for pool in plan.graph.pools if pool.tier is Tier.SSD),
        "bytes_per_step": bytes_per_step,
        "step_s": step_s,
        "planned_step_s": plan.prediction.record.step_ns / 1e9,
        "all_steps_s": [each / 1e9 for each in measured.step_ns],
        "drive_bytes_per_s": sum(bytes_per_step.values()) / step_s,
        "peak_bytes": {str(tier): size for tier, size in measured.record.peak_bytes.items()},
        "planned_bytes": {str(tier): size for tier, size in plan.ledger.peak_bytes().items()},
        "losses": list(measured.losses),
    }
    found["of_raw"] = {
        name: found["drive_bytes_per_s"] / rates["both"][0] for name, rates in (("before", before), ("after", after))
    }
    print(json.dumps(found), flush=True)
    wanted.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
