"""`planner simulate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.catalogue.machines import with_budget
from planner.catalogue.models import find_model
from planner.commands.options import (
    DEFAULT_BATCH,
    EXIT_DOES_NOT_FIT,
    GpuMemory,
    GradientDtypeChoice,
    HostMemory,
    Json,
    KernelsChoice,
    MachineName,
    ModelName,
    Objective,
    Placement,
    SeqLen,
    SsdMemory,
    StateChoice,
    budget_of,
    check_writable,
    note,
    percent_of,
    print_json,
)
from planner.commands.searching import machine_named, search_shown, seq_len_of
from planner.reports import answer as report
from planner.reports.tables import console
from planner.search.best import batches_within
from planner.search.counts import micro_batch_sizes
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions
from simulator import verify
from slideplan import codec
from slideplan.command import path
from slideplan.plan import Plan
from slideplan.policy import Workload, check_seq_len


def simulate(
    model: ModelName,
    machine: MachineName = None,
    seq_len: SeqLen = None,
    global_batch: Annotated[int | None, typer.Option(help=f"Sequences per optimizer step; default {DEFAULT_BATCH}.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences that pass a unit at once; default: searched.")] = None,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    ssd_memory: SsdMemory = None,
    placement: Annotated[
        Placement, typer.Option(help="host: offload all weights and state, even where they fit.")
    ] = Placement.AUTO,
    gradient_dtype: Annotated[
        GradientDtypeChoice, typer.Option(help="auto: fp32 sums over several micro-batches, bf16 for a single one.")
    ] = GradientDtypeChoice.AUTO,
    kernels: Annotated[
        KernelsChoice, typer.Option(help="auto: by what the profile measured, eager, fused or captured in graphs.")
    ] = KernelsChoice.AUTO,
    state: Annotated[
        StateChoice,
        typer.Option(
            help="Bytes a parameter of weights and optimizer: exact 12; lossy: bf16-moments 8, lean (bf16, 8 bits) 4."
        ),
    ] = StateChoice.EXACT,
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
    check: Annotated[
        bool, typer.Option("--verify", help="Simulate the plan by the SimPy model too, and fail where any span differs.")
    ] = False,
    effort: Annotated[float, typer.Option(help="Budget of the search, as a multiple of the usual one.")] = 1.0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", parser=path, help="Write the plan here, for `runtime execute`.")
    ] = None,
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
      planner simulate --model 123b --verify

    \b
    Exit codes: 0 a plan was found, 1 it was not verified, 2 bad input, 3 the model does not fit.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    spec = find_model(model)
    seq_len = seq_len_of(spec, seq_len)
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
        state=state.value,
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
        micro_batch_sizes(workload, options.micro_batch)
    budget = budget_of(gpu_memory, host_memory, ssd_memory)
    if output is not None:
        check_writable(output)
    profiled = with_budget(machine_named(machine), *budget)
    answer = search_shown(spec, workload, profiled, options)
    if check and isinstance(answer, Plan):
        spans = verify(answer.graph, spec, answer.policy, seq_len, profiled, answer.prediction)
        note(f"verified: the SimPy model gives the same step, and the same {spans:,} spans")
    _deliver(answer, output, as_json=as_json, pareto=pareto)


def _deliver(answer: Plan | DoesNotFit, output: Path | None, *, as_json: bool, pareto: bool) -> None:
    """Save, print, say what to do next. Exits with 3 where nothing fits."""
    # The plan is safe before anything is printed: a closed pipe must not lose it.
    if output is not None and isinstance(answer, Plan):
        codec.save(output, answer)
    if as_json:
        print_json(answer)
    else:
        report.print_answer(console(), answer, pareto=pareto)
    if isinstance(answer, DoesNotFit):
        if output is not None:
            note(f"{output}: not written, there is no plan")
        raise typer.Exit(EXIT_DOES_NOT_FIT)
    if output is not None:
        note(f"plan written to {output}; run it with `runtime execute {output}`")
    elif not as_json:
        note("plan not saved; `-o plan.json` saves it for `runtime execute`")
