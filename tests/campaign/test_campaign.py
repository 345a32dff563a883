"""A small campaign on the CPU backend, from the profile to the report."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import re
import time
from pathlib import Path
from statistics import fmean

import msgspec
import pytest

import campaign
import campaign_report
import reprice
from campaign import Ended
from campaign_explain import left_errors
from campaign_records import CampaignFolder, Manifest, Outcome
from campaign_report import Validation, histogram
from planner.catalogue.models import find_model
from runtime.cli import app
from runtime.probes.profile import ProfileRequest, profile_machine
from slideplan.codec import load, save
from slideplan.graph.lanes import LaneKind
from slideplan.graph.replay import replay
from slideplan.machine.profile import Curve, MachineProfile, Spread
from slideplan.progress import silent

ENOUGH_S = 1000.0
SMALL = (
    "--device", "cpu", "--models", "tiny", "tiny-qwen3", "--seq-len", "64", "--global-batch", "2", "4",
    "--gpu-memory", "4MiB", "32MiB", "--configurations", "2",
)  # fmt: skip
NAMES = [
    "campaign.json", "errors.png", "kinds.png", "manifest.json.gz", "profile.json.gz", "scatter.png", "table.md", "trace.json",
]  # fmt: skip


def launch_here(arguments: list[str], _: float) -> Ended:
    """In this process, which spares loading torch for each run."""
    app(arguments, standalone_mode=False)
    return Ended(0, "")


def options(folder: Path, *more: str) -> argparse.Namespace:
    return campaign.parser().parse_args(["-o", str(folder), "--profile", str(folder / "measured.json"), *SMALL, *more])


@pytest.fixture(scope="module")
def machine() -> MachineProfile:
    models = find_model("tiny"), find_model("tiny-qwen3")
    request = ProfileRequest(name="test-cpu", models=models, shapes=((4, 64),), quick=True, device="cpu")
    measured = profile_machine(request, silent)
    # Draws leave out steps that would take seconds. On a slow or busy CPU that would be all of them.
    rate = Spread.exact(max(measured.efficiency.gemm.points[-1].rate.p50, 20 * 10**9))
    gemm = Curve(points=tuple(msgspec.structs.replace(point, rate=rate) for point in measured.efficiency.gemm.points))
    return msgspec.structs.replace(measured, efficiency=msgspec.structs.replace(measured.efficiency, gemm=gemm))


def started(folder: CampaignFolder, machine: MachineProfile, *more: str) -> Manifest:
    save(folder.path / "measured.json", machine)
    return campaign.start(folder, options(folder.path, *more))


@pytest.fixture(scope="module")
def finished(machine: MachineProfile, tmp_path_factory: pytest.TempPathFactory) -> CampaignFolder:
    """Two configurations, a random and a planned run of each."""
    folder = CampaignFolder(tmp_path_factory.mktemp("campaign"))
    manifest = started(folder, machine, "--runs-per-config", "2")
    campaign.run_all(folder, manifest, time.monotonic() + ENOUGH_S, launch_here)
    return folder


@pytest.fixture(scope="module")
def report(finished: CampaignFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign_report.write(finished, tmp_path_factory.mktemp("reports"))


def test_all_runs_finish_and_errors_are_bounded(finished: CampaignFolder) -> None:
    manifest = finished.manifest()
    assert len(manifest.entries) == 4
    factors = []
    for entry in manifest.entries:
        outcome, comparison = finished.outcome(entry), finished.comparison(entry)
        assert outcome is not None
        assert outcome.status == "done", outcome.error
        assert outcome.wall_s > 0
        step = comparison.step
        assert step.predicted == entry.predicted_ns
        assert all(map(math.isfinite, (comparison.cost_model_error, comparison.structure_error, comparison.step_spread)))
        measurement = finished.measurement(entry)
        assert len(measurement.step_ns) == campaign.steps_of(entry)
        assert measurement.steady_steps == tuple(range(campaign.WARMUP_STEPS, len(measurement.step_ns) - 1))
        assert not (finished.run_folder(entry) / "trace.json").exists()
        fastest = min(measurement.step_ns[step] for step in measurement.steady_steps)
        factors.append(max(step.predicted / fastest, fastest / step.predicted))
    # Other programs may slow the profile or a run down several times over, but hardly the fastest step of every run.
    assert min(factors) < 3


def test_nothing_is_run_twice(finished: CampaignFolder) -> None:
    def refuse(*_: object) -> Ended:
        raise AssertionError("a finished run was started again")

    assert campaign.pending(finished, finished.manifest().entries) == []
    campaign.run_all(finished, finished.manifest(), time.monotonic() + ENOUGH_S, refuse)


def test_report_holds_everything_and_is_small(report: Path) -> None:
    assert sorted(file.name for file in report.iterdir()) == NAMES
    assert re.fullmatch(r"validation-test-cpu-\d{4}-\d\d-\d\d", report.name)
    assert sum(file.stat().st_size for file in report.iterdir()) < 1_000_000
    for name in ("errors.png", "scatter.png", "kinds.png"):
        image = (report / name).read_bytes()
        assert image.startswith(b"\x89PNG")
        assert int.from_bytes(image[16:20], "big") == 1000  # pixels wide


def test_report_is_a_function_of_the_folder(finished: CampaignFolder, report: Path, tmp_path: Path) -> None:
    again = campaign_report.write(finished, tmp_path)
    assert {file.name: file.read_bytes() for file in again.iterdir()} == {
        file.name: file.read_bytes() for file in report.iterdir()
    }


def test_a_report_can_be_priced_again(finished: CampaignFolder, report: Path) -> None:
    """By the same version, to the same errors: nothing but the report is needed."""
    found = reprice.reprice(report)
    entries = finished.manifest().entries
    assert [run.run for run in found.runs] == [entry.name for entry in entries]
    for run, entry in zip(found.runs, entries, strict=True):
        comparison = finished.comparison(entry)
        assert run.then == run.now == pytest.approx(comparison.step.error)
        rehearsed = None if comparison.rehearsed is None else comparison.rehearsed.error
        assert (run.then_rehearsed, run.now_rehearsed) == (pytest.approx(rehearsed), pytest.approx(rehearsed))
    assert any(run.now_rehearsed is not None for run in found.runs)
    then, now = found.fit_errors["memory"]
    assert then == pytest.approx(now, abs=1e-3)


def test_a_large_trace_is_compressed(finished: CampaignFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign_report.write(finished, tmp_path)  # a trace.json from before must not stay beside it
    monkeypatch.setattr(campaign_report, "TRACE_LIMIT_BYTES", 1000)
    out = campaign_report.write(finished, tmp_path)
    assert not (out / "trace.json").exists()
    assert json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]


def test_figures_of_the_report_agree(report: Path, finished: CampaignFolder) -> None:
    validation = load(report / "campaign.json", Validation)
    runs, summary, text = validation.runs, validation.summary, (report / "table.md").read_text()
    errors = [run.step.predicted / run.step.measured - 1 for run in runs]
    assert {run.name for run in runs} == {entry.name for entry in finished.manifest().entries}
    assert [abs(run.error) for run in runs] == pytest.approx(sorted((abs(error) for error in errors), reverse=True))
    assert summary.step.mean_size == pytest.approx(fmean(map(abs, errors)))
    assert summary.step.mean == pytest.approx(fmean(errors))
    rehearsed = [run.error if run.rehearsed_error is None else run.rehearsed_error for run in runs]
    assert summary.rehearsed is not None, "some update on the host"
    assert summary.rehearsed.mean == pytest.approx(fmean(rehearsed))
    assert f"before the first step: mean \\|error\\| **{fmean(map(abs, rehearsed)):.1%}**" in text
    for entry in finished.manifest().entries:
        updates = finished.plan(entry).graph.queue(LaneKind.HOST_UPDATE)
        assert (next(run for run in runs if run.name == entry.name).rehearsed_error is None) == (not updates)
    assert f"mean \\|error\\| **{summary.step.mean_size:.1%}**, worst **{summary.step.worst:+.1%}**" in text
    assert sum(summary.histogram.counts) == len(runs)
    assert len(summary.histogram.edges_percent) == len(summary.histogram.counts) + 1
    for run in runs:
        assert (1 + run.cost_model_error) * (1 + run.structure_error) == pytest.approx(1 + run.error)
        assert f"| {run.name} | {run.sketch} |" in text
        assert sum(row.measured for row in run.kinds.values()) == sum(row.measured for row in run.lanes.values())
    for kind, found in summary.kinds.items():
        having = [run.kinds[kind].error for run in runs if kind in run.kinds]
        assert found.errors.mean == pytest.approx(fmean(error for error in having if error is not None))
    assert len(summary.regret) == 2
    for regret in summary.regret:
        times = [run.step.measured for run in runs if run.configuration.name == regret.configuration]
        assert regret.regret == pytest.approx(regret.planned_ns / min(times) - 1)
        assert regret.regret >= 0


def test_what_is_left_of_an_error_without_one_lane_of_it(finished: CampaignFolder) -> None:
    """A step that took twice as long as predicted in one lane, and as predicted in all others."""
    entry = finished.manifest().entries[0]
    plan, measurement = finished.plan(entry), finished.measurement(entry)
    predicted_ns = [span.end_ns - span.start_ns for span in plan.prediction.record.spans]
    task_ns = tuple(
        ns * (2 if task.lane.kind is LaneKind.COMPUTE else 1) for ns, task in zip(predicted_ns, plan.graph.tasks, strict=True)
    )
    step_ns = replay(plan.graph, task_ns, plan.prediction.handoffs)[0]
    record = msgspec.structs.replace(measurement.record, step_ns=step_ns)
    left = left_errors(plan, msgspec.structs.replace(measurement, task_ns=task_ns, record=record))
    assert set(left) == {str(lane) for lane in plan.graph.lanes}
    assert left.pop("compute") == 0
    assert set(left.values()) == {replay(plan.graph, predicted_ns, plan.prediction.handoffs)[0] / step_ns - 1}


def test_worst_case_is_explained_from_its_figures(report: Path) -> None:
    validation = load(report / "campaign.json", Validation)
    worst, run = validation.worst, validation.runs[0]
    assert worst.run == run.name
    assert worst.costs_ns + worst.structure_ns == run.step.predicted - run.step.measured
    assert worst.replayed_ns == run.step.replayed
    assert set(worst.kinds_ns) == set(run.kinds)
    assert set(worst.lanes_ns) == set(run.lanes)
    assert next(iter(worst.lanes_ns)) in worst.sentence
    assert worst.sentence in (report / "table.md").read_text()
    events = json.loads((report / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {"predicted", "measured"}
    assert {event["cat"] for event in events if event["ph"] == "X"} == set(run.kinds)


# -- what goes wrong ---------------------------------------------------------------------------


@pytest.fixture
def fresh(machine: MachineProfile, tmp_path: Path) -> CampaignFolder:
    folder = CampaignFolder(tmp_path)
    started(folder, machine, "--runs-per-config", "1", "--models", "tiny-qwen3")
    return folder


def status(folder: CampaignFolder) -> list[Outcome | None]:
    return [folder.outcome(entry) for entry in folder.manifest().entries]


@pytest.mark.parametrize(
    ("ended", "error"),
    [
        (Ended(1, "reserving\n\nruntime: out of memory: 3 GiB\n"), "exit code 1; reserving; runtime: out of memory: 3 GiB"),
        (Ended(-9, ""), "killed by signal 9, perhaps for memory"),
        (Ended(None, "stopped after 90 s"), "stopped after 90 s"),
    ],
)
def test_a_failed_run_is_an_outcome(fresh: CampaignFolder, ended: Ended, error: str, tmp_path: Path) -> None:
    campaign.run_all(fresh, fresh.manifest(), time.monotonic() + ENOUGH_S, lambda *_: ended)
    outcomes = status(fresh)
    assert [outcome.status for outcome in outcomes if outcome] == ["failed", "failed"]
    assert outcomes[0] is not None
    assert outcomes[0].error == error
    with pytest.raises(ValueError, match="no run has finished"):
        campaign_report.write(fresh, tmp_path / "reports")


def test_failures_are_reported_beside_the_rest(fresh: CampaignFolder, tmp_path: Path) -> None:
    ends = iter([launch_here, lambda *_: Ended(1, "runtime: all lanes stopped")])

    def in_turn(arguments: list[str], limit_s: float) -> Ended:
        return next(ends)(arguments, limit_s)

    campaign.run_all(fresh, fresh.manifest(), time.monotonic() + ENOUGH_S, in_turn)
    out = campaign_report.write(fresh, tmp_path / "reports")
    validation = load(out / "campaign.json", Validation)
    assert [failure.error for failure in validation.failures] == ["exit code 1; runtime: all lanes stopped"]
    text = (out / "table.md").read_text()
    assert "1 of 2 runs finished, 1 failed." in text
    assert "runtime: all lanes stopped" in text


def test_no_run_is_begun_that_the_budget_does_not_hold(fresh: CampaignFolder, capsys: pytest.CaptureFixture[str]) -> None:
    campaign.run_all(fresh, fresh.manifest(), time.monotonic() + 1, lambda *_: Ended(1, "started"))
    assert status(fresh) == [None, None]
    assert "2 runs left" in capsys.readouterr().out


def test_a_run_cut_short_by_the_budget_is_made_again(fresh: CampaignFolder) -> None:
    manifest = fresh.manifest()
    entry, budget = manifest.entries[0], campaign.estimated_s(manifest.entries[0]) + 1
    for attempt in (1, 2):
        found = campaign.run(
            fresh, entry, fresh.profile(), manifest, 1.0, time.monotonic() + budget, lambda *_: Ended(None, "stopped")
        )
        assert (found.status, found.attempts) == ("started", attempt)
        assert entry in campaign.pending(fresh, manifest.entries)
    found = campaign.run(fresh, entry, fresh.profile(), manifest, 1.0, time.monotonic() + budget, launch_here)
    assert found.status == "failed"
    assert "stopped during this run 2 times" in found.error


def test_another_profile_is_refused(fresh: CampaignFolder) -> None:
    save(fresh.profile_file, msgspec.structs.replace(fresh.profile(), name="other"))
    with pytest.raises(ValueError, match="is not the profile that the runs were predicted from"):
        campaign.run_all(fresh, fresh.manifest(), time.monotonic() + ENOUGH_S)


def test_commands(fresh: CampaignFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    campaign.main(["--resume", str(fresh.path), "--list"])
    printed = capsys.readouterr().out
    assert printed.count("to do") == 2
    assert "2 runs, about" in printed
    with pytest.raises(ValueError, match="holds a campaign already"):
        campaign.main(["-o", str(fresh.path), "--list"])
    with pytest.raises(ValueError, match="holds no campaign"):
        campaign.main(["--report", str(tmp_path / "nothing")])


def test_a_process_of_its_own(tmp_path: Path) -> None:
    ended = campaign.launch_process(["execute", str(tmp_path / "none.json")], 100)
    assert ended.code == 2
    assert "cannot be read" in ended.said
    assert campaign.launch_process(["--help"], 0.01) == Ended(None, "stopped after 0 s")


# -- statistics --------------------------------------------------------------------------------


@pytest.mark.parametrize("errors", [[0.0], [-0.031, 0.004, 0.079], [-0.5, 2.0], [0.08, 0.08], [-0.93] * 3 + [40.0]])
def test_histogram_counts_every_run_in_its_bin(errors: list[float]) -> None:
    found = histogram(errors)
    assert sum(found.counts) == len(errors)
    assert 0.0 in found.edges_percent
    for low, high, count in zip(found.edges_percent, found.edges_percent[1:], found.counts, strict=False):
        assert count == sum(low <= 100 * error < high for error in errors)
