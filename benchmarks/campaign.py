"""Validation campaign: how well does the simulator predict schedules that it has not seen run?

One campaign measures the machine, draws configurations (model, sequence length, global batch, GPU memory) and
for each of them random policies from all that fits, beside the one that the planner chooses; predicts every
step; then executes each in a process of its own with random weights, and compares. Predictions are made before
the first run and nothing is fitted on the runs. How fast a process's memory is depends on where the system puts it:
what `runtime execute` expects once it has rehearsed its host updates, before the first step, is reported as well.

    python benchmarks/campaign.py -o runs/validation --budget-s 570 --name h100    # profile, draw, the first runs
    python benchmarks/campaign.py --resume runs/validation --budget-s 570         # go on, as often as runs are left
    python benchmarks/campaign.py --report runs/validation                        # the report again, from the folder

(with the package installed, or PYTHONPATH=. in front). The defaults are three model shapes of 1.5B, 3B and 8B, eight
configurations, three runs of each: twenty-four runs in about twenty minutes on an H100 with 125 GiB of RAM. A call
stops before its budget is over and can be repeated; without --budget-s one call does it all. `--profile FILE` takes
a profile made before, by

    python -m planner profile --model qwen2.5-1.5b --model llama-3.2-3b --model llama-3.1-8b \\
        --micro-batch 1 --micro-batch 8 --seq-len 512 --seq-len 1024 --seq-len 2048 --seq-len 4096 --kernels graphed \\
        -o profiles/here.json

(two micro-batches on purpose: the others are for the cost model to interpolate). `-o DIR --list` draws and predicts, prints
the runs and what they will take, and runs nothing; `--resume DIR` runs them, on the machine of the profile. Smaller
machines take smaller models:

    python benchmarks/campaign.py -o runs/small --device cpu --models tiny tiny-qwen3 demo --quick --seq-len 64 128 \\
        --global-batch 2 4 8 --gpu-memory 4MiB 40MiB --profile-micro-batch 2 --profile-seq-len 64 128

The folder holds profile.json, manifest.json and runs/NAME/ with plan, measurement and comparison. The report goes
to reports/validation-MACHINE-DATE/.
"""

from __future__ import annotations

import argparse
import ctypes
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import msgspec

import campaign_report
from campaign_draw import describe, draw_entries, entry_plan
from campaign_records import CampaignFolder, Entry, Manifest, Outcome
from planner.catalogue.machines import find_machine
from slideplan.codec import digest, save
from slideplan.machine.profile import MachineProfile
from slideplan.quantities import GIB, format_ns, parse_bytes

MODELS = ("qwen2.5-1.5b", "llama-3.2-3b", "llama-3.1-8b")
SEQ_LENS = (512, 1024, 2048, 4096)
GLOBAL_BATCHES = (1, 2, 4, 8, 16, 32, 64)
GPU_MEMORIES = ("all", "40GiB", "24GiB")
PROFILE_MICRO_BATCHES, PROFILE_SEQ_LENS = (1, 8), (512, 1024, 2048, 4096)

# Deferred updates pile up over the first steps; then step times of policies bound by the host differ from step to step.
WARMUP_STEPS, STEADY_STEPS, LEAST_STEADY_STEPS = 3, 20, 3
STEPPING_S = 8.0  # fewer steady steps rather than longer
# Wall time of a run beside its steps; what the folder's finished runs took corrects it.
START_S = 8.0
RESERVE_BYTES_PER_S = 4 * GIB
# As fine-tuning has it: at 1e-4 random weights diverge within three steps (losses of 17).
LEARNING_RATE = "1e-5"
REPORT_S = 15.0  # kept for the report at the end of the budget
EXIT_INTERRUPTED = 130
ATTEMPTS = 2  # of a run during which the campaign itself was killed
ERROR_LINES, ERROR_CHARACTERS = 4, 800
LIBC = ctypes.CDLL(None)  # not first in a child between fork and exec


# -- runs --------------------------------------------------------------------------------------


def steps_of(entry: Entry) -> int:
    """Steps to run: warm-up, steady ones, and the last, which is not judged."""
    room = int(STEPPING_S * 1e9 / entry.predicted_ns) - WARMUP_STEPS - 1
    return WARMUP_STEPS + max(LEAST_STEADY_STEPS, min(STEADY_STEPS, room)) + 1


def estimated_s(entry: Entry, pace: float = 1.0) -> float:
    """Wall seconds of a run. `pace`: how much longer than this runs take here."""
    stepping = steps_of(entry) * entry.predicted_ns / 1e9
    return pace * (START_S + entry.reserved_bytes / RESERVE_BYTES_PER_S + stepping)


def pace(folder: CampaignFolder, entries: tuple[Entry, ...]) -> float:
    """Wall time of finished runs as a multiple of the estimate; 1 before the first."""
    found = [
        outcome.wall_s / estimated_s(entry)
        for entry in entries
        if (outcome := folder.outcome(entry)) is not None and outcome.status == "done"
    ]
    return median(found) if found else 1.0


def pending(folder: CampaignFolder, entries: tuple[Entry, ...]) -> list[Entry]:
    """Runs that are still to be made, in order."""
    found = []
    for entry in entries:
        outcome = folder.outcome(entry)
        if outcome is None or outcome.status == "started":
            found.append(entry)
    return found


class Ended(NamedTuple):
    """How a process ended: its exit code (below zero: killed by that signal; None: stopped for time), and its stderr."""

    code: int | None
    said: str


_PR_SET_PDEATHSIG = 1
Launch = Callable[[list[str], float], Ended]  # arguments of `runtime`, seconds that it may take


def launch_process(arguments: list[str], limit_s: float) -> Ended:
    """`runtime` in a process of its own: memory counters start from nothing, and its end is not ours.

    If this process ends before, so does that one: it would disturb the runs of whoever goes on.
    """
    command = [sys.executable, "-m", "runtime", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False, preexec_fn=_end_with_parent
        )
    except subprocess.TimeoutExpired:
        return Ended(None, f"stopped after {limit_s:.0f} s")
    return Ended(done.returncode, done.stderr)


def _end_with_parent() -> None:
    """Linux ends this process when the one that started it is gone, however it went."""
    if sys.platform == "linux":
        LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run_all(folder: CampaignFolder, manifest: Manifest, deadline: float, launch: Launch = launch_process) -> None:
    """Make the runs that are left; none is begun that would last beyond the deadline (monotonic seconds)."""
    machine = folder.profile()
    if digest(machine) != manifest.profile_digest:
        raise ValueError(f"{folder.profile_file}: is not the profile that the runs were predicted from; start a new campaign")
    left = pending(folder, manifest.entries)
    while left:
        speed = pace(folder, manifest.entries)
        remaining = deadline - time.monotonic()
        entry = next((entry for entry in left if estimated_s(entry, speed) <= remaining), None)
        if entry is None:
            print(f"{len(left)} runs left, no time for any; go on with --resume {folder.path}", flush=True)
            return
        left.remove(entry)
        print(f"{describe(entry)}\n  about {estimated_s(entry, speed):.0f} s", flush=True)
        outcome = run(folder, entry, machine, manifest, speed, deadline, launch)
        print(f"  {_result(folder, entry, outcome)}", flush=True)


def run(
    folder: CampaignFolder,
    entry: Entry,
    machine: MachineProfile,
    manifest: Manifest,
    speed: float,
    deadline: float,
    launch: Launch = launch_process,
) -> Outcome:
    """Predict, execute, compare. What goes wrong there is an outcome, not an exception.

    A run that the deadline cuts short stays "started", and is made again by the next call.
    """
    place = folder.run_folder(entry)
    before = folder.outcome(entry)
    shutil.rmtree(place, ignore_errors=True)  # what an attempt cut short has left
    place.mkdir(parents=True)
    outcome = Outcome(
        status="started", attempts=1 + (before.attempts if before else 0), estimated_s=round(estimated_s(entry, speed), 1)
    )

    def ended(**fields: object) -> Outcome:
        done = msgspec.structs.replace(outcome, **fields)
        save(place / "outcome.json", done)
        return done

    if outcome.attempts > ATTEMPTS:
        return ended(status="failed", error=f"the campaign was stopped during this run {ATTEMPTS} times")
    ended()
    plan_file = place / "made.json"
    save(plan_file, entry_plan(entry, machine))
    started = time.monotonic()
    patience_s = 60 + 4 * outcome.estimated_s
    limit_s = min(patience_s, deadline + REPORT_S / 2 - started)
    steps = str(steps_of(entry))
    code, said = launch(
        ["execute", str(plan_file), "--steps", steps, "--warmup", str(WARMUP_STEPS), "--lr", LEARNING_RATE,
         "--device", manifest.device, "--no-save", "-o", str(place), *(["--ssd", manifest.ssd] if manifest.ssd else [])],
        limit_s,
    )  # fmt: skip
    wall_s = round(time.monotonic() - started, 1)
    plan_file.unlink()
    if code == 0:
        folder.pack(entry)
        return ended(status="done", wall_s=wall_s)
    if code is None and limit_s < patience_s:
        return outcome
    return ended(status="failed", wall_s=wall_s, error=_failure(code, said))


def _failure(code: int | None, said: str) -> str:
    """Why a process failed: how it ended and its last lines."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    how = [] if code is None else [f"killed by signal {-code}, perhaps for memory" if code < 0 else f"exit code {code}"]
    return "; ".join([*how, *lines[-ERROR_LINES:]])[-ERROR_CHARACTERS:]


def _result(folder: CampaignFolder, entry: Entry, outcome: Outcome) -> str:
    if outcome.status != "done":
        return f"{outcome.status} after {outcome.wall_s:.0f} s: {outcome.error or 'out of time, to be made again'}"
    comparison = folder.comparison(entry)
    memory = ", ".join(f"{row.name} memory {row.error:+.1%}" for row in comparison.memory if row.error is not None)
    rehearsed = "" if comparison.rehearsed is None else f"{comparison.rehearsed.error:+.1%} as rehearsed, "
    return (
        f"predicted {format_ns(comparison.step.predicted)}, measured {format_ns(comparison.step.measured)}: "
        f"{comparison.step.error:+.1%} ({rehearsed}cost model {comparison.cost_model_error:+.1%}, structure "
        f"{comparison.structure_error:+.1%}, spread {comparison.step_spread:.1%}); {memory}; took {outcome.wall_s:.0f} s"
    )


# -- a campaign --------------------------------------------------------------------------------


def start(folder: CampaignFolder, options: argparse.Namespace) -> Manifest:
    """Measure or read the profile, draw all runs and write them down. Raises ValueError for what cannot be."""
    if folder.manifest_file.exists():
        raise ValueError(f"{folder.path}: holds a campaign already; go on with --resume {folder.path}")
    if options.profile is not None and options.kernels:
        raise ValueError(f"--kernels is for a profile to be measured; {options.profile} says what it was measured with")
    if options.ssd is not None and not options.ssd.is_dir():
        raise ValueError(f"--ssd: {options.ssd} is not a folder; name one on the drive")
    if options.runs_per_config < 1 or options.configurations < 1:
        raise ValueError("--configurations and --runs-per-config must be at least 1")
    memories = [None if text == "all" else parse_bytes(text) for text in options.gpu_memory]
    if options.profile is not None:
        save(folder.profile_file, find_machine(str(options.profile)))
    elif not folder.profile_file.exists():
        _profile(folder, options)
    machine = folder.profile()
    if options.ssd is not None and machine.ssd is None:
        raise ValueError(f"{folder.profile_file}: has no drive; measure it with `planner profile --ssd {options.ssd}`")
    print(f"drawing runs for {machine.name}", flush=True)
    entries = draw_entries(
        machine, options.models, options.seq_len, options.global_batch, memories,
        options.configurations, options.runs_per_config, options.seed, options.ssd is not None,
    )  # fmt: skip
    manifest = Manifest(
        seed=options.seed,
        device=options.device,
        command=shlex.join(["campaign.py", *sys.argv[1:]]),
        profile_digest=digest(machine),
        ssd="" if options.ssd is None else str(options.ssd),
        entries=tuple(entries),
    )
    save(folder.manifest_file, manifest)
    return manifest


def _profile(folder: CampaignFolder, options: argparse.Namespace) -> None:
    """`planner profile` in a process of its own, so that its memory is gone when runs begin."""
    arguments = [
        sys.executable, "-m", "planner", "profile", "--device", options.device, "-o", str(folder.profile_file),
        "--name", options.name, *(["--ssd", str(options.ssd)] if options.ssd else []),
    ]  # fmt: skip
    for option, values in (
        ("--model", options.models),
        ("--micro-batch", options.profile_micro_batch),
        ("--seq-len", options.profile_seq_len),
        ("--kernels", options.kernels or (["fused"] if options.device == "cpu" else ["graphed"])),
    ):
        for value in values:
            arguments += [option, str(value)]
    started = time.monotonic()
    done = subprocess.run([*arguments, *(["--quick"] if options.quick else [])], stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ValueError(f"`planner profile` failed with exit code {done.returncode}; what it said stands above")
    print(f"profile measured in {time.monotonic() - started:.0f} s", flush=True)


def print_list(folder: CampaignFolder, manifest: Manifest) -> None:
    """All runs with what is predicted of them, and what became of those made."""
    total = 0.0
    for entry in manifest.entries:
        outcome = folder.outcome(entry)
        seconds = estimated_s(entry)
        status = outcome.status if outcome else "to do"
        total += seconds if status in ("to do", "started") else 0
        print(describe(entry))
        print(f"  step {format_ns(entry.predicted_ns)}, {steps_of(entry)} steps, run about {seconds:.0f} s; {status}")
    print(f"{len(manifest.entries)} runs, about {total:.0f} s left")


def parser() -> argparse.ArgumentParser:
    lines = __doc__.splitlines()
    made = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", type=Path, metavar="DIR", help="start a campaign in this folder")
    where.add_argument("--resume", type=Path, metavar="DIR", help="go on with the campaign in this folder")
    where.add_argument("--report", type=Path, metavar="DIR", help="write the report of this folder, run nothing")
    made.add_argument("--list", action="store_true", help="print the runs and what they will take, run nothing")
    made.add_argument("--budget-s", type=float, default=float("inf"), help="stop before this many seconds are over")
    made.add_argument("--reports", type=Path, default=Path("reports"), metavar="DIR", help="where reports go")
    drawn = made.add_argument_group("what a new campaign measures")
    drawn.add_argument("--profile", type=Path, help="profile, by name or file; default: measured at the start")
    drawn.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    drawn.add_argument("--models", nargs="+", default=MODELS)
    drawn.add_argument("--seq-len", nargs="+", type=int, default=SEQ_LENS)
    drawn.add_argument("--global-batch", nargs="+", type=int, default=GLOBAL_BATCHES)
    drawn.add_argument("--gpu-memory", nargs="+", default=GPU_MEMORIES, help="how much of it to plan for: all, 24GiB")
    drawn.add_argument("--ssd", type=Path, metavar="DIR", help="every random policy has state on the drive of this folder")
    drawn.add_argument("--configurations", type=int, default=8)
    drawn.add_argument("--runs-per-config", type=int, default=3, help="the second is the planner's choice")
    drawn.add_argument("--seed", type=int, default=0)
    drawn.add_argument("--name", default="here", help="name of the profile to be measured")
    drawn.add_argument("--kernels", nargs="+", help="kernels to measure and plan with; default: graphed, fused on a CPU")
    drawn.add_argument("--quick", action="store_true", help="a quick profile")
    drawn.add_argument("--profile-micro-batch", nargs="+", type=int, default=PROFILE_MICRO_BATCHES)
    drawn.add_argument("--profile-seq-len", nargs="+", type=int, default=PROFILE_SEQ_LENS)
    return made


def main(arguments: list[str] | None = None) -> None:
    began = time.monotonic()
    options = parser().parse_args(arguments)
    folder = CampaignFolder(options.output or options.resume or options.report)
    manifest = start(folder, options) if options.output else folder.manifest()
    if options.list:
        print_list(folder, manifest)
        return
    if not options.report:
        run_all(folder, manifest, began + options.budget_s - REPORT_S)
    print(f"report: {campaign_report.write(folder, options.reports)}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_INTERRUPTED))  # the run in progress ends, too
    try:
        main()
    except KeyboardInterrupt:
        print("campaign: interrupted; go on with --resume", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except ValueError as error:
        print(f"campaign: {error}", file=sys.stderr)
        sys.exit(2)
