"""The readers on broken input for as long as one likes: rounds of the tests that fuzz them, with hypothesis' profile `fuzz`.

Every round has another seed. What is written after each run of a file: examples by test, failures, and the peak memory of
the process that ran them, with machine, versions, date and command.

    make fuzz                                             an hour of one core
    python benchmarks/fuzz.py --minutes 5 -o fuzz.json
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from slideplan.codec import write_atomic
from slideplan.machine.host import cpu_name, total_host_bytes, usable_cores

ROOT = Path(__file__).parents[1]
FILES = (
    "tests/test_fuzz_documents.py",
    "tests/language/test_hf_fuzz.py",
    "tests/runtime/test_reader_fuzz.py",
    "tests/runtime/test_fuzz_data.py",
)
LIBRARIES = ("hypothesis", "msgspec", "numpy", "safetensors", "tokenizers", "torch", "transformers")
TEST_LIMIT_S = 1800  # a test that takes longer hangs
# Versions of hypothesis count examples or test cases, with and without an `and`.
COUNTS = r"(\d+) passing(?: examples)?, (\d+) failing(?: examples)?,(?: and)? (\d+) invalid"
STATISTICS = re.compile(rf"^(tests/\S+):$|{COUNTS}", re.M)
FAILED = re.compile(r"^(?:FAILED|ERROR) (tests/.*)$", re.M)


def counted(output: str) -> Iterator[tuple[str, dict[str, int]]]:
    """Examples of each phase of each test that hypothesis tells of."""
    test = ""
    for name, *counts in STATISTICS.findall(output):
        test = name or test
        if not name:
            yield test, dict(zip(("passing", "failing", "invalid"), map(int, counts), strict=True))


def add(tests: dict[str, dict[str, int]], output: str) -> None:
    """Add the examples that a run of tests tells of to those of each test."""
    for test, counts in counted(output):
        sums = tests.setdefault(test, dict.fromkeys(counts, 0))
        sums.update({name: sums[name] + count for name, count in counts.items()})


def run(file: str, seed: int, log: Path) -> tuple[int, int, str]:
    """Exit code, peak memory in bytes and output of the tests of a file."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        command = [
            sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", f"--basetemp={folder}/base",
            f"--timeout={TEST_LIMIT_S}", "--hypothesis-show-statistics", f"--hypothesis-seed={seed}",
        ]  # fmt: skip
        with tempfile.TemporaryFile() as output:
            environment = os.environ | {"HYPOTHESIS_PROFILE": "fuzz"}
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            said = output.read().decode(errors="replace")
    with log.open("a") as lines:
        lines.write(f"$ {shlex.join(command)}\n{said}\n")
    return process.returncode, used.ru_maxrss * 1024, said


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/fuzz/fuzz.json"), help="its log lies beside it")
    parser.add_argument("--minutes", type=float, default=60, help="after which no file of tests is started")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    found: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": cpu_name(), "cores": usable_cores(), "memory_bytes": total_host_bytes(), "niceness": os.nice(0)},
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}},
        "commits": [],
        "seconds": 0,
        "runs": 0,
        "examples": 0,
        "peak_bytes": dict.fromkeys(FILES, 0),
        "tests": {},
        "failures": [],
    }
    for seed, file in ((seed, file) for seed in itertools.count(1) for file in FILES):
        if time.monotonic() - started > 60 * options.minutes:
            break
        if commit() not in found["commits"]:
            found["commits"].append(commit())
        code, peak_bytes, said = run(file, seed, options.output.with_suffix(".log"))
        before = found["examples"]
        add(found["tests"], said)
        found["examples"] = sum(sum(counts.values()) for counts in found["tests"].values())
        failed = FAILED.findall(said) or ([f"{file}: exit code {code}"] if code else [])
        if found["examples"] == before:
            failed.append(f"{file}: no examples are counted in what pytest says")
        found["failures"] += [{"seed": seed, "commit": found["commits"][-1], "what": what} for what in failed]
        found["peak_bytes"][file] = max(found["peak_bytes"][file], peak_bytes)
        found["runs"] += 1
        found["seconds"] = round(time.monotonic() - started)
        write_atomic(options.output, json.dumps(found, indent=1).encode() + b"\n")
        print(
            f"{found['seconds']} s: {file}, seed {seed}: exit code {code}, {peak_bytes >> 20} MiB",
            *failed,
            sep="\n  ",
            flush=True,
        )
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    main()
