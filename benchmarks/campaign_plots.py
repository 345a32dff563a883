"""Pictures of a campaign's report: errors.png, scatter.png, kinds.png."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

if TYPE_CHECKING:
    from campaign_report import RunResult, Validation

DPI = 100
WIDTH_INCHES = 10  # 1000 pixels
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # told apart by everyone
GREY = "#777777"
BAND_PERCENT, MEAN_PERCENT = 8, 3
STYLE = {"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 13}


def draw(out: Path, validation: Validation) -> None:
    """All pictures, into an existing folder."""
    with pyplot.rc_context(STYLE):
        _errors(out / "errors.png", validation)
        _scatter(out / "scatter.png", validation)
        _kinds(out / "kinds.png", validation)


def _errors(path: Path, validation: Validation) -> None:
    found, step = validation.summary.histogram, validation.summary.step
    figure, axis = pyplot.subplots(figsize=(WIDTH_INCHES, 4.8))
    edges = found.edges_percent
    axis.axvspan(-BAND_PERCENT, BAND_PERCENT, color="#e8eef4", zorder=0)
    axis.axvspan(-MEAN_PERCENT, MEAN_PERCENT, color="#cfdde9", zorder=0)
    axis.bar(edges[:-1], found.counts, width=edges[1] - edges[0], align="edge", color=COLOURS[0], edgecolor="white", zorder=2)
    axis.axvline(0, color="black", linewidth=1, zorder=3)
    axis.axvline(100 * step.mean, color=COLOURS[1], linewidth=1.6, linestyle="--", zorder=3)
    reach = 1.05 * max(BAND_PERCENT, -edges[0], edges[-1])
    axis.set_xlim(-reach, reach)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("step-time error, (predicted - measured) / measured  [%]")
    axis.set_ylabel("runs")
    axis.set_title(
        f"{validation.provenance.machine}: {step.count} runs, mean |error| {step.mean_size:.1%}, signed mean {step.mean:+.1%}, "
        f"worst {step.worst:+.1%}",
        loc="left",
    )
    handles = [
        Line2D([], [], color="#cfdde9", linewidth=9, label=f"within {MEAN_PERCENT} %"),
        Line2D([], [], color="#e8eef4", linewidth=9, label=f"within {BAND_PERCENT} %"),
        Line2D([], [], color=COLOURS[1], linestyle="--", label="signed mean"),
    ]
    figure.legend(handles=handles, frameon=False, loc="lower center", ncols=len(handles))
    _save(figure, path, bottom_inches=0.35)


def _scatter(path: Path, validation: Validation) -> None:
    """Predicted against measured above; a band of 8 % is thin there, so the error itself below."""
    runs = validation.runs
    colours = _model_colours(runs)
    figure, (above, below) = pyplot.subplots(
        2, 1, sharex=True, figsize=(WIDTH_INCHES, 9), gridspec_kw={"height_ratios": (2.2, 1)}
    )
    seconds = [value / 1e9 for run in runs for value in (run.step.predicted, run.step.measured)]
    # At least a decade, so that there are ticks to label.
    middle, reach = (min(seconds) * max(seconds)) ** 0.5, max(3.2, 1.25 * (max(seconds) / min(seconds)) ** 0.5)
    low, high = middle / reach, middle * reach
    band = BAND_PERCENT / 100
    above.fill_between(
        [low, high], [low * (1 - band), high * (1 - band)], [low * (1 + band), high * (1 + band)], color="#e8eef4"
    )
    above.plot([low, high], [low, high], color="black", linewidth=1)
    below.axhspan(-BAND_PERCENT, BAND_PERCENT, color="#e8eef4")
    below.axhline(0, color="black", linewidth=1)
    for run in runs:
        measured, predicted = run.step.measured / 1e9, run.step.predicted / 1e9
        look: dict[str, Any] = {
            "marker": _marker(run), "s": 70, "color": colours[run.configuration.model], "alpha": 0.85,
            "edgecolor": "white", "linewidth": 0.6, "zorder": 3,
        }  # fmt: skip
        above.scatter(measured, predicted, **look)
        below.scatter(measured, 100 * run.error, **look)
    above.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    for axis in (above.xaxis, above.yaxis):
        axis.set_major_formatter(FuncFormatter(_seconds))
        axis.set_minor_formatter(FuncFormatter(lambda value, place: _seconds(value, place) if f"{value:e}"[0] in "25" else ""))
    above.tick_params(which="both", labelbottom=True)
    above.set_ylabel("predicted step time")
    below.set_xlabel("measured step time")
    below.set_ylabel("error  [%]")
    step = validation.summary.step
    above.set_title(
        f"{validation.provenance.machine}: {step.within_8_percent:.0%} of {step.count} runs within {BAND_PERCENT} % (band)",
        loc="left",
    )
    dots = [
        Line2D([], [], color=colour, marker="o", linestyle="", markersize=9, label=name) for name, colour in colours.items()
    ]
    shapes = [
        Line2D([], [], color=GREY, marker=marker, linestyle="", markersize=9, label=label)
        for marker, label in (("o", "random policy"), ("D", "planner's choice"))
    ]
    above.legend(handles=dots + shapes, frameon=False, loc="upper left")
    _save(figure, path)


def _kinds(path: Path, validation: Validation) -> None:
    """Per task kind: every run as a dot, the mean as a bar. Of the step, for what is wrong about a short task is little."""
    runs, kinds = validation.runs, validation.summary.kinds
    colours = _model_colours(runs)
    figure, axis = pyplot.subplots(figsize=(WIDTH_INCHES, 1.8 + 0.5 * len(kinds)))
    axis.axvspan(-BAND_PERCENT, BAND_PERCENT, color="#e8eef4", zorder=0)
    axis.axvline(0, color="black", linewidth=1, zorder=1)
    for place, kind in enumerate(kinds):
        having = [run for run in runs if kind in run.kinds]
        off = [100 * (run.kinds[kind].predicted - run.kinds[kind].measured) / run.step.measured for run in having]
        axis.barh(place, fmean(off), height=0.62, color="#b9c9d8", zorder=2)
        for run, percent in zip(having, off, strict=True):
            axis.scatter(
                percent, place, marker=_marker(run), s=26, color=colours[run.configuration.model], alpha=0.75,
                linewidth=0, zorder=3,
            )  # fmt: skip
    shares = [f"{kind}  ({found.step_share:.1%})" for kind, found in kinds.items()]
    axis.set_yticks(range(len(kinds)), shares)
    axis.invert_yaxis()
    axis.set_xlabel("(predicted - measured) time of the kind / measured step  [%]")
    axis.set_title("bar: signed mean; dots: runs; in brackets: share of the measured step", loc="left")
    dots = [
        Line2D([], [], color=colour, marker="o", linestyle="", markersize=7, label=name) for name, colour in colours.items()
    ]
    figure.legend(handles=dots, frameon=False, loc="lower center", ncols=len(dots))
    _save(figure, path, bottom_inches=0.35)


def _model_colours(runs: tuple[RunResult, ...]) -> dict[str, str]:
    models = sorted({run.configuration.model for run in runs})
    return {model: COLOURS[place % len(COLOURS)] for place, model in enumerate(models)}


def _marker(run: RunResult) -> str:
    return "D" if run.choice == "planned" else "o"


def _seconds(value: float, _: object) -> str:
    return f"{value:g} s" if value >= 1 else f"{1e3 * value:g} ms"


def _save(figure: Any, path: Path, bottom_inches: float = 0) -> None:
    figure.tight_layout(rect=(0, bottom_inches / figure.get_figheight(), 1, 1))
    # Without the library's version and date the same campaign makes the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    pyplot.close(figure)
