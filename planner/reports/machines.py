"""Catalogues and profiles in print."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table

from planner.reports.drive import format_drive_bytes
from planner.reports.tables import new_table, parameter_count
from slideplan.graph.lanes import LaneKind
from slideplan.lowering.sizes import TRAINING_BYTES
from slideplan.machine.figures import Change, cost_name, launch_name
from slideplan.machine.profile import Interference, MachineProfile, Spread, SsdProfile
from slideplan.model import ModelSpec
from slideplan.quantities import format_bytes


def models_table(models: Iterable[ModelSpec]) -> Table:
    """One row per model."""
    table = new_table("model", "parameters", "layers", "hidden", "heads/kv", "ffn", "vocabulary", "training state")
    for model in models:
        table.add_row(
            model.name, parameter_count(model.parameter_count), str(model.layers), str(model.hidden),
            f"{model.heads}/{model.kv_heads}", str(model.ffn), f"{model.vocabulary}{' tied' if model.tied_embeddings else ''}",
            format_bytes(TRAINING_BYTES * model.parameter_count),
        )  # fmt: skip
    return table


def machines_table(machines: dict[str, MachineProfile]) -> RenderableType:
    """One row per profile, by the name that `--machine` takes; then the drives of those that have one."""
    table = new_table("machine", "GPU", "GPU memory", "host memory", "cores", "h2d/d2h GB/s", "figures", left=2)
    for name, machine in machines.items():
        h2d, d2h = (curve.points[-1].rate.p50 / 1e9 for curve in (machine.link.h2d, machine.link.d2h))
        table.add_row(
            name, machine.gpu.name.removeprefix("NVIDIA ").removeprefix("GeForce "),
            format_bytes(machine.gpu.memory_bytes), format_bytes(machine.host.memory_bytes), str(machine.host.cores),
            f"{h2d:.1f}/{d2h:.1f}", machine.provenance.source,
        )  # fmt: skip
    drives = {name: machine.ssd for name, machine in machines.items() if machine.ssd is not None}
    return Group(table, "", _drives_table(drives)) if drives else table


def _drives_table(drives: dict[str, SsdProfile]) -> Table:
    """In powers of ten, as drives are sold. Plans count on what a drive writes once its cache is full."""
    table = new_table("machine", "drive", "read GB/s", "write GB/s", "both at once", "into its cache", "may be written")
    for name, drive in drives.items():
        rates = (drive.read.points[-1].rate.p50, drive.write.points[-1].rate.p50, drive.duplex_bytes_per_s)
        burst, endurance = drive.burst_write_bytes_per_s, drive.endurance_bytes
        table.add_row(
            name, format_drive_bytes(drive.capacity_bytes), *(f"{rate / 1e9:.1f}" for rate in rates),
            "-" if burst is None else f"{burst / 1e9:.1f}", "-" if endurance is None else format_drive_bytes(endurance),
        )  # fmt: skip
    return table


def profile_table(machine: MachineProfile) -> RenderableType:
    """What was measured, with its spread; then lanes together, and how well the model of contention explains them."""
    table = new_table("measured", "p10", "p50", "p90", "unit")

    def row(name: str, spread: Spread, scale: float, unit: str) -> None:
        digits = 2 if unit == "GB/s" else 3
        table.add_row(name, *(f"{value / scale:,.{digits}f}" for value in (spread.p10, spread.p50, spread.p90)), unit)

    for name, curve in (("h2d", machine.link.h2d), ("d2h", machine.link.d2h)):
        row(f"{name}, {format_bytes(curve.points[-1].size)} pieces", curve.points[-1].rate, 1e9, "GB/s")
    row("AdamW on the host", machine.optimizer.host_bytes_per_s, 1e9, "GB/s")
    for at in machine.optimizer.by_threads:
        row(f"AdamW on the host, {at.threads} threads", at.host_bytes_per_s, 1e9, "GB/s")
        if at.beside_copies:
            row(f"AdamW on the host, {at.threads} threads, beside copies", at.beside_copies.host_bytes_per_s, 1e9, "GB/s")
    row("AdamW on the device", machine.optimizer.gpu_bytes_per_s, 1e9, "GB/s")
    if machine.ssd is not None:
        row("SSD read", machine.ssd.read.points[-1].rate, 1e9, "GB/s")
        row("SSD write", machine.ssd.write.points[-1].rate, 1e9, "GB/s")
    for cost in machine.costs:
        if (cost.gradient_dtype, cost.accumulate) == ("bf16", False):  # other ways of writing gradients stand in the file
            row(cost_name(cost), cost.duration_ns, 1e6, "ms")
    for launch in machine.launches:
        row(launch_name(launch), launch.duration_ns, 1e6, "ms")
    for name, spread in machine.spreads.items():
        if name.endswith("_ns"):
            row(name, spread, 1e6, "ms")
    return table if machine.interference is None else Group(table, "", _interference_table(machine.interference))


def _interference_table(met: Interference) -> Table:
    table = new_table("together", "lane", "GB/s alone", "together", "speed", "fitted", "residual", left=2)
    for combination in met.together:
        for place, each in enumerate(combination):
            rates = (f"{rate.p50 / 1e9:,.2f}" for rate in (met.alone[each.lane], each.rate))
            # Compute is counted in operations; only its speed compares.
            shown = ("", "") if each.lane is LaneKind.COMPUTE else tuple(rates)
            name = " + ".join(other.lane for other in combination) if place == 0 else ""
            table.add_row(name, each.lane, *shown, f"{each.speed:.2f}", f"{each.predicted:.2f}", f"{each.residual:+.2f}")
        table.add_section()
    table.add_row("largest residual", "", "", "", "", "", f"{met.max_residual:.2f}")
    table.add_row("mean residual", "", "", "", "", "", f"{met.mean_residual:.2f}")
    return table


def changes_report(found: list[Change]) -> RenderableType:
    """Figures of a profile of the same machine that no longer hold."""
    changed = [each for each in found if not each.holds]
    if not changed:
        return f"all {len(found)} figures agree with the profile that this one replaces"
    return Group(
        f"{len(changed)} of {len(found)} figures differ from the former profile by more than their spreads",
        _changes_table(changed, verdict=False),
    )


def checks_table(found: list[Change]) -> Table:
    """Every figure measured again, and whether it holds."""
    return _changes_table(found, verdict=True)


def _changes_table(found: list[Change], verdict: bool) -> Table:
    table = new_table("figure", "before", "p10-p90", "now", "p10-p90", "unit", "change", *(["holds"] if verdict else []))
    table.columns[0].no_wrap = False  # names are long; the figures must stay whole
    for each in found:
        scale, unit = _scale(each)
        cells = []
        for spread in (each.before, each.now):
            cells += [f"{spread.p50 / scale:.2f}", f"{spread.p10 / scale:.2f}-{spread.p90 / scale:.2f}"]
        change = f"{each.now.p50 / max(1, each.before.p50) - 1:+.1%}"
        table.add_row(each.name, *cells, unit, change, *([("yes" if each.holds else "NO")] if verdict else []))
    return table


def _scale(each: Change) -> tuple[float, str]:
    """Unit in which a figure is easily read, and how many of its own that is."""
    scales = ((1e12, "T/s"), (1e9, "G/s"), (1e6, "M/s")) if each.unit == "/s" else ((1e6, "ms"), (1e3, "us"), (1.0, "ns"))
    return next((scale for scale in scales if each.before.p50 >= scale[0]), scales[-1])
