"""The host's AdamW against what its memory allows: a pass over the same arrays with next to no arithmetic.

    python benchmarks/host_update.py --elements 200000000 -o host_update.json

Both read split master, both moments and a bf16 gradient and write all but the gradient back, 26 bytes an element
on the same threads, in turns in the same run. Where threads run is the system's choice; pinned ones, to compare:

    OMP_PROC_BIND=close OMP_PLACES=cores python benchmarks/host_update.py --threads 15
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch

from slideplan.plan.pools import UPDATE_STATE_TRAFFIC_BYTES
from slideplan.runtime.host_memory import host_buffer, placement
from slideplan.runtime.machine import usable_cores
from slideplan.runtime.optimizer import AdamW, HostUpdate

TRAFFIC_BYTES = UPDATE_STATE_TRAFFIC_BYTES + 2


@numba.njit(parallel=True, nogil=True)
def triad(high, remainder, m, v, gradient):  # type: ignore[no-untyped-def]
    for i in numba.prange(high.size):
        high[i] = high[i] + gradient[i]
        remainder[i] = remainder[i] + np.int16(1)
        m[i] = m[i] + np.float32(1)
        v[i] = v[i] + np.float32(1)


def bytes_per_s(action: Callable[[], object], elements: int) -> float:
    started = time.perf_counter()
    action()
    return TRAFFIC_BYTES * elements / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=200_000_000)
    parser.add_argument("--threads", type=int, default=max(1, usable_cores() - 1))
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    n = options.elements
    weights, gradient = (host_buffer(2 * n).view(torch.bfloat16).normal_() for _ in range(2))
    remainder = host_buffer(2 * n).view(torch.int16)
    moments = host_buffer(8 * n).view(torch.float32).view(2, n)
    update, settings = HostUpdate(options.threads), AdamW()
    raw = [each.view(torch.int16).numpy() for each in (weights, gradient)]
    actions = {
        "triad": lambda: triad(raw[0], remainder.numpy(), moments[0].numpy(), moments[1].numpy(), raw[1]),
        "adamw": lambda: update(weights, remainder, moments, gradient, settings, 1),
    }
    rates: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(options.rounds + 2):
        for name, action in actions.items():
            numba.set_num_threads(update.threads)
            # What the triad leaves would be subnormal or huge, which is slow or endless.
            for each, value in ((gradient, 0.5), (weights, 0.25), (moments, 1e-3)):
                each.fill_(value)
            rates[name].append(bytes_per_s(action, n))
    median = {name: statistics.median(values[2:]) for name, values in rates.items()}
    result = {
        "device": platform.processor() or platform.machine(), "cores": usable_cores(), "threads": update.threads,
        "versions": {"python": platform.python_version(), "numba": numba.__version__, "torch": torch.__version__},
        "command": " ".join(sys.argv), "elements": n,
        "omp_proc_bind": os.environ.get("OMP_PROC_BIND", ""), "memory": placement(),
        "gb_per_s": {name: round(rate / 1e9, 1) for name, rate in median.items()},
        "first_and_last_gb_per_s": {name: [round(rates[name][i] / 1e9, 1) for i in (2, -1)] for name in rates},
        "adamw_of_triad": round(median["adamw"] / median["triad"], 3),
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
