"""The report of a campaign: a pure function of its folder."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import msgspec

import campaign_plots
from campaign_draw import sketch
from campaign_explain import Explanation, explain, left_errors
from campaign_records import CampaignFolder, Choice, Configuration, Entry, Manifest
from campaign_table import table
from planner.catalogue.models import find_model
from planner.reports.answer import policy_in_words
from slideplan.codec import Document, Spec, save, write_atomic
from slideplan.machine.profile import MachineIdentity, MachineProfile
from slideplan.measurement import ComparisonRow
from slideplan.placement import Tier
from slideplan.trace import write_trace

CLOSE, WITHIN = 0.03, 0.08  # the bounds that are asked for: mean and worst
TRACE_LIMIT_BYTES = 400_000  # larger ones are compressed; Perfetto opens both
BIN_WIDTHS_PERCENT = (0.5, 1, 2, 5, 10, 20, 50, 100)
MOST_BINS = 30


class Row(Spec, frozen=True):
    """Nanoseconds or bytes: predicted, replayed with measured durations where that means something, measured."""

    predicted: int
    replayed: int | None
    measured: int
    error: float | None  # (predicted - measured) / measured

    @classmethod
    def of(cls, row: ComparisonRow) -> Row:
        return cls(predicted=row.predicted, replayed=row.replayed, measured=row.measured, error=row.error)


class RunResult(Spec, frozen=True):
    """One finished run."""

    name: str
    configuration: Configuration
    choice: Choice
    sketch: str
    policy: dict[str, str]  # in words
    step: Row
    cost_model_error: float
    structure_error: float
    rehearsed_ns: int | None  # a step's host updates in this process's memory, before the first step
    rehearsed_error: float | None  # of what was expected once host updates had been rehearsed, before the first step
    left_errors: dict[str, float]  # lane -> what is left where its tasks take their measured time
    step_spread: float  # (p90 - p10) / p50 of the steady steps
    step_ns: tuple[int, ...]  # every step, warm-up included
    steady_steps: tuple[int, ...]
    kinds: dict[str, Row]
    lanes: dict[str, Row]
    memory: dict[str, Row]
    cost_sources: dict[str, str]  # task kind -> where its price comes from
    wall_s: float
    date: str
    command: str

    @property
    def error(self) -> float:
        assert self.step.error is not None, "a measured step takes time"
        return self.step.error


class Failure(Spec, frozen=True):
    """One run that did not finish."""

    name: str
    sketch: str
    predicted_ns: int
    error: str


class Errors(Spec, frozen=True):
    """Of relative errors: mean of their sizes, mean with sign, the one of largest size, shares within bounds."""

    count: int
    mean_size: float
    mean: float
    worst: float
    within_3_percent: float
    within_8_percent: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> Errors:
        """Of one error at least."""
        sizes = [abs(error) for error in errors]
        return cls(
            count=len(errors),
            mean_size=fmean(sizes),
            mean=fmean(errors),
            worst=max(errors, key=abs),
            within_3_percent=fmean(size <= CLOSE for size in sizes),
            within_8_percent=fmean(size <= WITHIN for size in sizes),
        )


class KindErrors(Spec, frozen=True):
    """Of one task kind over all runs that have it. `step_share`: its measured time over the step's, mean of those runs.

    weighted: sum of |predicted - measured| over the sum of measured, so that short tasks count little
    """

    errors: Errors
    step_share: float
    weighted: float


class Histogram(Spec, frozen=True):
    """Runs by signed step-time error; `edges_percent` has one value more than `counts`."""

    edges_percent: tuple[float, ...]
    counts: tuple[int, ...]


class Regret(Spec, frozen=True):
    """The planner's choice against the best measured run of its configuration. 0: none was better."""

    configuration: str
    runs: int
    planned_ns: int
    best: str
    best_ns: int
    regret: float


class Summary(Spec, frozen=True):
    """All runs together, and by choice and model."""

    step: Errors
    cost_model: Errors
    structure: Errors
    rehearsed: Errors | None  # with the prediction's own where the host updates nothing; None where no run rehearsed
    left: dict[str, Errors]  # lane -> errors of all runs where its tasks take their measured time
    groups: dict[str, Errors]
    memory: dict[str, Errors]
    kinds: dict[str, KindErrors]
    histogram: Histogram
    regret: tuple[Regret, ...]


class Provenance(Spec, frozen=True):
    """Where the figures come from."""

    machine: str
    profile_digest: str
    profile_date: str
    identity: MachineIdentity
    versions: dict[str, str]
    first_run: str
    last_run: str
    command: str
    seed: int


class Validation(Document, frozen=True, tag="validation"):
    """A campaign's results. `planned_runs`: how many it has, made or not."""

    provenance: Provenance
    planned_runs: int
    summary: Summary
    worst: Explanation
    runs: tuple[RunResult, ...]  # largest error first
    failures: tuple[Failure, ...]


# -- from the folder ---------------------------------------------------------------------------


def write(folder: CampaignFolder, reports: Path) -> Path:
    """Write the report into `reports`/validation-MACHINE-DATE and return that folder.

    With the profile and the runs' policies in it, `reprice.py` can price them again. Raises ValueError where no run
    has finished.
    """
    manifest = folder.manifest()
    finished = [entry for entry in manifest.entries if _status(folder, entry) == "done"]
    if not finished:
        raise ValueError(f"{folder.path}: no run has finished, there is nothing to report; go on with --resume {folder.path}")
    results = sorted((_result(folder, entry) for entry in finished), key=lambda result: (-abs(result.error), result.name))
    worst = next(entry for entry in finished if entry.name == results[0].name)
    plan, measurement = folder.plan(worst), folder.measurement(worst)
    validation = Validation(
        provenance=_provenance(folder, manifest, finished),
        planned_runs=len(manifest.entries),
        summary=summarize(results),
        worst=explain(worst.name, plan, measurement),
        runs=tuple(results),
        failures=tuple(_failures(folder, manifest)),
    )
    out = reports / f"validation-{validation.provenance.machine}-{validation.provenance.last_run[:10]}"
    save(out / "campaign.json", validation)
    for name, document in (("profile", _published(folder.profile())), ("manifest", manifest)):
        write_atomic(out / f"{name}.json.gz", gzip.compress(msgspec.json.encode(document, order="deterministic"), mtime=0))
    write_atomic(out / "table.md", table(validation).encode())
    campaign_plots.draw(out, validation)
    records = {"predicted": plan.prediction.record, "measured": measurement.record}
    for stale in ("trace.json", "trace.json.gz"):
        (out / stale).unlink(missing_ok=True)
    trace = out / "trace.json"
    write_trace(trace, plan.graph, records)
    if trace.stat().st_size > TRACE_LIMIT_BYTES:
        write_atomic(out / "trace.json.gz", gzip.compress(trace.read_bytes(), mtime=0))
        trace.unlink()
    return out


def _published(machine: MachineProfile) -> MachineProfile:
    """The profile without the path of the disk that was measured, which concerns nobody else."""
    return (
        machine if machine.ssd is None else msgspec.structs.replace(machine, ssd=msgspec.structs.replace(machine.ssd, path="."))
    )


def _status(folder: CampaignFolder, entry: Entry) -> str | None:
    outcome = folder.outcome(entry)
    return outcome.status if outcome else None


def _result(folder: CampaignFolder, entry: Entry) -> RunResult:
    comparison, measurement, plan = folder.comparison(entry), folder.measurement(entry), folder.plan(entry)
    if plan.policy != entry.policy or comparison.step.measured != measurement.record.step_ns:
        raise ValueError(f"{folder.run_folder(entry)}: holds the files of another run; delete it and go on with --resume")
    outcome = folder.outcome(entry)
    assert outcome is not None, "only finished runs have results"
    return RunResult(
        name=entry.name,
        configuration=entry.configuration,
        choice=entry.choice,
        sketch=sketch(plan.model, entry.policy),
        policy=dict(policy_in_words(plan.model, entry.policy)),
        step=Row.of(comparison.step),
        cost_model_error=comparison.cost_model_error,
        structure_error=comparison.structure_error,
        rehearsed_ns=measurement.rehearsed_ns,
        rehearsed_error=None if comparison.rehearsed is None else comparison.rehearsed.error,
        left_errors=left_errors(plan, measurement),
        step_spread=comparison.step_spread,
        step_ns=measurement.step_ns,
        steady_steps=measurement.steady_steps,
        kinds=_rows(comparison.kinds),
        lanes=_rows(comparison.lanes),
        memory=_rows(comparison.memory),
        cost_sources=plan.prediction.cost_sources,
        wall_s=outcome.wall_s,
        date=measurement.date,
        command=measurement.command,
    )


def _rows(rows: Iterable[ComparisonRow]) -> dict[str, Row]:
    return {row.name: Row.of(row) for row in rows}


def _failures(folder: CampaignFolder, manifest: Manifest) -> Iterable[Failure]:
    for entry in manifest.entries:
        outcome = folder.outcome(entry)
        if outcome is not None and outcome.status == "failed":
            words = sketch(find_model(entry.configuration.model), entry.policy)
            yield Failure(name=entry.name, sketch=words, predicted_ns=entry.predicted_ns, error=outcome.error)


def _provenance(folder: CampaignFolder, manifest: Manifest, finished: Sequence[Entry]) -> Provenance:
    machine = folder.profile()
    measurements = [folder.measurement(entry) for entry in finished]
    dates = sorted(measurement.date for measurement in measurements)
    return Provenance(
        machine=machine.name,
        profile_digest=manifest.profile_digest,
        profile_date=machine.provenance.date,
        identity=measurements[0].machine,
        versions={"slideplan": measurements[0].version, **measurements[0].versions},
        first_run=dates[0],
        last_run=dates[-1],
        command=manifest.command,
        seed=manifest.seed,
    )


# -- statistics --------------------------------------------------------------------------------


def summarize(results: Sequence[RunResult]) -> Summary:
    """Statistics over runs; at least one."""
    groups: dict[str, list[float]] = {}
    for result in results:
        for group in (f"{result.choice} policies", result.configuration.model):
            groups.setdefault(group, []).append(result.error)
    memory = {
        str(tier): [row.error for result in results if (row := result.memory.get(tier)) and row.error is not None]
        for tier in (Tier.GPU, Tier.HOST)
    }
    return Summary(
        step=Errors.of([result.error for result in results]),
        cost_model=Errors.of([result.cost_model_error for result in results]),
        structure=Errors.of([result.structure_error for result in results]),
        rehearsed=_rehearsed(results),
        left={
            lane: Errors.of([result.left_errors.get(lane, result.error) for result in results])
            for lane in sorted({lane for result in results for lane in result.left_errors})
        },
        groups={name: Errors.of(errors) for name, errors in sorted(groups.items())},
        memory={tier: Errors.of(errors) for tier, errors in memory.items() if errors},
        kinds=_kinds(results),
        histogram=histogram([result.error for result in results]),
        regret=tuple(_regrets(results)),
    )


def _rehearsed(results: Sequence[RunResult]) -> Errors | None:
    if all(result.rehearsed_error is None for result in results):
        return None
    return Errors.of([result.error if result.rehearsed_error is None else result.rehearsed_error for result in results])


def _kinds(results: Sequence[RunResult]) -> dict[str, KindErrors]:
    """By share of the step, largest first."""
    found = {}
    for kind in Counter(kind for result in results for kind in result.kinds):
        having = [(result, result.kinds[kind]) for result in results if kind in result.kinds]
        measured = [(result, row, row.error) for result, row in having if row.error is not None]
        if measured:
            found[kind] = KindErrors(
                errors=Errors.of([error for *_, error in measured]),
                step_share=fmean(row.measured / result.step.measured for result, row, _ in measured),
                weighted=sum(abs(row.predicted - row.measured) for _, row, _ in measured)
                / sum(row.measured for _, row, _ in measured),
            )
    return dict(sorted(found.items(), key=lambda item: -item[1].step_share))


def histogram(errors: Sequence[float]) -> Histogram:
    """Counts in bins of equal width, zero an edge; the width is the least of BIN_WIDTHS_PERCENT that needs MOST_BINS."""
    percent = [100 * error for error in errors]
    for width in BIN_WIDTHS_PERCENT:
        places = [int(value // width) for value in percent]
        first, last = min(*places, -1), max(*places, 0)
        if last - first < MOST_BINS:
            break
    counts = Counter(places)
    return Histogram(
        edges_percent=tuple(float(width * place) for place in range(first, last + 2)),
        counts=tuple(counts[place] for place in range(first, last + 1)),
    )


def _regrets(results: Sequence[RunResult]) -> Iterable[Regret]:
    """Of configurations whose planned run and at least one other have finished."""
    of: dict[str, list[RunResult]] = {}
    for result in results:
        of.setdefault(result.configuration.name, []).append(result)
    for name, runs in sorted(of.items()):
        planned = next((run for run in runs if run.choice == "planned"), None)
        if planned is None or len(runs) == 1:
            continue
        best = min(runs, key=lambda run: run.step.measured)
        yield Regret(
            configuration=name,
            runs=len(runs),
            planned_ns=planned.step.measured,
            best=best.name,
            best_ns=best.step.measured,
            regret=planned.step.measured / best.step.measured - 1,
        )
