"""The host's AdamW against what its memory allows: a pass over the same arrays with next to no arithmetic.

    python benchmarks/host_update.py --elements 200000000 -o host_update.json
    python benchmarks/host_update.py --processes 4      # in turns with processes whose threads are pinned to cores

Both read split master, both moments and a bf16 gradient and write all but the gradient back, 26 bytes an element
on the same threads, which take chunks of the same size as they come free; in turns in the same process. "adamw,
colliding" is the same update with both moments of an element a multiple of 256 MiB apart, which no unit has: see
COLLIDING_ELEMENTS in slideplan/model.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from runtime.memory.host_memory import host_buffer, placement
from runtime.optimizer.adamw import CHUNK_ELEMENTS, AdamW, HostUpdate, take
from runtime.optimizer.host_lossy import LossyHostUpdate
from runtime.optimizer.lossy import lean_parts
from runtime.optimizer.rounding import Draws
from runtime.probes.buffers import BF16_UPDATE_BYTES
from slideplan import __version__
from slideplan.lowering.sizes import moment_bytes, update_bytes
from slideplan.machine.host import cpu_name, usable_cores
from slideplan.model import ALIGN_ELEMENTS, COLLIDING_ELEMENTS
from slideplan.policy import MOMENTS_OF, StateFormat

PINNED = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}


@numba.njit(nogil=True)
def triad_chunk(high, remainder, m, v, gradient):  # type: ignore[no-untyped-def]
    for i in range(high.size):
        high[i] = high[i] + gradient[i]
        remainder[i] = remainder[i] + np.int16(1)
        m[i] = m[i] + np.float32(1)
        v[i] = v[i] + np.float32(1)


@numba.njit(parallel=True, nogil=True)
def triad(threads, size, taken, high, remainder, m, v, gradient):  # type: ignore[no-untyped-def]
    for _ in numba.prange(threads):
        start = take(taken) * size
        while start < high.size:
            c = slice(start, min(start + size, high.size))
            triad_chunk(high[c], remainder[c], m[c], v[c], gradient[c])
            start = take(taken) * size


@numba.njit(nogil=True)
def lean_chunk(high, codes_m, codes_v, gradient):  # type: ignore[no-untyped-def]
    for i in range(high.size):
        high[i] = high[i] + gradient[i]
        codes_m[i] = codes_m[i] + np.uint8(1)
        codes_v[i] = codes_v[i] + np.uint8(1)


@numba.njit(parallel=True, nogil=True)
def lean_triad(threads, size, taken, high, codes_m, codes_v, gradient):  # type: ignore[no-untyped-def]
    for _ in numba.prange(threads):
        start = take(taken) * size
        while start < high.size:
            c = slice(start, min(start + size, high.size))
            lean_chunk(high[c], codes_m[c], codes_v[c], gradient[c])
            start = take(taken) * size


@numba.njit(nogil=True)
def bf16_chunk(high, remainder, m, v, gradient):  # type: ignore[no-untyped-def]
    for i in range(high.size):
        high[i] = high[i] + gradient[i]
        remainder[i] = remainder[i] + np.int16(1)
        m[i] = m[i] + np.int16(1)
        v[i] = v[i] + np.int16(1)


@numba.njit(parallel=True, nogil=True)
def bf16_triad(threads, size, taken, high, remainder, m, v, gradient):  # type: ignore[no-untyped-def]
    for _ in numba.prange(threads):
        start = take(taken) * size
        while start < high.size:
            c = slice(start, min(start + size, high.size))
            bf16_chunk(high[c], remainder[c], m[c], v[c], gradient[c])
            start = take(taken) * size


def bytes_per_s(action: Callable[[], object], moved_bytes: int) -> float:
    started = time.perf_counter()
    action()
    return moved_bytes / (time.perf_counter() - started)


def measured(n: int, threads: int, rounds: int) -> dict[str, Any]:
    weights, gradient = (host_buffer(2 * n).view(torch.bfloat16).normal_() for _ in range(2))
    remainder = host_buffer(2 * n).view(torch.int16)
    apart = -(-n // COLLIDING_ELEMENTS) * COLLIDING_ELEMENTS
    both = host_buffer(4 * (apart + ALIGN_ELEMENTS + n)).view(torch.float32)
    moments, colliding = (both.as_strided((2, n), (distance, 1)) for distance in (apart + ALIGN_ELEMENTS, apart))
    update, settings = HostUpdate(threads), AdamW()
    raw = [each.view(torch.int16).numpy() for each in (weights, gradient)]
    arrays = raw[0], remainder.numpy(), moments[0].numpy(), moments[1].numpy(), raw[1]
    actions = {
        "triad": lambda: triad(update.threads, CHUNK_ELEMENTS, np.zeros(1, np.int64), *arrays),
        "adamw": lambda: update(weights, remainder, moments, gradient, settings, 1),
        "adamw, colliding": lambda: update(weights, remainder, colliding, gradient, settings, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 2):
        for name, action in actions.items():
            numba.set_num_threads(update.threads)
            # What the triad leaves would be subnormal or huge, which is slow or endless.
            for each, value in ((gradient, 0.5), (weights, 0.25), (both, 1e-3)):
                each.fill_(value)
            rates[name].append(bytes_per_s(action, BF16_UPDATE_BYTES * n) / 1e9)
    gb_per_s = {name: np.percentile(values[2:], (10, 50, 90)).round(1).tolist() for name, values in rates.items()}
    return {
        "threads": update.threads, "gb_per_s_p10_p50_p90": gb_per_s,
        "adamw_of_triad": round(gb_per_s["adamw"][1] / gb_per_s["triad"][1], 3),
    }  # fmt: skip


def measured_lossy(state: StateFormat, n: int, threads: int, rounds: int) -> dict[str, Any]:
    """AdamW over state in a lossy format, and a triad of the same bytes."""
    weights, gradient = (host_buffer(2 * n).view(torch.bfloat16).normal_() for _ in range(2))
    remainder = None if state == "lean" else host_buffer(2 * n).view(torch.int16)
    moments = host_buffer(moment_bytes(n, MOMENTS_OF[state]))
    high, of_gradient = (each.view(torch.int16).numpy() for each in (weights, gradient))
    if remainder is None:
        loop, arrays = lean_triad, (high, *lean_parts(moments, n)[0].numpy(), of_gradient)
    else:
        moments = moments.view(torch.bfloat16).view(2, n)
        loop, arrays = bf16_triad, (high, remainder.numpy(), *moments.view(torch.int16).numpy(), of_gradient)
    update, moved_bytes = LossyHostUpdate(HostUpdate(threads)), update_bytes(n, "split", state, "bf16")
    actions = {
        "triad": lambda: loop(update.threads, CHUNK_ELEMENTS, np.zeros(1, np.int64), *arrays),
        "adamw": lambda: update(weights, remainder, moments, gradient, AdamW(), 1, Draws(1)),
    }
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 2):
        for name, action in actions.items():
            numba.set_num_threads(update.threads)
            for each, value in ((gradient, 0.5), (weights, 0.25), (moments, 0)):
                each.fill_(value)
            rates[name].append(bytes_per_s(action, moved_bytes) / 1e9)
    gb_per_s = {name: np.percentile(values[2:], (10, 50, 90)).round(1).tolist() for name, values in rates.items()}
    return {
        "gb_per_s_p10_p50_p90": gb_per_s, "adamw_of_triad": round(gb_per_s["adamw"][1] / gb_per_s["triad"][1], 3),
        "parameters_per_s": round(gb_per_s["adamw"][1] * 1e9 * n / moved_bytes),
    }  # fmt: skip


def in_turns(command: list[str], processes: int) -> dict[str, list[dict[str, Any]]]:
    """What processes of their own found, with threads where the system puts them and pinned, by turns."""
    found: dict[str, list[dict[str, Any]]] = {"not pinned": [], "pinned": []}
    for _ in range(processes):
        for name, told in (("not pinned", {}), ("pinned", PINNED)):
            done = subprocess.run(command, env=os.environ | told, check=True, capture_output=True, text=True)
            found[name].append(json.loads(done.stdout)["here"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, default=max(1, usable_cores() - 1))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--processes", type=int, default=0, help="of each sort; default: this one alone")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    for name in ("elements", "threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, must be at least 1")
    result: dict[str, Any] = {
        "device": cpu_name(), "cores": usable_cores(), "memory": placement(), "slideplan": __version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), "numba": numba.__version__, "torch": torch.__version__},
        "command": " ".join(sys.argv), "elements": options.elements,
    }  # fmt: skip
    if options.processes:
        same = [f"--{name}={getattr(options, name)}" for name in ("elements", "threads", "rounds")]
        result |= in_turns([sys.executable, __file__, *same], options.processes)
        result["adamw_gb_per_s"] = {
            name: statistics.median(each["gb_per_s_p10_p50_p90"]["adamw"][1] for each in result[name])
            for name in ("not pinned", "pinned")
        }
    else:
        result["here"] = measured(options.elements, options.threads, options.rounds)
        for state in ("bf16-moments", "lean"):
            result[state] = measured_lossy(state, options.elements, options.threads, options.rounds)
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
