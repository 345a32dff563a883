"""The `planner` command: profile a machine, plan for it, list what the catalogues hold."""

from __future__ import annotations

import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from slideplan.plan import codec
from slideplan.plan.figures import changes, figures
from slideplan.plan.machine import MachineProfile, Spread
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import Plan
from slideplan.plan.policy import Workload, check_seq_len
from slideplan.plan.quantities import parse_bytes
from slideplan.planner import report
from slideplan.planner.catalogue import MODELS, find_model
from slideplan.planner.compare import compare_peers
from slideplan.planner.machines import LOCAL_PROFILES, default_machine, find_machine, machines, with_budget
from slideplan.planner.search import batches_within, search
from slideplan.planner.shortfall import DoesNotFit
from slideplan.planner.space import SearchOptions, micro_batch_sizes

EXIT_FAILED, EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_DOES_NOT_HOLD = 1, 2, 3, 4
DEFAULT_SEQ_LEN = 1024
DEFAULT_BATCH = 8

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


class Objective(StrEnum):
    """Choices of --objective."""

    THROUGHPUT = "throughput"
    LEAST_HOST_MEMORY = "least-host-memory"


class GradientDtypeChoice(StrEnum):
    """Choices of --gradient-dtype."""

    AUTO = "auto"
    BF16 = "bf16"
    FP32 = "fp32"


class KernelsChoice(StrEnum):
    """Choices of --kernels."""

    AUTO = "auto"
    EAGER = "eager"
    FUSED = "fused"
    GRAPHED = "graphed"


class MeasuredKernels(StrEnum):
    """Choices of --kernels where they are measured."""

    EAGER = "eager"
    FUSED = "fused"
    GRAPHED = "graphed"


class Device(StrEnum):
    """Choices of --device."""

    AUTO = "auto"
    CUDA = "cuda"
    CPU = "cpu"


Json = Annotated[bool, typer.Option("--json", help="Print the machine-readable result, and nothing else, to stdout.")]
ModelName = Annotated[str, typer.Option(help="Name in `planner models`, or a directory with a Hugging Face config.json.")]
MachineName = Annotated[
    str | None, typer.Option(help="Name in `planner machines`, or a profile's file; default: this machine's, if measured.")
]
SeqLen = Annotated[
    int | None, typer.Option(help=f"Tokens per sequence; default {DEFAULT_SEQ_LEN}, or as many as the model takes.")
]
GpuMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much GPU memory, like 24GiB.")]
HostMemory = Annotated[str | None, typer.Option(metavar="SIZE", help="Plan for this much RAM, like 128GiB.")]


def main() -> None:
    """Entry point: what the user got wrong is one line on stderr and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except (MemoryError, OSError) as error:
        print(f"planner: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


@app.command()
def simulate(
    model: ModelName,
    machine: MachineName = None,
    seq_len: SeqLen = None,
    global_batch: Annotated[int | None, typer.Option(help=f"Sequences per optimizer step; default {DEFAULT_BATCH}.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that pass a unit at once; default: searched.")] = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    placement: Annotated[
        Placement, typer.Option(help="host: offload all weights and state, even where they fit.")
    ] = Placement.AUTO,
    gradient_dtype: Annotated[
        GradientDtypeChoice, typer.Option(help="auto: fp32 sums over several micro-batches, bf16 for a single one.")
    ] = GradientDtypeChoice.AUTO,
    kernels: Annotated[
        KernelsChoice, typer.Option(help="auto: by what the profile measured, eager, fused or captured in graphs.")
    ] = KernelsChoice.AUTO,
    objective: Annotated[Objective, typer.Option(help="What the plan is best at.")] = Objective.THROUGHPUT,
    at_least: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="least-host-memory: keep this share of the best speed; default 95%.")
    ] = None,
    max_tokens_per_step: Annotated[
        int | None, typer.Option(metavar="N", help="Search the global batch too: at most this many tokens per step.")
    ] = None,
    pareto: Annotated[bool, typer.Option("--pareto", help="Print what can be had for less memory.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print what the next-best value of each knob costs.")] = False,
    effort: Annotated[float, typer.Option(help="Budget of the search, as a multiple of the usual one.")] = 1.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here, for `runtime execute`.")] = None,
    as_json: Json = False,
) -> None:
    """Plan a model on a machine and predict its step.

    \b
    Examples:
      planner simulate --model 123b
      planner simulate --model llama-3.1-8b --global-batch 64 --gpu-memory 24GiB -o plan.json
      planner simulate --model ./my-model --machine profiles/here.json --seq-len 4096
      planner simulate --model llama-3.1-8b --max-tokens-per-step 65536 --pareto --explain
      planner simulate --model llama-3.1-8b --objective least-host-memory --at-least 90%

    \b
    Exit codes: 0 a plan was found, 2 bad input, 3 the model does not fit.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    spec = find_model(model)
    seq_len = _seq_len(spec, seq_len)
    if max_tokens_per_step is not None and global_batch is not None:
        raise ValueError("--max-tokens-per-step searches the global batch; leave out --global-batch, or it")
    if at_least is not None and objective is not Objective.LEAST_HOST_MEMORY:
        raise ValueError("--at-least belongs to --objective least-host-memory")
    workload = Workload(seq_len=seq_len, global_batch=DEFAULT_BATCH if global_batch is None else global_batch)
    if not 0 < effort < 10_000:
        raise ValueError(f"--effort is {effort}, must be above 0 and below 10000")
    usual = SearchOptions()
    options = SearchOptions(
        placement=placement.value,
        gradient_dtype=gradient_dtype.value,
        kernels=kernels.value,
        micro_batch=micro_batch,
        lowered_tasks=round(usual.lowered_tasks * effort),
        simulated_tasks=round(usual.simulated_tasks * effort),
        max_tokens_per_step=max_tokens_per_step,
        least_host_memory=objective is Objective.LEAST_HOST_MEMORY,
        at_least_percent=usual.at_least_percent if at_least is None else _percent("--at-least", at_least),
        pareto=pareto,
        explain=explain,
    )
    # All that can be wrong is looked at before a machine is chosen, so that an error stands alone.
    check_seq_len(spec, seq_len)
    if not batches_within(seq_len, options):
        micro_batch_sizes(workload, options)
    budget = _size("--gpu-memory", gpu_memory), _size("--host-memory", host_memory)
    if output is not None:
        _check_writable(output)
    answer = _search(spec, workload, with_budget(_machine(machine), *budget), options)
    if as_json:
        _print_json(answer)
    else:
        report.print_answer(report.console(), answer, pareto=pareto)
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
    """List the models of the catalogue.

    Training state is 12 bytes per parameter: fp32 weights and two moments.

    \b
    Examples:
      planner models
      planner models --json
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    if as_json:
        _print_json([{"parameters": model.parameter_count, **msgspec.to_builtins(model)} for model in MODELS.values()])
    else:
        report.console().print(report.models_table(MODELS.values()))


@app.command("machines")
def list_machines(as_json: Json = False) -> None:
    """List the machine profiles.

    The shipped ones and those in ./profiles, where `planner profile` writes.

    \b
    Examples:
      planner machines
      planner machines --json
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
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
    existing: Annotated[
        str | None, typer.Argument(metavar="PROFILE", help="With --check: a profile's name or file; default: this machine's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: profiles/NAME.json.")] = None,
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
      planner profile --check profiles/laptop.json

    \b
    Exit codes: 0 measured, or all figures checked hold; 2 bad input; 4 a figure checked does not hold.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    try:
        from slideplan.runtime.probes import ProfileRequest, check_machine, profile_machine  # noqa: PLC0415 - needs torch
    except ImportError as error:
        raise ValueError(f"profiling needs the runtime: install slideplan[runtime] ({error})") from None
    if check:
        _check(_measured(existing), check_machine)
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
    _check_writable(output)
    request = ProfileRequest(
        name=name,
        models=models,
        shapes=tuple(product(sizes, lengths)),
        kernels=tuple(each.value for each in kernels or MeasuredKernels),
        quick=quick,
        device=device.value,
        gpu_memory_bytes=_size("--gpu-memory", gpu_memory),
        host_memory_bytes=_size("--host-memory", host_memory),
        command=" ".join(["planner", *sys.argv[1:]]),
    )
    with _progress() as show:
        measured = profile_machine(request, show)
    before = _replaced(output, measured)
    codec.save(output, measured)
    out = report.console()
    out.print(report.machines_table({measured.name: measured}))
    out.print()
    out.print(report.profile_table(measured))
    if before is not None:
        out.print()
        out.print(
            report.changes_report(changes(figures(before), {name: each.spread for name, each in figures(measured).items()}))
        )
    _note(f"profile written to {output}; plan with `planner simulate --model ... --machine {output}`")


@app.command()
def compare(
    model: ModelName,
    machine: MachineName = None,
    seq_len: SeqLen = None,
    global_batch: Annotated[int, typer.Option(help="Sequences per optimizer step.")] = DEFAULT_BATCH,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    as_json: Json = False,
) -> None:
    """Compare our plan with other systems on a machine.

    SlideFormer, DeepSpeed ZeRO-3 with offload and MegaTrain as policies of our own language, priced by the same
    simulator at the rates of our kernels: what they do, not how well they are written.

    \b
    Examples:
      planner compare --model llama-3.1-8b --global-batch 16
      planner compare --model qwen3-8b --machine rtx4090-2tib --seq-len 2048 --json

    \b
    Exit codes: 0 a plan was found, 2 bad input, 3 the model does not fit, whatever peers need.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    spec = find_model(model)
    seq_len = _seq_len(spec, seq_len)
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


# -- helpers of profile ------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=report.console(stderr=True), transient=True) as bar:
        running = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(running, description=what, completed=done, total=total)


def _measured(name: str | None) -> MachineProfile:
    """The profile to check. Raises ValueError for one that nobody measured."""
    machine = default_machine()[0] if name is None else find_machine(name)
    if machine.provenance.source != "measured":
        missing = f"no profile of this machine in {LOCAL_PROFILES}/" if name is None else f"{name}: figures from datasheets"
        raise ValueError(f"{missing}, there is nothing to check; `planner profile` measures this machine")
    return machine


def _check(
    machine: MachineProfile, check_machine: Callable[[MachineProfile, Callable[[str, int, int], None]], dict[str, Spread]]
) -> None:
    with _progress() as show:
        now = check_machine(machine, show)
    found = changes(figures(machine), now)
    out = report.console()
    out.print(report.checks_table(found))
    failed = sum(not each.holds for each in found)
    if failed:
        _note(f"{machine.name}: {failed} of {len(found)} figures do not hold; `planner profile` measures anew")
        raise typer.Exit(EXIT_DOES_NOT_HOLD)
    _note(f"{machine.name}: all {len(found)} figures hold")


def _replaced(output: Path, measured: MachineProfile) -> MachineProfile | None:
    """The profile of the same machine that stands where this one goes, if one does."""
    try:
        before = codec.load(output, MachineProfile)
    except ValueError:  # none, or not one that can be read: nothing to hold it against
        return None
    return before if before.identity() == measured.identity() else None


# -- helpers -----------------------------------------------------------------------------------


def _seq_len(model: ModelSpec, given: int | None) -> int:
    """What the user asked for, or the usual length as far as the model goes."""
    return min(DEFAULT_SEQ_LEN, model.max_positions, model.sliding_window or model.max_positions) if given is None else given


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


def _percent(option: str, text: str) -> float:
    try:
        share = float(text.removesuffix("%"))
    except ValueError:
        raise ValueError(f"{option} is {text!r}, must be a percentage like 95%") from None
    if not 0 < share <= 100:
        raise ValueError(f"{option} is {text}, must be above 0% and at most 100%")
    return share


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
