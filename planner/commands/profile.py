"""`planner profile`: the one command that needs the runtime."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from planner.catalogue.machines import LOCAL_PROFILES, default_machine, find_machine
from planner.catalogue.models import find_model
from planner.commands.options import (
    DEFAULT_SEQ_LEN,
    EXIT_DOES_NOT_HOLD,
    GpuMemory,
    HostMemory,
    MeasuredKernels,
    check_writable,
    note,
    size_of,
)  # fmt: skip
from planner.reports import machines as report_machines
from planner.reports.tables import console
from slideplan import codec
from slideplan.command import Device, check_folders, on_one_device, path
from slideplan.machine.figures import changes, figures
from slideplan.machine.profile import MachineProfile, Spread
from slideplan.progress import Show


def profile(
    existing: Annotated[
        str | None, typer.Argument(metavar="PROFILE", help="With --check: a profile's name or file; default: this machine's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", parser=path, help="Default: profiles/NAME.json.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: the output's, or the computer's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repetitions: under a minute.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="Model whose units are timed, repeatable; default llama-3.1-8b, demo on a CPU.")
    ] = None,
    micro_batch: Annotated[list[int] | None, typer.Option(help="Micro-batch to time units at, repeatable.")] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Sequence length to time units at, repeatable.")] = None,
    kernels: Annotated[
        list[MeasuredKernels] | None, typer.Option(help="Kernels to time units by, repeatable; default: all.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where compute runs; auto: a GPU if there is one.")] = Device.AUTO,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    ssd: Annotated[
        list[Path] | None,
        typer.Option(
            parser=path,
            help="Folder on the drive to measure; default: the working folder. Repeatable: one on each of several drives, "
            "which are measured together, as a run uses them.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Measure a few figures of PROFILE again and say whether they hold; write nothing.")
    ] = False,
) -> None:
    """Measure this machine.

    Links, CPU optimizer, SSD, how they slow each other, and the units of chosen models, through the
    runtime's own handlers. A profile that replaces one of the same machine is held against it.

    \b
    Examples:
      planner profile --quick
      planner profile --model llama-3.1-8b --micro-batch 4 --micro-batch 16 --seq-len 1024
      planner profile --device cpu --model demo -o profiles/laptop.json
      planner profile --ssd /mnt/nvme
      planner profile --ssd /mnt/nvme --ssd /mnt/nvme2
      planner profile --check profiles/laptop.json

    \b
    Exit codes: 0 measured, or all figures checked hold; 2 bad input; 4 a figure checked does not hold.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    try:
        from runtime.probes.profile import ProfileRequest, measure_again, profile_machine  # noqa: PLC0415 - needs torch
    except ImportError as error:
        raise ValueError(f"profiling needs the runtime: install slideplan[runtime] ({error})") from None
    if check:
        _check(_measured(existing), measure_again)
        return
    if existing is not None:
        raise ValueError(f"{existing}: only --check takes a profile; --output names the file to write")
    on_gpu = device is Device.CUDA or (device is Device.AUTO and _has_gpu())
    models = tuple(find_model(each) for each in model or (["llama-3.1-8b"] if on_gpu else ["demo"]))
    sizes = micro_batch or ([8] if quick else [1, 4, 16])
    lengths = seq_len or [min(DEFAULT_SEQ_LEN if on_gpu else 256, *(each.max_positions for each in models))]
    if min([*sizes, *lengths]) < 1:
        raise ValueError("--micro-batch and --seq-len must be at least 1")
    for each in models:
        if max(lengths) > each.max_positions:
            raise ValueError(f"--seq-len {max(lengths)} exceeds the {each.max_positions} positions of {each.name}")
    if name is None:
        name = output.stem if output else re.sub(r"[^a-z0-9.-]+", "-", platform.node().lower()).strip("-.") or "here"
    elif not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"--name {name!r}: letters, digits, dots, dashes and underscores only")
    output = output or LOCAL_PROFILES / f"{name}.json"
    check_writable(output)
    check_folders(ssd or (), "name one on the drive to measure")
    for warning in on_one_device(ssd or ()):
        note(warning)
    request = ProfileRequest(
        name=name,
        models=models,
        shapes=tuple(product(sizes, lengths)),
        kernels=tuple(each.value for each in kernels or MeasuredKernels),
        quick=quick,
        device=device.value,
        gpu_memory_bytes=size_of("--gpu-memory", gpu_memory),
        host_memory_bytes=size_of("--host-memory", host_memory),
        command=" ".join(["planner", *sys.argv[1:]]),
        ssd=tuple(ssd or ()),
    )
    with _progress() as show:
        measured = profile_machine(request, show)
    before = _replaced(output, measured)
    codec.save(output, measured)
    out = console()
    out.print(report_machines.machines_table({measured.name: measured}))
    out.print()
    out.print(report_machines.profile_table(measured))
    if before is not None:
        out.print()
        out.print(
            report_machines.changes_report(
                changes(figures(before), {name: each.spread for name, each in figures(measured).items()})
            )
        )
    note(f"profile written to {output}; plan with `planner simulate --model ... --machine {output}`")


@contextmanager
def _progress() -> Iterator[Show]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        running = bar.add_task("starting", total=None)
        yield lambda step: bar.update(running, description=step.phase, completed=step.done, total=step.total)


def _measured(name: str | None) -> MachineProfile:
    """The profile to check. Raises ValueError for one that nobody measured."""
    if name is not None:
        machine, missing = find_machine(name, note), f"{name}: figures from datasheets"
    else:
        choice = default_machine()
        machine, missing = choice.machine, f"no profile of this machine in {LOCAL_PROFILES}/"
        if choice.is_here:
            for each in choice.notes:
                note(each)
    if machine.provenance.source != "measured":
        raise ValueError(f"{missing}, there is nothing to check; `planner profile` measures this machine")
    return machine


def _check(machine: MachineProfile, again: Callable[[MachineProfile, Show], dict[str, Spread]]) -> None:
    with _progress() as show:
        now = again(machine, show)
    found = changes(figures(machine), now)
    out = console()
    out.print(report_machines.checks_table(found))
    failed = sum(not each.holds for each in found)
    if failed:
        note(f"{machine.name}: {failed} of {len(found)} figures do not hold; `planner profile` measures anew")
        raise typer.Exit(EXIT_DOES_NOT_HOLD)
    note(f"{machine.name}: all {len(found)} figures hold")


def _replaced(output: Path, measured: MachineProfile) -> MachineProfile | None:
    """The profile of the same machine that stands where this one goes, if one does."""
    try:
        before = codec.load(output, MachineProfile)
    except ValueError:  # none, or not one that can be read: nothing to hold it against
        return None
    return before if before.identity() == measured.identity() else None


def _has_gpu() -> bool:
    import torch  # noqa: PLC0415 - only with the runtime installed

    return torch.cuda.is_available()
