"""What a run leaves to look at: the comparison as table and JSON, a trace, and a picture of the lanes."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from slideplan.codec import file_digest, load, save, write_atomic
from slideplan.entry import in_words
from slideplan.graph.tasks import TaskGraph
from slideplan.measurement import Comparison, ComparisonRow, Measurement, compare
from slideplan.plan import Plan
from slideplan.quantities import format_bytes, format_ns
from slideplan.timeline import StepRecord
from slideplan.trace import write_trace

WIDTH = 100
TICK_NS = 1_000_000


def write_comparison(folder: Path, warn: Callable[[str], None]) -> Comparison:
    """Compare plan.json and measurement.json of a run folder; write comparison.json, then what is for people to look at.

    Those are comparison.txt, trace.json and lanes.png; of what cannot be made of them `warn` is told, in one line each.
    Raises ValueError where a file is missing, malformed, or of another run.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: is not a run folder; name the one that `runtime execute` wrote")
    plan = load(folder / "plan.json", Plan)
    plan.check(str(folder / "plan.json"))
    if not (folder / "measurement.json").exists():
        raise ValueError(
            f"{folder}: holds no measurement.json yet: its run was not finished; `runtime resume {folder}` goes on"
        )
    measurement = load(folder / "measurement.json", Measurement)
    comparison = compare(plan, measurement, file_digest(folder / "plan.json"))
    save(folder / "comparison.json", comparison)
    records = {"predicted": plan.prediction.record, "measured": measurement.record}
    title = f"{comparison.model} on {comparison.machine}"
    views: dict[str, Callable[[Path], None]] = {
        "trace.json": lambda path: write_trace(path, plan.graph, records),
        "lanes.png": lambda path: draw_lanes(path, plan.graph, records, title),
        "comparison.txt": lambda path: _write_table(path, comparison),
    }
    for name, write in views.items():
        try:
            write(folder / name)
        except Exception as error:  # of a drawing library, say: what was measured stands
            what = in_words(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
            warn(f"warning: {folder / name} was not written: {what}")
    return comparison


def _write_table(path: Path, comparison: Comparison) -> None:
    text = io.StringIO()
    print_comparison(Console(file=text, width=WIDTH), comparison)
    write_atomic(path, text.getvalue().encode())


def print_comparison(out: Console, comparison: Comparison) -> None:
    """Predicted, replayed, measured: the step, then lanes, kinds and memory."""
    table = Table(title=f"{comparison.model} on {comparison.machine}: one steady step", title_justify="left")
    for column in ("", "predicted", "replayed", "measured", "error"):
        table.add_column(column, justify="left" if not column else "right")
    _add(table, comparison.step, format_ns)
    if comparison.rehearsed is not None:
        _add(table, comparison.rehearsed, format_ns)
    _add(table, comparison.tokens_per_s, lambda value: f"{value:,}")
    for rows in (comparison.lanes, comparison.kinds):
        table.add_section()
        for row in rows:
            _add(table, row, format_ns)
    table.add_section()
    for row in comparison.memory:
        _add(table, row, format_bytes, name=f"peak {row.name} memory")
    out.print(table)
    out.print(
        f"step time error {comparison.step.error:+.1%}: cost model {comparison.cost_model_error:+.1%} "
        f"(predicted against replayed), structure {comparison.structure_error:+.1%} (replayed against measured); "
        f"measured steps spread by {comparison.step_spread:.1%}",
        highlight=False,
        soft_wrap=True,
    )


def _add(table: Table, row: ComparisonRow, show, name: str | None = None) -> None:  # type: ignore[no-untyped-def]
    replayed = "" if row.replayed is None else show(row.replayed)
    error = "" if row.error is None else f"{row.error:+.1%}"
    table.add_row(name or row.name, show(row.predicted), replayed, show(row.measured), error)


def draw_lanes(path: Path, graph: TaskGraph, records: dict[str, StepRecord], title: str) -> None:
    """One steady step as bars: a row per lane, predicted above measured, coloured by task kind."""
    with _without("MPLBACKEND"):  # of a notebook, say: matplotlib cannot be imported where it does not have that backend
        import matplotlib  # heavy: not to be counted in the memory of a run
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

    kinds = list(dict.fromkeys(str(task.operation) for task in graph.tasks))
    palette = dict(zip(kinds, matplotlib.colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    lanes = list(graph.lanes)
    figure = Figure(figsize=(12, 1.2 + 0.45 * len(lanes) * len(records)))  # itself, without pyplot: no window system is asked
    axes = figure.subplots(len(records), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (name, record) in zip(axes, records.items(), strict=True):
        for row, lane in enumerate(lanes):
            numbers = graph.lanes[lane]
            bars = [(record.spans[n].start_ns / TICK_NS, record.spans[n].duration_ns / TICK_NS) for n in numbers]
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=[palette[str(graph.tasks[n].operation)] for n in numbers])
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.axvline(record.step_ns / TICK_NS, color="grey", linewidth=0.8)
        axis.set_yticks(range(len(lanes)), [lane.name for lane in lanes])
        axis.invert_yaxis()
        axis.set_title(f"{name}: {format_ns(record.step_ns)}, {record.tokens_per_s:,.0f} tokens/s", loc="left", fontsize=10)
    axes[-1].set_xlabel("ms since the step's first compute task")
    figure.suptitle(title, x=0.01, ha="left")
    figure.legend(
        handles=[Patch(color=palette[kind], label=kind) for kind in kinds],
        loc="lower center", ncols=min(6, len(kinds)), fontsize=8, frameon=False,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight() + 0.03, 1, 1))
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomic(path, picture.getvalue())


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    """Hide an environment variable for a while."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value
