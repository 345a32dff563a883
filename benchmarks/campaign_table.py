"""table.md of a campaign's report."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from slideplan.quantities import format_bytes, format_ns

if TYPE_CHECKING:
    from campaign_report import Errors, Row, RunResult, Validation


def table(validation: Validation) -> str:
    """The report in words and tables, Markdown."""
    summary, provenance = validation.summary, validation.provenance
    parts = [
        f"# Validation on {provenance.machine}, {provenance.last_run[:10]}",
        _opening(validation),
        "![step-time errors](errors.png)",
        "![predicted against measured](scatter.png)",
        "## Step time",
        _markdown(_ERROR_HEADER, _error_rows(validation)),
        "Error is (predicted - measured) / measured. Cost model: predicted against the task graph replayed with measured "
        "durations; structure: replayed against measured. A lane as measured: what is left of the errors where the tasks of "
        "that lane take their measured time and all others the predicted.",
        summary.rehearsed
        and "Rehearsed: what the run expected before its first step, with host updates as long as they took in its own memory.",
        "## Runs, largest error first",
        _markdown(
            _run_header(summary.rehearsed is not None),
            (_run_row(run, summary.rehearsed is not None) for run in validation.runs),
        ),
        "Policy: micro-batches x size and gradient type, window / prefetch depth, then how many layers keep weights, state and "
        "inner activations on the GPU, how many boundary activations wait on the host, which end units have their state on "
        "the GPU, and the order of updates. Spread: (p90 - p10) / p50 of the steady steps. GPU, host: error of peak bytes.",
        "## Worst case",
        validation.worst.sentence,
        "## Peak memory",
        _markdown(
            ("tier", *_ERROR_HEADER[1:]),
            ([tier, *_errors(errors)] for tier, errors in summary.memory.items()),
        ),
        _markdown(
            ("run", "tier", "predicted", "measured", "error"),
            (
                [run.name, tier, format_bytes(row.predicted), format_bytes(row.measured), _percent(row.error)]
                for run in validation.runs
                for tier, row in run.memory.items()
            ),
        ),
        "## Task kinds",
        "![task kinds](kinds.png)",
        _markdown(
            ("kind", "runs", "mean \\|error\\|", "signed mean", "worst", "weighted by time", "share of step"),
            (
                [
                    kind,
                    str(found.errors.count),
                    f"{found.errors.mean_size:.1%}",
                    _percent(found.errors.mean),
                    _percent(found.errors.worst),
                    f"{found.weighted:.1%}",
                    f"{found.step_share:.1%}",
                ]
                for kind, found in summary.kinds.items()
            ),
        ),
        "## Regret",
        _regret(validation),
        *_failures(validation),
        "## Provenance",
        _markdown(("", ""), _provenance(validation)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_ERROR_HEADER = ("group", "runs", "mean \\|error\\|", "signed mean", "worst", "within 3 %", "within 8 %")


def _opening(validation: Validation) -> str:
    step, rehearsed, made = validation.summary.step, validation.summary.rehearsed, len(validation.runs)
    left = validation.planned_runs - made - len(validation.failures)
    words = [
        f"{made} of {validation.planned_runs} runs finished",
        *([f"{len(validation.failures)} failed"] if validation.failures else []),
        *([f"{left} not made yet"] if left else []),
    ]
    found = (
        f"With host updates as rehearsed before the first step: mean \\|error\\| **{rehearsed.mean_size:.1%}**, "
        f"worst **{_percent(rehearsed.worst)}**. "
        if rehearsed
        else ""
    )
    return (
        f"{', '.join(words)}. Step time: mean \\|error\\| **{step.mean_size:.1%}**, worst **{_percent(step.worst)}**, "
        f"signed mean {_percent(step.mean)}; {step.within_3_percent:.0%} of runs within 3 %, "
        f"{step.within_8_percent:.0%} within 8 %. {found}Nothing was fitted on these runs."
    )


def _error_rows(validation: Validation) -> Iterable[list[str]]:
    summary = validation.summary
    groups = {
        "all": summary.step,
        **summary.groups,
        **({"all, as rehearsed": summary.rehearsed} if summary.rehearsed else {}),
        "all, cost model alone": summary.cost_model,
        "all, structure alone": summary.structure,
        **{f"all, {lane} as measured": errors for lane, errors in summary.left.items()},
    }
    return ([name, *_errors(errors)] for name, errors in groups.items())


def _errors(errors: Errors) -> list[str]:
    return [
        str(errors.count), f"{errors.mean_size:.1%}", _percent(errors.mean), _percent(errors.worst),
        f"{errors.within_3_percent:.0%}", f"{errors.within_8_percent:.0%}",
    ]  # fmt: skip


def _run_header(rehearsed: bool) -> list[str]:
    expected = ["rehearsed"] if rehearsed else []
    return [
        "run", "policy", "predicted", "replayed", "measured", "error", *expected, "cost model", "structure", "spread", "GPU",
        "host",
    ]  # fmt: skip


def _run_row(run: RunResult, rehearsed: bool) -> list[str]:
    step = run.step
    assert step.replayed is not None, "steps are replayed"
    return [
        run.name, run.sketch, format_ns(step.predicted), format_ns(step.replayed), format_ns(step.measured),
        _percent(step.error), *([_percent(run.rehearsed_error)] if rehearsed else []), _percent(run.cost_model_error),
        _percent(run.structure_error), f"{run.step_spread:.1%}", _memory_error(run.memory.get("gpu")),
        _memory_error(run.memory.get("host")),
    ]  # fmt: skip


def _memory_error(row: Row | None) -> str:
    return "" if row is None else _percent(row.error)


def _regret(validation: Validation) -> str:
    regrets = validation.summary.regret
    if not regrets:
        return "No configuration has its planned run and another one finished."
    mean, worst = sum(each.regret for each in regrets) / len(regrets), max(each.regret for each in regrets)
    rows = (
        [
            each.configuration, str(each.runs), format_ns(each.planned_ns), format_ns(each.best_ns), each.best,
            f"{each.regret:.1%}",
        ]
        for each in regrets
    )  # fmt: skip
    header = ("configuration", "runs", "planned", "best measured", "which is", "regret")
    return (
        f"The planner's choice against the best measured run of its configuration: mean regret {mean:.1%}, worst "
        f"{worst:.1%}.\n\n{_markdown(header, rows)}"
    )


def _failures(validation: Validation) -> list[str]:
    if not validation.failures:
        return []
    rows = (
        [each.name, each.sketch, format_ns(each.predicted_ns), each.error.replace("|", "\\|")] for each in validation.failures
    )
    return ["## Runs that failed", _markdown(("run", "policy", "predicted", "what happened"), rows)]


def _provenance(validation: Validation) -> Iterable[list[str]]:
    provenance = validation.provenance
    identity = provenance.identity
    return (
        ["machine", f"{identity.gpu} ({identity.backend}), {identity.cpu}, {identity.cores} cores"],
        ["profile", f"{provenance.machine}, {provenance.profile_date}, digest {provenance.profile_digest}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in provenance.versions.items())],
        ["runs", f"{provenance.first_run} to {provenance.last_run}, seed {provenance.seed}"],
        ["command", f"`{provenance.command}`"],
    )


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:+.1%}"


def _markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = list(header)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
