"""`runtime execute` and `runtime resume`: train, and compare with what was predicted."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from runtime import run
from runtime.bars import ProgressBars
from runtime.checkpoints.keeper import newest
from runtime.checkpoints.manifest import Saving
from runtime.checkpoints.resuming import asked, candidates
from runtime.commands.output import Json, compare_finished, note
from runtime.folder import PLAN, claimed, reopened
from runtime.optimizer.adamw import AdamW
from slideplan.codec import load
from slideplan.command import Device, path
from slideplan.measurement import Measurement
from slideplan.plan import Plan

DEFAULTS, SAVING = AdamW(), Saving()


DeviceName = Annotated[Device, typer.Option(help="auto: a GPU if there is one.")]
TokenCache = Annotated[
    Path | None, typer.Option(parser=path, help="Folder that keeps prepared tokens; default: ~/.cache/slideplan/tokens.")
]
Ssd = Annotated[
    list[Path] | None,
    typer.Option(
        parser=path,
        help="Folder on the drive, for state that the plan has there. Nothing stays in it. Repeatable: one on each of several "
        "drives, over which state is spread by their speed.",
    ),
]
Warmup = Annotated[int, typer.Option(help="First steps that are not judged.")]


def execute(
    plan: Annotated[Path, typer.Argument(parser=path, help="A plan written by `planner simulate -o`.")],
    data: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Text, JSON lines with a field `text`, or a folder of them; default: sources of Python's standard library.",
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Hugging Face directory (safetensors, tokenizer.json); default: random weights and bytes as tokens.",
        ),
    ] = None,
    byte_tokens: Annotated[
        bool, typer.Option("--byte-tokens", help="Bytes are tokens even with --weights that have no tokenizer.json.")
    ] = False,
    document_end: Annotated[
        str,
        typer.Option(
            metavar="TOKEN",
            help="What ends each document: a token of the tokenizer; auto: its end-of-text token, else two line feeds; none.",
        ),
    ] = "auto",
    ssd: Ssd = None,
    token_cache: TokenCache = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 10,
    save_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Save a checkpoint after so many steps each; default: at the end alone.")
    ] = None,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay; older ones are removed.")] = SAVING.keep,
    save_weights_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="Save the weights alone after so many steps each; all of them stay.")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing of what is trained.")] = False,
    device: DeviceName = Device.AUTO,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", parser=path, help="Run folder; default: runs/MODEL-DATE.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate, constant.")] = DEFAULTS.lr,
    beta1: float = DEFAULTS.beta1,
    beta2: float = DEFAULTS.beta2,
    eps: float = DEFAULTS.eps,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on every parameter.")] = DEFAULTS.weight_decay,
    seed: Annotated[int, typer.Option(help="Of random weights and of the order of sequences.")] = 0,
    warmup: Warmup = 2,
    as_json: Json = False,
) -> None:
    """Train for some steps exactly as planned, keep what was learned, then compare with the prediction.

    The run folder receives plan.json, run.json, metrics.jsonl, checkpoints/, measurement.json, comparison.json,
    comparison.txt, trace.json (for Perfetto or chrome://tracing) and lanes.png.

    A checkpoint is a Hugging Face directory with the optimizer's state beside the weights: transformers reads it as it is,
    `runtime resume` goes on from it, bit for bit, and `runtime export` makes a folder of the weights alone.

    Ctrl-C finishes the step, saves, and says how to go on; a second one stops at once. SIGTERM does the same.

    \b
    Examples:
      runtime execute plan.json
      runtime execute plan.json --data ./texts --weights ./Llama-3.1-8B --steps 1000 --lr 1e-5 --save-every 200 -o runs/first
      runtime execute plan.json --steps 20 --no-save
      runtime execute plan.json --ssd /mnt/nvme --ssd /mnt/nvme2

    \b
    Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    document = load(plan, Plan)
    settings = AdamW(lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    saving = _saving(Saving(), save_every, save_weights_every, keep, no_save)
    with claimed(out, document) as folder:
        request = run.RunRequest(
            plan=document,
            plan_path=str(plan),
            out=folder,
            steps=steps,
            device=device,
            data=data,
            weights=weights,
            ssd=ssd or (),
            byte_tokens=byte_tokens,
            document_end=document_end,
            token_cache=token_cache,
            settings=settings,
            seed=seed,
            warmup_steps=warmup,
            command=_command(),
            saving=saving,
        )
        with ProgressBars(document.workload.tokens) as bars:
            measurement = run.execute(request, bars.show)
        compare_finished(folder, as_json)
    _say_where(folder, measurement, no_save)


def resume(
    folder: Annotated[Path, typer.Argument(parser=path, help="A run folder written by `runtime execute`.")],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps in all; default: as many as were asked for.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Go on from the checkpoint after this many steps; default: the newest.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(parser=path, help="Go on with this plan of the same model; default: the run's own.")
    ] = None,
    data: Annotated[Path | None, typer.Option(parser=path, help="Where the data are now; default: where they were.")] = None,
    data_changed: Annotated[bool, typer.Option("--data-changed", help="Go on though the data are not the same.")] = False,
    ssd: Ssd = None,
    token_cache: TokenCache = None,
    save_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="As of `runtime execute`, 0: at the end alone; default: as it was.")
    ] = None,
    keep: Annotated[int | None, typer.Option(help="Checkpoints that stay; default: as it was.")] = None,
    save_weights_every: Annotated[
        int | None, typer.Option(metavar="STEPS", help="As of `runtime execute`, 0: never; default: as it was.")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Keep nothing of what is trained from here on.")] = False,
    lr: Annotated[float | None, typer.Option(help="Learning rate from here on; default: as it was.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="From here on; default: as it was.")] = None,
    device: DeviceName = Device.AUTO,
    warmup: Warmup = 2,
    as_json: Json = False,
) -> None:
    """Go on with a run from its newest checkpoint: the same weights, losses and data, bit for bit, as without a break.

    Files are checked against their checksums while they are read; where a checkpoint is damaged, the one before is taken.
    Another plan may have another window, other tiers, micro-batches, kernels or sizes of memory: state is stored by unit and
    tensor class, not by where it lay. (Other micro-batches and kernels round in other places.) metrics.jsonl goes on; the
    comparison covers the steps since. Steps, data, settings and when to save hold for later resumes too.

    With --step S the run goes on from an earlier checkpoint. Newer ones are kept under other names (left-step-...), and lines
    of metrics.jsonl after step S are cut off.

    \b
    Examples:
      runtime resume runs/first
      runtime resume runs/first --steps 2000 --save-every 500
      runtime resume runs/first --step 400 --lr 5e-6
      runtime resume runs/first --plan plan-for-the-new-card.json

    \b
    Exit codes: 0 done, 1 the run failed, 2 bad input, 130 interrupted, 143 terminated.
    """  # noqa: D301 - as above
    with reopened(folder):
        plan_path = plan or folder / PLAN
        document = load(plan_path, Plan) if plan else _own_plan(folder)
        with ProgressBars(document.workload.tokens) as bars, _way_on(folder):
            found = candidates(folder, bars.show, step)
            before = asked(folder, found)
            request = run.RunRequest(
                plan=document,
                plan_path=str(plan_path),
                out=folder,
                steps=before.steps if steps is None else steps,
                device=device,
                data=data or (None if before.data is None else Path(before.data)),
                ssd=ssd or [Path(each) for each in before.ssd],
                token_cache=token_cache,
                settings=_settings(before.settings, lr, weight_decay),
                warmup_steps=warmup,
                command=_command(),
                saving=_saving(before.saving, save_every, save_weights_every, keep, no_save),
                found=found,
                data_changed=data_changed,
            )
            measurement = run.execute(request, bars.show)
        compare_finished(folder, as_json)
    _say_where(folder, measurement, no_save)


def _own_plan(folder: Path) -> Plan:
    try:
        return load(folder / PLAN, Plan)
    except ValueError as error:
        raise ValueError(f"{error}; name a plan of the same model with --plan") from None


@contextlib.contextmanager
def _way_on(folder: Path) -> Iterator[None]:
    """Whoever interrupts a resume that saves nothing yet, or never does, is told how to go on."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", []):
            stop.add_note(f"nothing new is saved; `runtime resume {folder}` goes on")
        raise


def _saving(before: Saving, every: int | None, weights_every: int | None, keep: int | None, no_save: bool) -> Saving | None:
    if no_save and (every or weights_every):
        raise ValueError("--no-save keeps nothing, --save-every and --save-weights-every ask to save; leave one of them out")
    given = {"every": every, "weights_every": weights_every, "keep": keep}
    changed = msgspec.structs.replace(before, **{name: value for name, value in given.items() if value is not None})
    return None if no_save else changed


def _settings(before: AdamW, lr: float | None, weight_decay: float | None) -> AdamW:
    given = {"lr": lr, "weight_decay": weight_decay}
    return dataclasses.replace(before, **{name: value for name, value in given.items() if value is not None})


def _command() -> str:
    return shlex.join(["runtime", *sys.argv[1:]])


def _say_where(folder: Path, measurement: Measurement, no_save: bool) -> None:
    losses = measurement.losses
    checkpoint = newest(folder)
    where = (
        "nothing was kept of what was trained (--no-save)"
        if checkpoint is None or no_save
        else f"trained weights: {checkpoint}; `runtime export {folder} -o DIR` makes a folder of them alone"
    )
    note(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps; run folder: {folder}; {where}")
