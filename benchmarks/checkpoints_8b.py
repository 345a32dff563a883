"""Saving, killing, resuming and exporting an 8B model on one GPU: rates, pauses and memory, measured against the plan.

    python benchmarks/checkpoints_8b.py train FOLDER -o OUT [--model llama-3.1-8b] [--global-batch 16]
    python benchmarks/checkpoints_8b.py resume FOLDER -o OUT

`train` measures the drive's raw rate and the machine, and plans twice: as the machine is, and for a host with no room beside
the plan. It trains without a break; the same with sums in any order, for what a fixed order costs; and by each plan until a
checkpoint is saved, and kills that run. `resume` goes on with the last one, compares its losses with those of the run without
a break, exports it, and holds logits of the export, loaded by transformers, against those of the trained weights.
FOLDER needs room for one checkpoint (90 GiB) and one export (15 GiB). Results are JSON in OUT.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from runtime.checkpoints.manifest import Saving
from runtime.folder import claimed
from runtime.machine import peak_resident_bytes
from runtime.optimizer.adamw import AdamW
from runtime.optimizer.split_master import join
from runtime.run import RunRequest, execute
from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.codec import load
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.progress import Progress

STEPS, SAVE_AT, AFTER_SAVE = 12, 4, 2
SETTINGS = AdamW(lr=1e-5)
PARTS = ("drive", "any-order", "full-host", "room")


class OneCheckpoint(Disk):
    """A drive on which one checkpoint has room: its run is killed before it writes a second."""

    def free_bytes(self, folder: Path) -> int:
        return 1 << 50


def child(plan_path: Path, out: Path, steps: int, save: bool, any_order: bool) -> None:
    """Train, and tell of steps and saves in lines of JSON."""
    plan = load(plan_path, Plan)
    if any_order:
        torch.use_deterministic_algorithms = lambda *_: None  # type: ignore[assignment]

    def tell(progress: Progress) -> None:
        told = {"time_s": time.monotonic(), "phase": progress.phase, "note": progress.note}
        if progress.loss is not None:
            told |= {"step": progress.done, "loss": progress.loss}
        if progress.note or progress.loss is not None:
            print(json.dumps(told | {"peak_bytes": peak_resident_bytes()}), flush=True)

    with claimed(out, plan) as folder:
        request = RunRequest(
            plan=plan, plan_path=str(plan_path), out=folder, steps=steps, settings=SETTINGS,
            saving=Saving(every=SAVE_AT, keep=1) if save else None, disk=OneCheckpoint(),
        )  # fmt: skip
        execute(request, tell)


def trained(plan: Path, out: Path, *, save: bool, any_order: bool = False) -> list[dict]:
    """What a child told; one that saves is killed some steps after its save is whole."""
    command = [sys.executable, __file__, "child", str(plan), str(out), "--save" if save else "--no-save"]
    process = subprocess.Popen(command + ["--any-order"] * any_order, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told: list[dict] = []
    saved = None
    for line in process.stdout:
        told.append(json.loads(line))
        print(line.strip()[:300], flush=True)
        if told[-1]["note"].startswith("saved "):
            saved = len(told)
        if saved is not None and len(told) >= saved + AFTER_SAVE:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    return told


def command(*arguments: object) -> dict:
    """Run one; seconds, and peak memory of the largest process so far."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"command": " ".join(map(str, arguments)), "seconds": time.monotonic() - started, "peak_bytes": peak}


def keep(out: Path, name: str, found: dict) -> None:
    about = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {"slideplan": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (out / name).write_text(json.dumps(about | found, indent=1) + "\n")


def about_save(plan_path: Path, told: list[dict]) -> dict:
    plan = load(plan_path, Plan)
    save = plan.prediction.save
    assert save is not None
    return {
        "told": told,
        "planned": {
            "checkpoint_bytes": save.checkpoint_bytes,
            "staging_bytes": save.staging_bytes,
            "drain_s": save.drain_ns / 1e9,
            "pause_s": (save.pause_ns(save.checkpoint_bytes) or 0) / 1e9,
            "added_at_500": save.added(save.checkpoint_bytes, 500, plan.prediction.record.step_ns),
            "step_s": plan.prediction.record.step_ns / 1e9,
            "host_bytes": plan.ledger.tiers[Tier.HOST].used_bytes,
            "host_capacity_bytes": plan.ledger.tiers[Tier.HOST].capacity_bytes,
        },
        "peak_bytes": max(each["peak_bytes"] for each in told),
    }


def train(folder: Path, out: Path, model: str, batch: int, parts: Sequence[str]) -> None:
    storage = [sys.executable, str(Path(__file__).with_name("storage.py")), "--folder", str(folder), "--gib", "8"]
    if "drive" in parts:
        subprocess.run(
            [*storage, "--threads", "4", "--blocks", "8", "--rounds", "2", "-o", str(out / "storage.json")], check=True
        )
    profile = folder / "profile.json"
    with contextlib.chdir(folder):
        command("planner", "profile", "--quick", "--model", model, "--micro-batch", batch, "--name", "here", "-o", profile)
    plan, full = folder / "plan.json", folder / "plan-full.json"
    wanted = ["planner", "simulate", "--model", model, "--machine", profile, "--seq-len", 1024, "--global-batch", batch]
    command(*wanted, "-o", plan)
    # As much host memory as makes the plan fit and leaves the least ring.
    host = load(plan, Plan).ledger.tiers[Tier.HOST].used_bytes
    command(*wanted, "--host-memory", f"{(host * 100 // 97 >> 20) + 600}MiB", "-o", full)
    for file in (profile, plan, full):
        shutil.copy(file, out)
    found = {"whole": trained(plan, folder / "whole", save=False)}
    if "any-order" in parts:
        found["any order"] = trained(plan, folder / "any-order", save=False, any_order=True)
    keep(out, "whole.json", found)
    for name, path in (("full-host", full), ("room", plan)):
        if name in parts:
            shutil.rmtree(folder / "run", ignore_errors=True)
            keep(out, f"save-{name}.json", about_save(path, trained(path, folder / "run", save=True)))


def resume(folder: Path, out: Path) -> None:
    run = folder / "run"
    whole = [json.loads(line)["loss"] for line in (folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    resumed = command("runtime", "resume", run, "--steps", STEPS, "--no-save", "--json")
    after = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    checkpoint = run / "checkpoints" / f"step-{SAVE_AT:08}"
    exported = command("runtime", "export", run, "-o", folder / "exported")
    found = {
        "resumed": resumed,
        "steps before the kill": len(before),
        "steps after": len(after),
        "losses equal": after == whole,
        "losses": {"whole": whole, "cut": after},
        "exported": exported,
        "exported_bytes": sum(file.stat().st_size for file in (folder / "exported").iterdir()),
        "host_bytes_planned": load(run / "plan.json", Plan).ledger.tiers[Tier.HOST].used_bytes,
    }
    found["logits"] = logits(checkpoint, folder / "exported", load(run / "plan.json", Plan))
    keep(out, "resume.json", found)
    shutil.copy(run / "comparison.json", out)
    print(json.dumps(found["logits"]), found["losses equal"], exported, flush=True)


def logits(checkpoint: Path, exported: Path, plan: Plan) -> dict:
    """Of the export, and of the same network with the trained masters, put together from halves and rounded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").to(device).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, plan.model.vocabulary, (2, 512), generator=generator).to(device)
    with torch.no_grad():
        first = network(tokens).logits.float()
        parameters, model, ties = dict(network.named_parameters()), plan.model, 0
        for unit in range(model.units):
            name = f"-{unit + 1:05}-of-{model.units:05}.safetensors"
            high = safe_open(checkpoint / f"model{name}", "pt")
            low = safe_open(checkpoint / f"optimizer{name}", "pt").get_tensor("remainder")
            for each in model.parameters(model.role(unit)):
                full = model.unit_prefix(unit) + each.name
                half = high.get_tensor(full).to(device)
                part = low[each.offset : each.offset + each.elements].to(device)
                master = join(half.reshape(-1), part).view(each.shape).bfloat16()
                ties += int((master != half).sum())
                assert torch.equal(parameters[full], master), full
                parameters[full].copy_(master)
        second = network(tokens).logits.float()
        text = network.generate(tokens[:1, :8], max_new_tokens=8, do_sample=False)[0].tolist()
    return {"equal": bool(torch.equal(first, second)), "elements rounded otherwise in training": ties, "generated": text}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage in ("train", "resume"):
        each = stages.add_parser(stage)
        each.add_argument("folder", type=Path)
        each.add_argument("-o", dest="out", type=Path, required=True)
        each.add_argument("--model", default="llama-3.1-8b")
        each.add_argument("--global-batch", type=int, default=16)
        each.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of `train`: which of its measurements")
    one = stages.add_parser("child")
    one.add_argument("plan", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--save", action=argparse.BooleanOptionalAction)
    one.add_argument("--any-order", action="store_true")
    wanted = parser.parse_args()
    if wanted.stage == "child":
        child(wanted.plan, wanted.out, STEPS, wanted.save, wanted.any_order)
        return
    wanted.folder.mkdir(parents=True, exist_ok=True)
    wanted.out.mkdir(parents=True, exist_ok=True)
    if wanted.stage == "train":
        train(wanted.folder.absolute(), wanted.out.absolute(), wanted.model, wanted.global_batch, wanted.parts)
    else:
        resume(wanted.folder.absolute(), wanted.out.absolute())


if __name__ == "__main__":
    main()
