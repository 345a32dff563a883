"""What the present simulator predicts for the runs of a campaign, from the campaign's report alone.

    python benchmarks/reprice.py reports/validation-h100-80gb-125gib-2026-11-22-third -o refit.json    # nothing is run

Prices come from the campaign's own profile, with its contention fitted again to what that profile measured of lanes
alone and together. The runs were seen when the simulator was changed: a campaign says what it predicts, this says what a
change is worth. Policies of slideplan 0.3.0 and before cannot be read; nothing was rehearsed before 0.5.0.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from campaign_draw import fixed_plan
from campaign_records import Manifest
from planner.catalogue.models import find_model
from slideplan import __version__
from slideplan.codec import Document, Spec, save
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import COMPUTE_KINDS, TaskKind
from slideplan.machine.fitting import interference
from slideplan.machine.profile import MachineProfile, Spread
from slideplan.measurement import expected_step_ns

COLUMNS = ("then", "now", "then_rehearsed", "now_rehearsed")


class Repriced(Spec, frozen=True):
    """One run. Errors of the step as it was predicted then and is now, by the profile alone and once rehearsed.

    The last two are None where the host updates nothing: there is nothing to rehearse.
    """

    run: str
    measured_ns: int
    then: float
    now: float
    then_rehearsed: float | None
    now_rehearsed: float | None


class Reprice(Document, frozen=True, tag="reprice"):
    """`means`, `worst`: of the sizes of those errors, over the runs that have them.

    fit_errors: of the relative speeds of lanes together, root mean square: then and now; `ssd`: where the disk is one of them
    """

    version: str
    means: dict[str, float]
    worst: dict[str, float]
    fit_errors: dict[str, tuple[float, float]]
    runs: tuple[Repriced, ...]


def refitted(profile: dict[str, Any]) -> tuple[MachineProfile, dict[str, tuple[float, float]]]:
    """The profile with its contention fitted again, however an earlier version described it, and how well both fit."""
    met = profile["interference"]
    alone = {LaneKind(lane): msgspec.convert(rate, Spread) for lane, rate in met["alone"].items()}
    together = [{LaneKind(each["lane"]): msgspec.convert(each["rate"], Spread) for each in lanes} for lanes in met["together"]]
    found = interference(alone, together, profile["gpu"]["memory_bytes_per_s"])
    off: dict[str, list[tuple[float, float]]] = {"memory": [], "ssd": []}
    for then, now in zip(met["together"], found.together, strict=True):
        on_disk = any(each.lane in (LaneKind.SSD_READ, LaneKind.SSD_WRITE) for each in now)
        off["ssd" if on_disk else "memory"] += [
            (before["predicted"] - each.speed, each.predicted - each.speed) for before, each in zip(then, now, strict=True)
        ]
    changed = {"interference": msgspec.to_builtins(found), "launches": launches(profile["launches"])}
    machine = msgspec.convert(profile | changed, MachineProfile)
    return machine, {what: (_root_mean_square(pairs, 0), _root_mean_square(pairs, 1)) for what, pairs in off.items() if pairs}


def launches(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Launches of a profile, each with its lane: until 0.7.0 every kind of copy had one of its own, all the same."""
    kinds: dict[tuple[str, str, str | None, str], dict[str, Any]] = {}
    for each in found:
        kind, lane = (each["kind"], each["lane"]) if "lane" in each else _verb_and_lane(each["kind"])
        kinds.setdefault((kind, lane, each["role"], each["kernels"]), each | {"kind": kind, "lane": lane})
    return list(kinds.values())


def _verb_and_lane(kind: str) -> tuple[str, str]:
    """Of what 0.7.0 and before called a task."""
    if kind in COMPUTE_KINDS:
        return kind, LaneKind.COMPUTE
    if kind in ("update_host", "update_gpu"):
        return TaskKind.UPDATE, {"update_host": LaneKind.HOST_UPDATE, "update_gpu": LaneKind.GPU_UPDATE}[kind]
    verb, _, _ = kind.partition("_")
    return TaskKind.COPY, {"load": LaneKind.H2D, "fetch": LaneKind.H2D, "offload": LaneKind.D2H}[verb]


def placement(found: dict[str, Any]) -> dict[str, Any]:
    """Of a unit, by tensor class: until 0.7.0 remainder and moments were one, and what became of inner activations a word."""
    if "state" not in found:
        return found
    state = found["state"]
    inner, feed_forward = {"recompute": (None, None), "keep": ("gpu", "gpu"), "offload": ("gpu", "host")}[found["inner"]]
    return {
        "weights": found["weights"],
        "remainder": state,
        "moments": state,
        "boundary": found["boundary"],
        "inner": inner,
        "feed_forward": feed_forward,
        "update": "gpu" if found.get("streams_state") else state,
    }


def manifest_of(report: Path) -> Manifest:
    """The runs of a report, of whatever version since 0.4.0."""
    found = json.loads(gzip.decompress((report / "manifest.json.gz").read_bytes()))
    for entry in found["entries"]:
        policy = entry["policy"]
        policy["units"] = [placement(unit) for unit in policy["units"]]
        policy.setdefault("state", "exact")  # until 0.10.0 the GPU's moments alone had another format; no campaign drew one
        policy.pop("gpu_moments", None)
    return msgspec.convert(found, Manifest)


def reprice(report: Path) -> Reprice:
    """All runs of a report. Raises ValueError, OSError or KeyError where it is none, or of too early a version."""
    machine, fit_errors = refitted(json.loads(gzip.decompress((report / "profile.json.gz").read_bytes())))
    manifest = manifest_of(report)
    results = {result["name"]: result for result in json.loads((report / "campaign.json").read_bytes())["runs"]}
    runs = []
    print(f"{'':44s} {'measured':>12s}  {'  '.join(f'{name:>14s}' for name in COLUMNS)}")
    for entry in manifest.entries:
        if entry.name not in results:
            continue
        result, of = results[entry.name], entry.configuration
        plan = fixed_plan(find_model(of.model), entry.policy, of.workload, machine)
        measured_ns, rehearsed_ns = result["step"]["measured"], result.get("rehearsed_ns")
        expected_ns = None if rehearsed_ns is None else expected_step_ns(plan, rehearsed_ns)
        found = Repriced(
            run=entry.name,
            measured_ns=measured_ns,
            then=entry.predicted_ns / measured_ns - 1,
            now=plan.prediction.record.step_ns / measured_ns - 1,
            then_rehearsed=result.get("rehearsed_error"),
            now_rehearsed=None if expected_ns is None else expected_ns / measured_ns - 1,
        )
        runs.append(found)
        errors = [getattr(found, name) for name in COLUMNS]
        shown = "  ".join(f"{'':>14s}" if error is None else f"{error:>+14.1%}" for error in errors)
        print(f"{entry.name:44s} {measured_ns / 1e6:>9.1f} ms  {shown}", flush=True)
    sizes = {name: [abs(error) for run in runs if (error := getattr(run, name)) is not None] for name in COLUMNS}
    return Reprice(
        version=__version__,
        means={name: fmean(each) for name, each in sizes.items() if each},
        worst={name: max(each) for name, each in sizes.items() if each},
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
    parser.add_argument("report", type=Path, help="report of a campaign")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="keep the figures as JSON")
    options = parser.parse_args()
    try:
        found = reprice(options.report)
        if options.output:
            save(options.output, found)
    except (ValueError, OSError, KeyError, TypeError, msgspec.MsgspecError) as error:
        parser.exit(
            2, f"reprice: {options.report}: {type(error).__name__}: {error}; this reads reports of slideplan 0.4.0 and later\n"
        )
    for name, mean in found.means.items():
        print(f"{name}: mean {mean:.1%}, worst {found.worst[name]:.1%}")


if __name__ == "__main__":
    main()
