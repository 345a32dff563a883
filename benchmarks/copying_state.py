"""How fast state is copied out of its slots and hashed, by how many threads: what training waits for where a host has room.

    python benchmarks/copying_state.py -o OUT.json [--model llama-3.1-8b] [--threads 4 8 16 32]

Takes twice a checkpoint of memory: state, and a ring that holds all of it. Nothing is written: the drive is left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from planner.catalogue.models import find_model
from runtime.checkpoints import writing
from runtime.checkpoints.staging import Staging
from runtime.checkpoints.writing import FileWrites, ShardFile
from runtime.lanes.backend import CpuBackend
from runtime.memory.host_memory import host_buffer
from runtime.memory.parts import MemoryPart
from runtime.state import StoredTensor
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.machine.host import usable_cores
from slideplan.model import ModelSpec
from slideplan.saving import BLOCK_BYTES, unit_weights_bytes

REMAINDER_AND_MOMENTS_BYTES = 10  # of a parameter


class NoDrive(Calls):
    """Takes everything at once, and keeps nothing."""

    def allocate(self, file: OpenFile, size_bytes: int) -> None:
        pass

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        return len(block)

    def truncate(self, file: OpenFile, size_bytes: int) -> None:
        pass


def state_of(model: ModelSpec) -> list[ShardFile]:
    """Files of a checkpoint in sizes of this model, over memory that holds nothing."""
    sizes = {}
    for unit in range(model.units):
        sizes[f"model-{unit}"] = unit_weights_bytes(model, unit)
        sizes[f"optimizer-{unit}"] = REMAINDER_AND_MOMENTS_BYTES * model.flat_elements(model.role(unit))
    arena = host_buffer(sum(sizes.values()))
    parts = dict(zip(sizes, arena.split(list(sizes.values())), strict=True))
    return [ShardFile(name, [StoredTensor("state", "U8", (len(part),), [MemoryPart(part)])]) for name, part in parts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", dest="out", type=Path, required=True)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=2)
    wanted = parser.parse_args()
    shards = state_of(find_model(wanted.model))
    size_bytes = sum(part.nbytes for shard in shards for tensor in shard.tensors for part in tensor.parts)
    backend = CpuBackend()
    staging = Staging(backend, size_bytes + len(shards) * BLOCK_BYTES, page_locked=False)
    found = []
    for _ in range(wanted.rounds):
        for threads in wanted.threads:
            writing.copiers = lambda _, threads=threads: threads
            with tempfile.TemporaryDirectory() as folder:
                writes = FileWrites(
                    Disk(NoDrive()), Path(folder), shards, staging, backend, lambda _: None, writing.require_finite
                )
                started = time.perf_counter()
                writes.start().copied()
                seconds = time.perf_counter() - started
                writes.finish()
            found.append({"threads": threads, "seconds": seconds, "bytes_per_s": size_bytes / seconds})
            print(json.dumps(found[-1]), flush=True)
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": usable_cores(),
        "versions": {"slideplan": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "checkpoint_bytes": size_bytes,
        "rows": found,
    }
    wanted.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
