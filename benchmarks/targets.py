"""Step times of planned runs beside a run without any offload, and beside what the planner predicted of each.

    python benchmarks/targets.py -o runs/targets                    # all rows: profile, reference, plan, run, compare
    python benchmarks/targets.py -o runs/targets --rows 8b-16 3b-2  # some; what the folder holds already is kept
    python benchmarks/targets.py -o runs/targets --rows 8b-16 --without "fused kernels" residency    # and their gains

A row is a model shape and a global batch at a sequence length of 1024, with random weights and exact fp32 state.
The reference is the Hugging Face model with all bf16 weights and gradients resident, gradient checkpointing,
liger-kernel's operators where that is installed, forward and backward without any optimizer: a ceiling that a run
with an optimizer is not expected to pass. `peer` is SlideFormer's step time on the same kind of machine; that of batch 16
stands with its memory in `tests/reference`, the others are figures without details. The folder gets profile.json,
ROW/ with plan, measurement and comparison, table.json, table.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from campaign_draw import fixed_plan, waiting_gradients
from planner.catalogue.models import find_model
from planner.search.best import search
from planner.search.space import SearchOptions
from slideplan.codec import load, save
from slideplan.graph.lanes import LaneKind
from slideplan.hf_config import config_of
from slideplan.machine.profile import MachineProfile
from slideplan.measurement import Comparison, Measurement
from slideplan.placement import Tier
from slideplan.plan import Plan

SEQ_LEN = 1024
MECHANISMS = (
    "activations on the host", "captured graphs", "fused kernels", "kept activations", "residency", "state passing through",
    "updates across the step",
)  # fmt: skip
MICRO_BATCHES = (1, 2, 4, 8, 16)


class Row(NamedTuple):
    """A model shape at a global batch. goal_s, peer_s: step times; reference_micro_batch: of the run without offload."""

    model: str
    batch: int
    goal_s: float
    peer_s: float
    reference_micro_batch: int


ROWS = {
    "8b-64": Row("llama-3.1-8b", 64, 5.6, 6.32, 16),
    "8b-16": Row("llama-3.1-8b", 16, 1.45, 3.43, 16),
    "8b-4": Row("llama-3.1-8b", 4, 0.9, 3.5, 4),
    "8b-1": Row("llama-3.1-8b", 1, 0.8, 3.5, 1),
    "3b-2": Row("llama-3.2-3b", 2, 0.2, 1.75, 2),
}


def call(*arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    print("$", " ".join(command[2:]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def profile(folder: Path, name: str, made_before: Path | None) -> None:
    path = folder / "profile.json"
    if made_before is not None:
        save(path, load(made_before, MachineProfile))
    if not path.exists():
        models = dict.fromkeys(row.model for row in ROWS.values())
        options = [part for model in models for part in ("--model", model)]
        sizes = [part for size in MICRO_BATCHES for part in ("--micro-batch", str(size))]
        kernels = ("--kernels", "fused", "--kernels", "graphed", "--kernels", "eager")
        call("planner", "profile", *options, *sizes, "--seq-len", SEQ_LEN, *kernels, "--name", name, "-o", path)


def run_row(folder: Path, name: str, steps: int) -> None:
    row = ROWS[name]
    if (folder / name / "comparison.json").exists():
        return
    plan = folder / f"{name}.json"
    call(
        "planner", "simulate", "--model", row.model, "--machine", folder / "profile.json", "--seq-len", SEQ_LEN,
        "--global-batch", row.batch, "-o", plan,
    )  # fmt: skip
    call("runtime", "execute", plan, "--steps", steps, "--lr", "1e-5", "-o", folder / name)
    plan.unlink()


def without(mechanism: str, plan: Plan, machine: MachineProfile) -> Plan:
    """The plan with one mechanism switched off and all else as it is; without residency, the best that is left."""
    policy, model = plan.policy, plan.model
    units = policy.units
    if mechanism == "activations on the host":
        if all(unit.feed_forward is not Tier.HOST for unit in units):
            raise ValueError(
                f"{model.name} at {plan.workload.global_batch}: no inner activations wait on the host in this plan"
            )
        units = tuple(
            msgspec.structs.replace(unit, inner=None, feed_forward=None) if unit.feed_forward is Tier.HOST else unit
            for unit in units
        )
        policy = msgspec.structs.replace(policy, units=units, inner_slots=0)
    elif mechanism == "captured graphs":
        if policy.kernels != "graphed":
            raise ValueError(f"{model.name} at {plan.workload.global_batch}: nothing is captured in this plan")
        policy = msgspec.structs.replace(policy, kernels="fused")
    elif mechanism == "kept activations":
        units = tuple(msgspec.structs.replace(unit, inner=None, feed_forward=None) for unit in units)
        policy = msgspec.structs.replace(policy, units=units, inner_slots=0)
    elif mechanism == "updates across the step":
        order = tuple(sorted(policy.update_order, reverse=True))
        policy = msgspec.structs.replace(policy, update_order=order)
    elif mechanism == "state passing through":
        passing = [unit for unit, placed in enumerate(units) if placed.passing]
        if not passing:
            raise ValueError(f"{model.name} at {plan.workload.global_batch}: no state passes through the GPU in this plan")
        units = tuple(msgspec.structs.replace(unit, update=Tier.HOST) if unit.passing else unit for unit in units)
        policy = msgspec.structs.replace(policy, units=units, state_slots=0, state_chunks=0)
        # Updated by the host in order of next need, where gradients that wait for it fit; else as they arrive.
        need = sorted((*policy.update_order, *passing))
        for order in (need, need[::-1]):
            slots = min(waiting_gradients(model, order) + 1, sum(0 < unit < model.head_unit for unit in order))
            changed = msgspec.structs.replace(policy, update_order=tuple(order), host_gradient_slots=slots)
            with contextlib.suppress(ValueError):
                return fixed_plan(model, changed, plan.workload, machine)
    elif mechanism == "residency":
        answer = search(model, plan.workload, machine, SearchOptions(placement="host", kernels=policy.kernels))
        assert isinstance(answer, Plan), "what fits with residency fits with less on the GPU"
        return answer
    elif mechanism == "fused kernels":
        policy = msgspec.structs.replace(policy, kernels="eager", inner_slots=0)
        # Eager layers keep more than twice as much: fewer of them can.
        kept = [unit for unit, placed in enumerate(units) if placed.keeps]
        for count in range(len(kept), -1, -1):
            fewer = {unit: Tier.GPU if unit in kept[len(kept) - count :] else None for unit in range(len(units))}
            changed = tuple(
                msgspec.structs.replace(placed, inner=fewer[unit], feed_forward=fewer[unit])
                for unit, placed in enumerate(units)
            )
            with contextlib.suppress(ValueError):
                return fixed_plan(model, msgspec.structs.replace(policy, units=changed), plan.workload, machine)
    else:
        raise ValueError(f"no mechanism {mechanism!r}")
    return fixed_plan(model, policy, plan.workload, machine)


def run_without(folder: Path, name: str, mechanisms: list[str], steps: int) -> None:
    """Runs of a row's plan with one mechanism off each; gains go to ROW-gains.json. The row must have been run."""
    machine = load(folder / "profile.json", MachineProfile)
    plan = load(folder / name / "plan.json", Plan)
    whole = load(folder / name / "comparison.json", Comparison).step
    path = folder / f"{name}-gains.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for mechanism in mechanisms:
        place = folder / f"{name}-without-{mechanism.replace(' ', '-')}"
        if not (place / "comparison.json").exists():
            made = folder / "without.json"
            save(made, without(mechanism, plan, machine))
            call("runtime", "execute", made, "--steps", steps, "--lr", "1e-5", "-o", place)
            made.unlink()
        step = load(place / "comparison.json", Comparison).step
        found[mechanism] = {
            "predicted_s": step.predicted / 1e9, "measured_s": step.measured / 1e9, "error": step.error,
            "gain_predicted": step.predicted / whole.predicted - 1, "gain_measured": step.measured / whole.measured - 1,
        }  # fmt: skip
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(mechanism, json.dumps(found[mechanism]), flush=True)


def reference(folder: Path, name: str) -> None:
    """Step time without offload, in a process of its own."""
    path = folder / f"{name}-reference.json"
    if not path.exists():
        subprocess.run([sys.executable, __file__, "--reference", name, "-o", str(folder)], check=True)


def run_reference(name: str) -> dict[str, Any]:
    row = ROWS[name]
    kernels = "torch"
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama  # noqa: PLC0415 - may be absent

        apply_liger_kernel_to_llama()
        kernels = "liger"
    except ImportError:
        pass
    arguments = {**config_of(find_model(row.model)), "attn_implementation": "sdpa", "dtype": torch.bfloat16}
    config = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, config.vocab_size, (row.reference_micro_batch, SEQ_LEN), device="cuda")
    took = []
    for _ in range(7):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(row.batch // row.reference_micro_batch):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - started)
        model.zero_grad(set_to_none=True)
    return {"step_s": statistics.median(took[2:]), "kernels": kernels, "steps_s": [round(each, 4) for each in took]}


def compute_gaps(plan: Plan, measurement: Measurement) -> dict[str, float]:
    """Shares of the measured step in which the compute lane waits.

    longest, within: the longest wait between two tasks, and all of them; at_the_start: before the first.
    idle: what of `within` no other task accounts for: all that a task depends on is over, but it has not begun
    """
    record, tasks = measurement.record, plan.graph.tasks
    waits, idle = [], 0
    for before, number in pairwise(plan.graph.queue(LaneKind.COMPUTE)):
        ended, begun = record.spans[before].end_ns, record.spans[number].start_ns
        ready = max([ended, *(record.spans[d.task].end_ns - d.distance * record.step_ns for d in tasks[number].dependencies)])
        waits.append(max(0, begun - ended))
        idle += min(waits[-1], max(0, begun - ready))
    outside = max(0, record.step_ns - record.spans[plan.graph.queue(LaneKind.COMPUTE)[-1]].end_ns)
    shares = {"longest": max(waits), "within": sum(waits), "idle": idle, "at_the_start": outside}
    return {name: wait_ns / record.step_ns for name, wait_ns in shares.items()}


def table(folder: Path) -> None:
    rows = []
    for name, row in ROWS.items():
        if not (folder / name / "comparison.json").exists():
            continue
        comparison = json.loads((folder / name / "comparison.json").read_text())
        plan, measurement = load(folder / name / "plan.json", Plan), load(folder / name / "measurement.json", Measurement)
        found = folder / f"{name}-reference.json"
        beside = json.loads(found.read_text()) if found.exists() else None
        step = comparison["step"]
        measured_s = step["measured"] / 1e9
        rows.append({
            "row": name, "model": row.model, "global_batch": row.batch, "predicted_s": step["predicted"] / 1e9,
            "measured_s": measured_s, "error": step["predicted"] / step["measured"] - 1,
            "rehearsed_s": comparison["rehearsed"]["predicted"] / 1e9 if comparison.get("rehearsed") else None,
            "tokens_per_s": row.batch * SEQ_LEN / measured_s, "goal_s": row.goal_s, "peer_s": row.peer_s,
            "reference": beside, "of_reference": beside["step_s"] / measured_s if beside else None,
            "bound_s": plan.prediction.lower_bound_ns / 1e9, "search_bound_s": plan.search.bound_ns / 1e9,
            "lanes": {each["name"]: each["predicted"] / 1e9 for each in comparison["lanes"]},
            "memory": comparison["memory"], "compute_waits": compute_gaps(plan, measurement),
            "date": measurement.date, "slideplan": measurement.version, "profile": plan.machine.digest,
        })  # fmt: skip
    result = {
        "device": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), "last_command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }  # fmt: skip
    (folder / "table.json").write_text(json.dumps(result, indent=1) + "\n")
    lines = [
        f"# Planned steps against a run without offload, {result['device']}, {result['date']}", "",
        "| row | predicted | as rehearsed | measured | error | tokens/s | goal | no offload | of that | SlideFormer |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in rows:
        beside = f"{each['reference']['step_s']:.3f} s | {each['of_reference']:.0%}" if each["reference"] else "- | -"
        rehearsed = f"{each['rehearsed_s']:.3f} s" if each["rehearsed_s"] else "-"
        lines.append(
            f"| {each['row']} | {each['predicted_s']:.3f} s | {rehearsed} | {each['measured_s']:.3f} s | "
            f"{each['error']:+.1%} | {each['tokens_per_s']:,.0f} | {each['goal_s']} s | {beside} | {each['peer_s']} s |"
        )
    (folder / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--name", default="here", help="name of the profile to be measured")
    parser.add_argument("--profile", type=Path, help="profile of this machine made before; default: measured at the start")
    parser.add_argument("--no-reference", action="store_true")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=MECHANISMS, help="run the rows again with one of these off each"
    )
    parser.add_argument("--reference", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    if options.reference:
        found = run_reference(options.reference)
        (options.output / f"{options.reference}-reference.json").write_text(json.dumps(found) + "\n")
        return
    profile(options.output, options.name, options.profile)
    for name in options.rows:
        if not options.no_reference:
            reference(options.output, name)
        run_row(options.output, name, options.steps)
        run_without(options.output, name, options.without, options.steps)
        table(options.output)


if __name__ == "__main__":
    main()
