"""The profiler measures what plans need."""

import io
import time
from pathlib import Path
from statistics import median

import msgspec
import pytest
from rich.console import Console

from builders import tiny_model
from planner.reports.machines import profile_table
from runtime.lanes.backend import CpuBackend
from runtime.machine import identity
from runtime.probes import profile as probes
from runtime.probes.buffers import MemoryBuffers
from runtime.probes.profile import ProfileRequest, measure_again, profile_machine
from runtime.probes.timing import mean_rate_spread, placed_rate_spread, rate_spread, timed_in_turns, together
from runtime.probes.together import COMBINATIONS
from slideplan.codec import load, save
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.machine.figures import changes, figures
from slideplan.machine.profile import LayerShape, MachineProfile
from slideplan.model import UnitRole
from slideplan.progress import Progress, silent


def test_quick_profile_of_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    seen: list[Progress] = []
    request = ProfileRequest(
        name="here",
        models=(model,),
        shapes=((1, 32), (2, 64)),
        quick=True,
        device="cpu",
        gpu_memory_bytes=1 << 20,
        command="test",
    )
    # The rule leaves one of two cores to the optimizer: here it is all, which nothing else in the profile takes.
    monkeypatch.setattr(probes, "chosen_threads", lambda backend, points: points[-1].threads)
    profile = profile_machine(request, seen.append)
    assert profile.identity() == identity(CpuBackend())
    assert profile.gpu.memory_bytes == 1 << 20
    assert profile.provenance.source == "measured"
    measured = {(cost.shape, cost.kind, cost.micro_batch, cost.seq_len) for cost in profile.costs}
    for role, kinds in {
        UnitRole.EMBEDDING: (TaskKind.FORWARD, TaskKind.BACKWARD),
        UnitRole.LAYER: (TaskKind.FORWARD, TaskKind.FORWARD_KEEP, TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE),
        UnitRole.HEAD: (TaskKind.LOSS,),
    }.items():
        for kind in kinds:
            for shape in request.shapes:
                assert (LayerShape.of(model, role), kind, *shape) in measured
    assert all(0 < cost.duration_ns.p10 <= cost.duration_ns.p50 <= cost.duration_ns.p90 for cost in profile.costs)
    assert profile.host.dram_bytes_per_s >= profile.optimizer.host_bytes_per_s.p50
    cores = identity(CpuBackend()).cores
    assert [at.threads for at in profile.optimizer.by_threads][-1] == profile.optimizer.threads == cores
    assert all(at.beside_copies is not None for at in profile.optimizer.by_threads)
    beside = f"AdamW on the host, {cores} threads, beside copies"
    assert {beside, f"h2d copy beside {cores} threads of AdamW on the host"} <= set(figures(profile))
    shown = io.StringIO()
    Console(file=shown, width=200).print(profile_table(profile))
    assert beside in shown.getvalue()
    assert profile.launches == (), "on a CPU a handler returns when all is done"
    met = profile.interference
    assert met is not None
    assert {LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE, LaneKind.GPU_UPDATE} <= set(met.alone)
    lanes = [tuple(each.lane for each in combination) for combination in met.together]
    assert lanes == [combination for combination in COMBINATIONS if set(combination) <= set(met.alone)]
    for combination in met.together:
        for each in combination:
            assert each.speed == pytest.approx(max(1e-3, each.rate.p50 / met.alone[each.lane].p50), abs=1e-4)
            assert 0 < each.predicted <= 1
    assert 0 <= met.mean_residual <= met.max_residual
    assert {"link.duplex_bytes_per_s", "gpu.memory_bytes_per_s"} <= set(profile.spreads)
    assert profile.link.duplex_bytes_per_s == profile.spreads["link.duplex_bytes_per_s"].p50
    told = profile.handoffs
    assert 0 < told.host_to_device_ns == profile.spreads["handoffs.host_to_device_ns"].p50 < 10**8
    assert "handoffs.device_to_host_ns" in figures(profile)
    done = [progress.done for progress in seen]
    assert done == list(range(seen[-1].total + 1)), "every probe reports once, and the last call says all"
    save("profile.json", profile)
    assert load("profile.json", MachineProfile) == profile
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"], "the disk probe cleans up"
    checked_with: list[int] = []
    work = MemoryBuffers.work
    monkeypatch.setattr(
        MemoryBuffers, "work", lambda buffers, threads: (checked_with.append(threads), work(buffers, threads))[1]
    )
    checked = measure_again(profile, silent)
    assert checked_with == [cores]
    assert len(changes(figures(profile), checked)) == len(checked), "what is checked is in the profile by the same name"
    assert {"AdamW on the host", "h2d with d2h", "backward_recompute layer, hidden 64, 2x64, fused, bf16+"} <= set(checked)
    other = msgspec.structs.replace(profile, host=msgspec.structs.replace(profile.host, cpu="another"))
    with pytest.raises(ValueError, match=r"of another machine: .*cpu: another, "):
        measure_again(other, silent)


def test_unknown_device_is_refused() -> None:
    request = ProfileRequest(name="x", models=(tiny_model(),), shapes=((1, 16),), device="tpu")
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        profile_machine(request, silent)


def test_lanes_together_report_rates_over_their_common_time() -> None:
    """Two actions of known length: rates are theirs, and nobody stops before it ran twice."""
    runs = {LaneKind.H2D: 0, LaneKind.HOST_UPDATE: 0}

    def act(lane: LaneKind, seconds: float) -> None:
        runs[lane] += 1
        time.sleep(seconds)

    work = {
        LaneKind.H2D: (1000, lambda: act(LaneKind.H2D, 0.001)),
        LaneKind.HOST_UPDATE: (10, lambda: act(LaneKind.HOST_UPDATE, 0.02)),
    }
    rates = together(CpuBackend(), work, together_ns=1)
    assert runs[LaneKind.HOST_UPDATE] >= 3
    assert 0 < median(rates[LaneKind.HOST_UPDATE]) <= 10 / 0.02
    assert 0 < median(rates[LaneKind.H2D]) <= 1000 / 0.001


def test_a_sum_of_runs_is_not_the_median_run() -> None:
    """One run in four takes three times as long: 4 / 6 of the rate that the median run has."""
    durations = [10, 30, 10, 10] * 8
    assert rate_spread(1, durations).p50 == 100_000_000
    found = mean_rate_spread(1, durations)
    assert found.p10 == found.p50 == found.p90 == 66_666_667
    # A rate that drifts: twice as fast in the second half of the time.
    drifting = mean_rate_spread(1, [20] * 16 + [10] * 16)
    assert (drifting.p10, drifting.p50, drifting.p90) == (50_000_000, 66_666_667, 100_000_000)
    # In places of their own, runs are a process each.
    placed = placed_rate_spread(1, durations)
    assert (placed.p10, placed.p50, placed.p90) == (33_333_333, 66_666_667, 100_000_000)
    assert placed_rate_spread(1, [10] + [20] * 31).p10 == 50_000_000


def test_actions_in_turns_are_told_apart() -> None:
    ran = []
    actions = [lambda name=name, took=took: (ran.append(name), time.sleep(took)) for name, took in (("a", 0.001), ("b", 0.02))]
    short, long = timed_in_turns(CpuBackend(), LaneKind.COMPUTE, actions, 3)
    assert ran == ["a", "b"] * 5  # two turns warm up
    assert len(short) == len(long) == 3
    assert min(long) >= 20_000_000
    assert median(short) < min(long)


def test_a_lane_that_fails_ends_the_others() -> None:
    def fail() -> None:
        raise RuntimeError("broken lane")

    with pytest.raises(RuntimeError, match="broken lane"):
        together(CpuBackend(), {LaneKind.H2D: (1, fail), LaneKind.D2H: (1, lambda: None)}, together_ns=1)
