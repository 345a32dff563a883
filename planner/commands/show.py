"""`planner show`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from planner.commands.options import Json, print_json
from planner.reports.tables import console, facts
from slideplan import codec
from slideplan.command import path
from slideplan.graph.text import LEGEND, grid, names, short_name
from slideplan.plan import Plan
from slideplan.quantities import format_bytes, format_ns


def show(
    plan: Annotated[Path, typer.Argument(parser=path, help="A plan written by `planner simulate -o`.")],
    task: Annotated[
        str | None, typer.Option(metavar="NAME", help="One task, by its short or long name: when, which slots, what for.")
    ] = None,
    width: Annotated[int | None, typer.Option(min=40, help="Characters across; default: the terminal's.")] = None,
    as_json: Json = False,
) -> None:
    """Show a plan's schedule: lanes down, time across.

    A column is a compute task; below it stands what the other lanes start while it runs, as predicted.

    \b
    Examples:
      planner show plan.json
      planner show plan.json --task whg4
      planner show plan.json --width 200 > schedule.txt

    \b
    Exit codes: 0 shown, 2 bad input.
    """  # noqa: D301 - click's mark for a paragraph that it must not wrap is the character itself
    document = codec.load(plan, Plan)
    document.check(str(plan))
    out = console()
    if task is not None:
        _show_task(document, _number_of(document, task), as_json)
    elif as_json:
        print_json(_as_rows(document))
    else:
        record = document.prediction.record
        out.print(f"{document.model.name} on {document.machine.name}: a steady step of {format_ns(record.step_ns)}\n")
        sys.stdout.write(grid(document.graph, record.spans, record.step_ns, width or out.width) + "\n")
        out.print(f"\n{LEGEND}", style="dim", highlight=False, soft_wrap=True)


def _as_rows(plan: Plan) -> list[dict[str, object]]:
    spans, graph = plan.prediction.record.spans, plan.graph
    return [
        {
            "short": short_name(named), "name": each.name, "lane": each.lane.name, "unit": each.unit, "micro": each.micro,
            "start_ns": spans[number].start_ns, "end_ns": spans[number].end_ns, "waits_for": graph.why(number),
        }
        for number, (named, each) in enumerate(zip(names(graph), graph.tasks, strict=True))
    ]  # fmt: skip


def _number_of(plan: Plan, name: str) -> int:
    short = name.rstrip("+-")  # as grids mark tasks of the next step and of the step before
    for number, (named, task) in enumerate(zip(names(plan.graph), plan.graph.tasks, strict=True)):
        if short == short_name(named) or name == task.name:
            return number
    raise ValueError(f"--task {name!r}: the plan has no such task; `planner show` lists their short names")


def _show_task(plan: Plan, number: int, as_json: bool) -> None:
    if as_json:
        print_json(_as_rows(plan)[number])
        return
    task, span = plan.graph.tasks[number], plan.prediction.record.spans[number]
    words = {"r": "reads", "w": "writes", "rw": "reads and writes"}
    rows = [
        ("task", f"{task.name}, on lane {task.lane.name}"),
        ("predicted", f"{format_ns(span.start_ns)} to {format_ns(span.end_ns)}, {format_ns(span.duration_ns)}"),
        ("computes", f"{task.flops / 1e9:,.1f} GFLOP") if task.flops else ("moves", format_bytes(task.bytes_moved)),
        *((words[each.mode], f"slot {each.slot} of {each.pool}, its {each.role}") for each in task.accesses),
        *(("waits for", reason) for reason in plan.graph.why(number)),
    ]
    console().print(facts(rows))
