"""`planner compare`."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.catalogue.machines import with_budget
from planner.catalogue.models import find_model
from planner.commands.options import (
    DEFAULT_BATCH,
    EXIT_DOES_NOT_FIT,
    GpuMemory,
    HostMemory,
    Json,
    MachineName,
    ModelName,
    SeqLen,
    SsdMemory,
    budget_of,
    print_json,
)
from planner.commands.searching import machine_named, search_shown, seq_len_of
from planner.peers.compare import compare_peers
from planner.reports import answer as report
from planner.reports.tables import console
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions
from slideplan.policy import Workload, check_seq_len


def compare(
    model: ModelName,
    machine: MachineName = None,
    seq_len: SeqLen = None,
    global_batch: Annotated[int, typer.Option(help="Sequences per optimizer step.")] = DEFAULT_BATCH,
    gpu_memory: GpuMemory = None,
    host_memory: HostMemory = None,
    ssd_memory: SsdMemory = None,
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
    seq_len = seq_len_of(spec, seq_len)
    workload = Workload(seq_len=seq_len, global_batch=global_batch)
    check_seq_len(spec, seq_len)
    budget = budget_of(gpu_memory, host_memory, ssd_memory)
    profiled = with_budget(machine_named(machine), *budget)
    answer = search_shown(spec, workload, profiled, SearchOptions())
    comparison = compare_peers(answer, profiled)
    if as_json:
        print_json(comparison)
    else:
        report.print_comparison(console(), comparison)
    if isinstance(answer, DoesNotFit):
        raise typer.Exit(EXIT_DOES_NOT_FIT)
