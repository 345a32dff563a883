"""The `planner` command: profile a machine, plan for it, list what the catalogues hold."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from contextlib import ExitStack
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from slideplan.plan import codec
from slideplan.plan.machine import MachineProfile
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import Plan
from slideplan.plan.policy import Workload, check_seq_len
from slideplan.plan.quantities import parse_bytes
from slideplan.planner import report
from slideplan.planner.catalogue import MODELS, find_model
from slideplan.planner.compare import compare_peers
from slideplan.planner.machines import LOCAL_PROFILES, default_machine, find_machine, machines, with_budget
from slideplan.planner.search import search
from slideplan.planner.shortfall import DoesNotFit
from slideplan.planner.space import SearchOptions, micro_batch_sizes

EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT = 2, 3
DEFAULT_SEQ_LEN = 1024

app = typer.Typer(
    help="Plan full-parameter fine-tuning on one GPU that is too small for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": report.WIDTH},
)


class Placement(StrEnum):
    """Choices of --placement."""

    AUTO = "auto"
    HOST = "host"


class GradientDtypeChoice(StrEnum):
    """Choices of --gradient-dtype."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class Device(StrEnum):
    """Choices of --device."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable result, and nothing else, to stdout.")]
GpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much GPU memory, like 24GiB.")]
HostMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much RAM, like 128GiB.")]


def main() -> None:
    """Entry point: what the user got wrong is one line on stderr and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)


@app.command()
def simulate(
    model: Annotated[str, typer.Option(help="Name in `planner models`, or a directory with a Hugging Face config.json.")],
    machine: Annotated[
        str | None, typer.Option(help="Name in `planner machines`, or a profile's file; default: this machine's, if measured.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help=f"Tokens per sequence; default {DEFAULT_SEQ_LEN}, or as many as the model takes.")
    ] = None,
    global_batch: Annotated[int, typer.Option(help="Sequences per optimizer step.")] = 8,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that pass a unit at once; default: searched.")] = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    placement: Annotated[
        Placement, typer.Option(help="host: offload all weights and state, even where they fit.")
    ] = Placement.AUTO,
    gradient_dtype: Annotated[
        GradientDtypeChoice, typer.Option(help="auto: fp32 sums over several micro-batches, bf16 for a single one.")
    ] = GradientDtypeChoice.AUTO,
    effort: Annotated[float, typer.Option(help="Budget of the search, as a multiple of the usual one.")] = 1.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here, for `runtime execute`.")] = None,
    as_json: Json = False,
) -> None:
    r"""Plan a model on a machine and predict its step.

    \b
    Examples:
      planner simulate --model 123b
      planner simulate --model llama-3.1-8b --global-batch 64 --gpu-memory 24GiB -o plan.json
      planner simulate --model ./my-model --machine profiles/here.json --seq-len 4096

    \b
    Exit codes: 0 a plan was found, 2 bad input, 3 the model does not fit.
    """
    spec = find_model(model)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, spec.max_positions, spec.sliding_window or spec.max_positions)
    workload = Workload(seq_len=seq_len, global_batch=global_batch)
    if not 0 < effort < 10_000:
        raise ValueError(f"--effort is {effort}, must be above 0 and below 10000")
    usual = SearchOptions()
    options = SearchOptions(
        placement=placement.value,
        gradient_dtype=gradient_dtype.value,
        micro_batch=micro_batch,
        lowered_tasks=round(usual.lowered_tasks * effort),
        simulated_tasks=round(usual.simulated_tasks * effort),
    )
    # All that can be wrong is looked at before a machine is chosen, so that an error stands alone.
    check_seq_len(spec, seq_len)
    micro_batch_sizes(workload, options)
    budget = _size("--gpu-memory", gpu_memory), _size("--host-memory", host_memory)
    if output is not None:
        _check_writable(output)
    answer = _search(spec, workload, with_budget(_machine(machine), *budget), options)
    if as_json:
        _print_json(answer)
    else:
        report.print_answer(report.console(), answer)
    if isinstance(answer, DoesNotFit):
        if output is not None:
            _note(f"{output}: not written, there is no plan")
        raise typer.Exit(EXIT_DOES_NOT_FIT)
    if output is not None:
        codec.save(output, answer)
        _note(f"plan written to {output}; run it with `runtime execute {output}`")
    elif not as_json:
        _note("plan not saved; `-o plan.json` saves it for `runtime execute`")


@app.command("models")
def list_models(as_json: Json = False) -> None:
    r"""List the models of the catalogue.

    Training state is 12 bytes per parameter: fp32 weights and two moments.

    \b
    Examples:
      planner models
      planner models --json
    """
    if as_json:
        _print_json([{"parameters": model.parameter_count, **msgspec.to_builtins(model)} for model in MODELS.values()])
    else:
        report.console().print(report.models_table(MODELS.values()))


@app.command("machines")
def list_machines(as_json: Json = False) -> None:
    r"""List the machine profiles.

    The shipped ones and those in ./profiles, where `planner profile` writes.

    \b
    Examples:
      planner machines
      planner machines --json
    """
    profiles: dict[str, MachineProfile] = {}
    for name, file in machines().items():
        try:
            profiles[name] = codec.load(file, MachineProfile)
        except ValueError as error:  # one broken file must not hide the others
            _note(f"left out: {error}")
    if as_json:
        _print_json([{"name": name, "profile": profile} for name, profile in profiles.items()])
    else:
        report.console().print(report.machines_table(profiles))


@app.command()
def profile(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: profiles/NAME.json.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the profile; default: the output's, or the computer's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repetitions: under a minute.")] = False,
    model: Annotated[
        list[str] | None, typer.Option(help="Model whose units are timed, repeatable; default llama-3.1-8b, demo on a CPU.")
    ] = None,
    micro_batch: Annotated[list[int] | None, typer.Option(help="Micro-batch to time units at, repeatable.")] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Sequence length to time units at, repeatable.")] = None,
    device: Annotated[Device, typer.Option(help="Where compute runs; auto: a GPU if there is one.")] = Device.AUTO,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
) -> None:
    r"""Measure this machine.

    Links, CPU optimizer, SSD, and the units of chosen models, through the runtime's own handlers.

    \b
    Examples:
      planner profile --quick
      planner profile --model llama-3.1-8b --micro-batch 4 --micro-batch 16 --seq-len 1024
      planner profile --device cpu --model demo -o profiles/laptop.json
    """
    try:
        from slideplan.runtime.probes import ProfileRequest, profile_machine  # noqa: PLC0415 - the only part that needs torch
    except ImportError as error:
        raise ValueError(f"profiling needs the runtime: install slideplan[runtime] ({error})") from None
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
    _check_writable(output)
    request = ProfileRequest(
        name=name,
        models=models,
        shapes=tuple(product(sizes, lengths)),
        quick=quick,
        device=device.value,
        gpu_memory_bytes=_size("--gpu-memory", gpu_memory),
        host_memory_bytes=_size("--host-memory", host_memory),
        command=" ".join(["planner", *sys.argv[1:]]),
    )
    err = report.console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err, transient=True) as bar:
        running = bar.add_task("starting", total=None)
        measured = profile_machine(
            request, lambda what, done, total: bar.update(running, description=what, completed=done, total=total)
        )
    codec.save(output, measured)
    out = report.console()
    out.print(report.machines_table({measured.name: measured}))
    out.print()
    out.print(report.profile_table(measured))
    _note(f"profile written to {output}; plan with `planner simulate --model ... --machine {output}`")


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Name in `planner models`, or a directory with a Hugging Face config.json.")],
    machine: Annotated[
        str | None, typer.Option(help="Name in `planner machines`, or a profile's file; default: this machine's, if measured.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help=f"Tokens per sequence; default {DEFAULT_SEQ_LEN}, or as many as the model takes.")
    ] = None,
    global_batch: Annotated[int, typer.Option(help="Sequences per optimizer step.")] = 8,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    as_json: Json = False,
) -> None:
    r"""Compare our plan with other systems on a machine.

    SlideFormer, DeepSpeed ZeRO-3 with offload and MegaTrain as policies of our own language, priced by the same
    simulator at the rates of our kernels: what they do, not how well they are written.

    \b
    Examples:
      planner compare --model llama-3.1-8b --global-batch 16
      planner compare --model qwen3-8b --machine rtx4090-2tib --seq-len 2048 --json

    \b
    Exit codes: 0 a plan was found, 2 bad input, 3 the model does not fit, whatever peers need.
    """
    spec = find_model(model)
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, spec.max_positions, spec.sliding_window or spec.max_positions)
    workload = Workload(seq_len=seq_len, global_batch=global_batch)
    check_seq_len(spec, seq_len)
    budget = _size("--gpu-memory", gpu_memory), _size("--host-memory", host_memory)
    profiled = with_budget(_machine(machine), *budget)
    answer = _search(spec, workload, profiled, SearchOptions())
    comparison = compare_peers(answer, profiled)
    if as_json:
        _print_json(comparison)
    else:
        report.print_comparison(report.console(), comparison)
    if isinstance(answer, DoesNotFit):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


# -- helpers -----------------------------------------------------------------------------------


def _search(model: ModelSpec, workload: Workload, machine: MachineProfile, options: SearchOptions) -> Plan | DoesNotFit:
    err = report.console(stderr=True)
    with ExitStack() as stack:
        if not err.is_terminal:
            return search(model, workload, machine, options)
        status = stack.enter_context(err.status("searching"))
        return search(model, workload, machine, options, lambda what: status.update(f"searching: {what}"))


def _machine(name: str | None) -> MachineProfile:
    if name is not None:
        return find_machine(name)
    machine, measured = default_machine()
    if not measured:
        _note(
            f"no profile of this machine in {LOCAL_PROFILES}/: taking the shipped {machine.name} "
            f"({machine.gpu.name}, datasheet figures); `planner profile` measures this machine, --machine names another"
        )
    return machine


def _has_gpu() -> bool:
    import torch  # noqa: PLC0415 - only with the runtime installed

    return torch.cuda.is_available()


def _size(option: str, text: str | None) -> int | None:
    if text is None:
        return None
    try:
        size = parse_bytes(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None
    if size < 1:
        raise ValueError(f"{option} is {text}, must be positive")
    return size


def _check_writable(path: Path) -> None:
    """Better to learn it before minutes of work than after."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: cannot be written in {folder}: {error.strerror}") from None


def _print_json(result: Any) -> None:
    encoded = msgspec.json.encode(result, order="deterministic")
    sys.stdout.write(msgspec.json.format(encoded, indent=1).decode() + "\n")


def _note(text: str) -> None:
    print(text, file=sys.stderr)
