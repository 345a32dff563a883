"""What searches prove, over the whole catalogue: every shipped machine x model x batch, the worst gaps first.

    python benchmarks/certificates.py -o runs/certificates            # 1, 4, 16, 64; one process a core
    python benchmarks/certificates.py --differences BEFORE.jsonl AFTER.jsonl

A gap is by how much any policy considered may be faster than the one that was found. The first form writes answers.jsonl,
one line a search, and certificates.md; the second says in which searches two such files differ: policy, step, memory.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from planner.catalogue.machines import machines
from planner.catalogue.models import MODELS
from planner.search.best import search
from slideplan import codec
from slideplan.machine.profile import MachineProfile
from slideplan.plan import Plan
from slideplan.policy import Workload

BATCHES = (1, 4, 16, 64)
SEQ_LEN = 1024
WORST_ROWS = 12
Row = dict[str, Any]


def answer(machine_name: str, model_name: str, batch: int) -> Row:
    """One search at the usual options."""
    machine = codec.load(machines()[machine_name], MachineProfile)
    model = MODELS[model_name]
    seq_len = min(SEQ_LEN, model.max_positions, model.sliding_window or model.max_positions)
    started = time.perf_counter()
    found = search(model, Workload(seq_len=seq_len, global_batch=batch), machine)
    row: Row = {
        "machine": machine_name, "model": model_name, "batch": batch, "seconds": round(time.perf_counter() - started, 2),
        "fits": isinstance(found, Plan),
        "ledger": {tier: dict(sorted(part.items.items())) for tier, part in found.ledger.tiers.items()},
    }  # fmt: skip
    if isinstance(found, Plan):
        record = found.search
        row |= {
            "step_ns": found.prediction.record.step_ns, "bound_ns": record.bound_ns, "front": record.front[0].policy,
            "candidates": record.candidates, "simulated": record.simulated, "offloads": found.offloads,
        }  # fmt: skip
    else:
        row["lacking"] = found.ledger.lacking()
    return row


def gap(row: Row) -> float:
    """Percent by which a policy considered may be faster."""
    return 100 * (row["step_ns"] / row["bound_ns"] - 1)


def table(rows: list[Row]) -> str:
    """By machine: how many searches end within 0.5, 2 and 5 %, the middle and the worst; then the worst of all."""
    lines = ["| machine | fit | within 0.5 % | within 2 % | within 5 % | median | worst |", "|---|---|---|---|---|---|---|"]
    for machine in sorted({row["machine"] for row in rows}):
        gaps = sorted(gap(row) for row in rows if row["machine"] == machine and row["fits"])
        of = sum(row["machine"] == machine for row in rows)
        within = (f"{sum(each <= limit for each in gaps)}" for limit in (0.5, 2, 5))
        lines.append(f"| {machine} | {len(gaps)} of {of} | {' | '.join(within)} | {median(gaps):.1f} % | {gaps[-1]:.1f} % |")
    lines += [
        "",
        "The worst:",
        "",
        "| machine | model | batch | step | may be faster by | search |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if row["fits"]), key=gap, reverse=True)[:WORST_ROWS]:
        lines.append(
            f"| {row['machine']} | {row['model']} | {row['batch']} | {row['step_ns'] / 1e9:.3f} s | {gap(row):.1f} % | "
            f"{row['candidates']:,} policies, {row['simulated']} simulated, {row['seconds']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def differences(before: Iterable[Row], after: Iterable[Row]) -> list[str]:
    """One line per search that both made and that ended otherwise."""
    known = {(row["machine"], row["model"], row["batch"]): row for row in before}
    found = []
    for row in after:
        key = row["machine"], row["model"], row["batch"]
        old = known.get(key)
        changed = (
            [] if old is None else [name for name in ("fits", "step_ns", "front", "ledger") if old.get(name) != row.get(name)]
        )
        if old is not None and changed:
            faster = f", step {old['step_ns'] / row['step_ns'] - 1:+.2%} faster" if old["fits"] and row["fits"] else ""
            found.append(
                f"{' '.join(map(str, key))}: {', '.join(changed)} differ{faster}: {old.get('front')} -> {row.get('front')}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/certificates"))
    parser.add_argument("--batch", type=int, action="append", help=f"repeatable; default {BATCHES}")
    parser.add_argument("--machine", action="append", help="repeatable; default: all shipped ones")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--differences", type=Path, nargs=2, metavar=("BEFORE", "AFTER"))
    options = parser.parse_args()
    if options.differences:
        before, after = ([json.loads(line) for line in file.read_text().splitlines()] for file in options.differences)
        both = {(row["machine"], row["model"], row["batch"]) for row in before}
        shared = sum((row["machine"], row["model"], row["batch"]) in both for row in after)
        found = differences(before, after)
        print("\n".join(found) if found else "no differences", f"({len(found)} of {shared} searches differ)", sep="\n")
        return
    options.output.mkdir(parents=True, exist_ok=True)
    jobs = list(product(options.machine or sorted(machines()), MODELS, options.batch or BATCHES))
    rows: list[Row] = []
    with ProcessPoolExecutor(options.processes) as pool, (options.output / "answers.jsonl").open("w") as file:
        for done in as_completed([pool.submit(answer, *job) for job in jobs]):
            rows.append(done.result())
            file.write(json.dumps(rows[-1]) + "\n")
    text = table(rows)
    (options.output / "certificates.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
