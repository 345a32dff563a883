"""What the present simulator predicts for the runs of a campaign that was made with an earlier one.

    python benchmarks/reprice.py runs/validation -o refit.json      # the folder of `campaign.py -o`; nothing is run

Prices come from the campaign's own profile, with its contention fitted again to what that profile measured of lanes
alone and together. The runs were seen when the simulator was changed: a campaign says what it predicts, this says what a
change is worth.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import msgspec

from campaign_records import CampaignFolder
from slideplan import __version__
from slideplan.plan.codec import Document, Spec, save
from slideplan.plan.fitting import fit
from slideplan.plan.graph import Lane
from slideplan.plan.machine import MachineProfile
from slideplan.plan.measurement import expected_step_ns
from slideplan.simulator import predict


class Repriced(Spec, frozen=True):
    """One run. Errors: of the step as it was predicted then and is now, by the profile alone and once rehearsed."""

    run: str
    measured_ns: int
    then: float
    now: float
    then_rehearsed: float
    now_rehearsed: float


class Reprice(Document, frozen=True, tag="reprice"):
    """`means`, `worst`: of the sizes of those errors, in their order. A run without host updates has nothing to rehearse."""

    version: str
    means: dict[str, float]
    worst: dict[str, float]
    fit_errors: tuple[float, float]  # root mean square over lanes on PCIe, host memory and GPU: then, now
    runs: tuple[Repriced, ...]


def refitted(file: Path) -> tuple[MachineProfile, tuple[float, float]]:
    """The profile with its contention fitted again, however an earlier version described it, and how well both fit."""
    profile = json.loads(file.read_bytes())
    met = profile["interference"]
    gpu_bytes_per_s = profile["gpu"]["memory_bytes_per_s"]
    rates = {Lane(lane): float(rate["p50"]) for lane, rate in met["alone"].items()} | {Lane.COMPUTE: float(gpu_bytes_per_s)}
    measured = [{Lane(lane["lane"]): min(1.0, lane["speed"]) for lane in lanes} for lanes in met["together"]]
    fitted = fit({Lane(lane): rates[Lane(lane)] for lane in met["alone"]}, measured, gpu_bytes_per_s)
    off: list[tuple[float, float]] = []
    for lanes in met["together"]:
        speeds = fitted.speeds({Lane(lane["lane"]): rates[Lane(lane["lane"])] for lane in lanes})
        for lane in lanes:
            now = speeds[Lane(lane["lane"])]
            if not any(other["lane"].startswith("ssd") for other in lanes):
                off.append((lane["predicted"] - lane["speed"], now - lane["speed"]))
            lane["predicted"] = round(now, 4)
    met["fitted"] = msgspec.to_builtins(fitted)
    return msgspec.json.decode(json.dumps(profile), type=MachineProfile), (_root_mean_square(off, 0), _root_mean_square(off, 1))


def reprice(folder: CampaignFolder) -> Reprice:
    """All finished runs. Raises ValueError where there are none."""
    machine, fit_errors = refitted(folder.profile_file)
    runs = []
    for entry in folder.manifest().entries:
        outcome = folder.outcome(entry)
        if outcome is None or outcome.status != "done":
            continue
        plan, measurement = folder.plan(entry), folder.measurement(entry)
        measured_ns, rehearsed_ns = measurement.record.step_ns, measurement.rehearsed_ns
        again = msgspec.structs.replace(
            plan, prediction=predict(plan.graph, plan.model, plan.policy, plan.workload, machine, plan.ledger)
        )
        errors = [each.prediction.record.step_ns / measured_ns - 1 for each in (plan, again)]
        if rehearsed_ns is not None:
            errors += [expected_step_ns(each, rehearsed_ns) / measured_ns - 1 for each in (plan, again)]
        else:
            errors += errors
        runs.append(Repriced(entry.name, measured_ns, *errors))
        print(f"{entry.name:44s} {measured_ns / 1e6:9.1f} ms  " + "  ".join(f"{error:+6.1%}" for error in errors), flush=True)
    if not runs:
        raise ValueError(f"{folder.path}: has no finished run")
    of = {name: [abs(getattr(run, name)) for run in runs] for name in ("then", "now", "then_rehearsed", "now_rehearsed")}
    return Reprice(
        version=__version__,
        means={name: fmean(sizes) for name, sizes in of.items()},
        worst={name: max(sizes) for name, sizes in of.items()},
        fit_errors=fit_errors,
        runs=tuple(runs),
    )


def _root_mean_square(pairs: Sequence[tuple[float, float]], column: int) -> float:
    return float(fmean(pair[column] ** 2 for pair in pairs) ** 0.5)


def main() -> None:
    lines = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=lines[0], epilog="\n".join(lines[1:]), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="folder of a campaign")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the figures as JSON")
    options = parser.parse_args()
    try:
        found = reprice(CampaignFolder(options.folder))
        if options.output:
            save(options.output, found)
    except (ValueError, OSError) as error:
        parser.exit(2, f"reprice: {error}\n")
    for name, mean in found.means.items():
        print(f"{name}: mean {mean:.1%}, worst {found.worst[name]:.1%}")


if __name__ == "__main__":
    main()
