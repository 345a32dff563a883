"""The `planner` command: profile a machine, plan for it, list what the catalogues hold."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from slideplan.plan import codec
from slideplan.plan.machine import MachineProfile
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import Plan
from slideplan.plan.policy import Workload, check_seq_len
from slideplan.planner import report, report_machines
from slideplan.planner.catalogue import MODELS, find_model
from slideplan.planner.cli_options import (
    DEFAULT_BATCH,
    DEFAULT_SEQ_LEN,
    EXIT_BAD_INPUT,
    EXIT_DOES_NOT_FIT,
    EXIT_FAILED,
    GpuMemory,
    GradientDtypeChoice,
    HostMemory,
    Json,
    KernelsChoice,
    MachineName,
    ModelName,
    MomentsChoice,
    Objective,
    Placement,
    SeqLen,
    check_writable,
    note,
    percent_of,
    print_json,
    size_of,
)  # fmt: skip
from slideplan.planner.cli_profile import profile
from slideplan.planner.compare import compare_peers
from slideplan.planner.machines import LOCAL_PROFILES, default_machine, find_machine, machines, with_budget
from slideplan.planner.report_tables import WIDTH, console
from slideplan.planner.search import batches_within, search
from slideplan.planner.shortfall import DoesNotFit
from slideplan.planner.space import SearchOptions, micro_batch_sizes

app = typer.Typer(
    help="Plan full-parameter fine-tuning on one GPU that is too small for it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": WIDTH},
)


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
    gpu_moments: Annotated[
        MomentsChoice, typer.Option(help="8bit: moments that lie on the GPU take a quarter; lossy, and leaves room for more.")
    ] = MomentsChoice.FP32,
    gradient_norms: Annotated[
        bool, typer.Option("--gradient-norms", help="Measure the gradients' global norm in every step, for metrics.jsonl.")
    ] = False,
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
      planner simulate --model llama-3.1-8b --global-batch 1 --gpu-moments 8bit

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
        gpu_moments=gpu_moments.value,
        gradient_norms=gradient_norms,
        micro_batch=micro_batch,
        lowered_tasks=round(usual.lowered_tasks * effort),
        simulated_tasks=round(usual.simulated_tasks * effort),
        max_tokens_per_step=max_tokens_per_step,
        least_host_memory=objective is Objective.LEAST_HOST_MEMORY,
        at_least_percent=usual.at_least_percent if at_least is None else percent_of("--at-least", at_least),
        pareto=pareto,
        explain=explain,
    )
    # All that can be wrong is looked at before a machine is chosen, so that an error stands alone.
    check_seq_len(spec, seq_len)
    if not batches_within(seq_len, options):
        micro_batch_sizes(workload, options)
    budget = size_of("--gpu-memory", gpu_memory), size_of("--host-memory", host_memory)
    if output is not None:
        check_writable(output)
    answer = _search(spec, workload, with_budget(_machine(machine), *budget), options)
    if as_json:
        print_json(answer)
    else:
        report.print_answer(console(), answer, pareto=pareto)
    if isinstance(answer, DoesNotFit):
        if output is not None:
            note(f"{output}: not written, there is no plan")
        raise typer.Exit(EXIT_DOES_NOT_FIT)
    if output is not None:
        codec.save(output, answer)
        note(f"plan written to {output}; run it with `runtime execute {output}`")
    elif not as_json:
        note("plan not saved; `-o plan.json` saves it for `runtime execute`")


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
        print_json([{"parameters": model.parameter_count, **msgspec.to_builtins(model)} for model in MODELS.values()])
    else:
        console().print(report_machines.models_table(MODELS.values()))


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
            note(f"left out: {error}")
    if as_json:
        print_json([{"name": name, "profile": profile} for name, profile in profiles.items()])
    else:
        console().print(report_machines.machines_table(profiles))


app.command()(profile)


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
    budget = size_of("--gpu-memory", gpu_memory), size_of("--host-memory", host_memory)
    profiled = with_budget(_machine(machine), *budget)
    answer = _search(spec, workload, profiled, SearchOptions())
    comparison = compare_peers(answer, profiled)
    if as_json:
        print_json(comparison)
    else:
        report.print_comparison(console(), comparison)
    if isinstance(answer, DoesNotFit):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


# -- helpers -----------------------------------------------------------------------------------


def _seq_len(model: ModelSpec, given: int | None) -> int:
    """What the user asked for, or the usual length as far as the model goes."""
    return min(DEFAULT_SEQ_LEN, model.max_positions, model.sliding_window or model.max_positions) if given is None else given


def _search(model: ModelSpec, workload: Workload, machine: MachineProfile, options: SearchOptions) -> Plan | DoesNotFit:
    err = console(stderr=True)
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
        note(
            f"no profile of this machine in {LOCAL_PROFILES}/: taking the shipped {machine.name} "
            f"({machine.gpu.name}, datasheet figures); `planner profile` measures this machine, --machine names another"
        )
    return machine
