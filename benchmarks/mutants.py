"""Mutation score of the language and the simulator: how many small changes to the code do the tests notice?

cosmic-ray makes the mutants (another operator, another number, a `not` more or less, a loop without turns) in a
copy of the working tree, and the tests run on each. Places in the code are drawn at random, and one mutant at each:
a sum has eleven mutants that differ little. A time-out counts as killed. Annotations are left out: they decide
nothing at run time.

    make mutants                                     the sample that the settings in pyproject.toml name
    python benchmarks/mutants.py --sample 40 --modules simulator
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import cosmic_ray.plugins
import pytest
from cosmic_ray.commands import init
from cosmic_ray.modules import find_modules
from cosmic_ray.mutating import use_mutation
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import MutationSpec

ROOT = Path(__file__).parents[1]
NOT_COPIED = ("reports", "docs", "demo", "build", "dist")  # of the top level: no test reads them
# Imported once, before the tests of a mutant start in a fork of this process. Nothing of the tree is among them.
PRELOADED = ("hypothesis", "networkx", "numpy", "simpy", "msgspec", "rich", "torch.utils.flop_counter")
# A test may take this long, all of them this many times what they take on the unchanged code.
TEST_LIMIT_S = 25
PATIENCE = 4

Position = tuple[int, int]


def annotations(source: str) -> Iterator[tuple[Position, Position]]:
    """From where to where each annotation of a module reaches, as (line, column)."""
    for node in ast.walk(ast.parse(source)):
        for each in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(each, ast.expr):
                yield (each.lineno, each.col_offset), (each.end_lineno or 0, each.end_col_offset or 0)


def places(modules: Sequence[Path], session: Path) -> list[list[MutationSpec]]:
    """The mutants of these modules by place, but for annotations; always in the same order."""
    work = WorkDB(session, WorkDB.Mode.create)
    init(modules, work, {})
    every = [item.mutations[0] for item in work.work_items]
    work.close()
    spans = {module: list(annotations(module.read_text())) for module in modules}
    found: dict[tuple[str, Position, Position], list[MutationSpec]] = {}
    for each in sorted(every, key=lambda each: (each.operator_name, each.occurrence)):
        if not any(start <= each.start_pos < end for start, end in spans[each.module_path]):
            found.setdefault((str(each.module_path), each.start_pos, each.end_pos), []).append(each)
    return [found[place] for place in sorted(found)]


def copied(source: Path, target: Path) -> None:
    """Copy a working tree, without what is hidden or compiled."""
    target.mkdir()
    for entry in source.iterdir():
        if entry.name in NOT_COPIED or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(entry, target)


def _tests(arguments: list[str], log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(pytest.main(arguments))


def outcome(arguments: list[str], log: Path, limit_s: float | None = None) -> str:
    """Whether the tests fail on the tree as it is now: "survived", "killed" or "timeout"."""
    run = multiprocessing.get_context("fork").Process(target=_tests, args=(arguments, log))
    run.start()
    run.join(limit_s)
    if run.exitcode is None:
        run.kill()
        run.join()
        return "timeout"
    return "killed" if run.exitcode else "survived"


def interval(killed: int, sampled: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share of mutants that tests kill."""
    z, share = 1.96, killed / sampled
    middle = share + z * z / (2 * sampled)
    reach = z * math.sqrt(share * (1 - share) / sampled + z * z / (4 * sampled * sampled))
    return (middle - reach) / (1 + z * z / sampled), (middle + reach) / (1 + z * z / sampled)


def judged(mutation: MutationSpec, arguments: list[str], log: Path, limit_s: float) -> dict[str, object]:
    """The tests' verdict on a mutant, and where and what it is."""
    operator = cosmic_ray.plugins.get_operator(mutation.operator_name)(**mutation.operator_args)
    with use_mutation(mutation.module_path, operator, mutation.occurrence) as (before, after):
        changed = [
            (old.strip(), new.strip())
            for old, new in zip(before.split("\n"), (after or before).split("\n"), strict=False)
            if old != new
        ]
        found = outcome(arguments, log, limit_s)
    last = next((line for line in log.read_text().splitlines() if line.startswith(("FAILED", "ERROR"))), "")
    old, new = changed[0] if changed else ("", "")
    return {
        "outcome": found, "module": str(mutation.module_path), "line": mutation.start_pos[0],
        "operator": mutation.operator_name.removeprefix("core/"), "before": old, "after": new, "killed_by": last,
    }  # fmt: skip


def main() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    parser = argparse.ArgumentParser(description="mutation score by a random sample")
    parser.add_argument("--tree", type=Path, default=ROOT, help="working tree to take code and tests from")
    parser.add_argument("--modules", nargs="+", default=settings["modules"], help="packages to mutate")
    parser.add_argument("--tests", nargs="+", default=settings["tests"])
    parser.add_argument("--sample", type=int, default=settings["sample"], help="how many places, one mutant at each")
    parser.add_argument("--seed", type=int, default=settings["seed"])
    parser.add_argument("-o", "--output", type=Path, help="write every outcome to this file, as JSON")
    given = parser.parse_args()
    output = given.output and given.output.absolute()
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

    with tempfile.TemporaryDirectory() as folder:
        tree, log = Path(folder) / "tree", Path(folder) / "log"
        copied(given.tree, tree)
        os.chdir(tree)
        os.environ |= {"HYPOTHESIS_PROFILE": settings["profile"], "PYTHONPATH": str(tree)}
        sys.path.insert(0, str(tree))
        arguments = ["-x", "-q", "-p", "no:cacheprovider", "--benchmark-disable", f"--timeout={TEST_LIMIT_S}", *given.tests]
        began = time.monotonic()
        if outcome(arguments, log) != "survived":
            sys.exit(f"the tests fail on the unchanged code:\n{log.read_text()}")
        limit_s = PATIENCE * (time.monotonic() - began)
        sys.dont_write_bytecode = True  # what was compiled for the unchanged code is read; of mutants nothing stays
        found = places(list(find_modules([Path(name) for name in given.modules])), Path(folder) / "session.sqlite")
        draw = random.Random(given.seed)
        chosen = [draw.choice(each) for each in draw.sample(found, min(given.sample, len(found)))]
        total = sum(map(len, found))
        print(f"{len(chosen)} of {total:,} mutants at {len(found):,} places of {', '.join(given.modules)}, seed {given.seed}")
        rows: list[dict[str, object]] = []
        for mutation in chosen:
            row = judged(mutation, arguments, log, limit_s)
            rows.append(row)
            said = f"{row['before']}  ->  {row['after']}" if row["outcome"] == "survived" else row["operator"]
            print(f"{len(rows)}/{len(chosen)} {row['outcome']}: {row['module']}:{row['line']} {said}", flush=True)
            if output:
                output.write_text(json.dumps(rows, indent=1) + "\n")
    killed = sum(row["outcome"] != "survived" for row in rows)
    low, high = interval(killed, len(rows))
    print(f"killed {killed} of {len(rows)}: {killed / len(rows):.0%} (95 % interval {low:.0%} to {high:.0%})")


if __name__ == "__main__":
    main()
