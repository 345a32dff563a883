"""The profiler measures what plans need."""

from pathlib import Path

import pytest

from builders import tiny_model
from slideplan.plan.codec import load, save
from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import LayerShape, MachineProfile
from slideplan.plan.model import UnitRole
from slideplan.runtime.backend import CpuBackend
from slideplan.runtime.machine import identity
from slideplan.runtime.probes import ProfileRequest, profile_machine


def test_quick_profile_of_this_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    seen: list[tuple[str, int, int]] = []
    request = ProfileRequest(
        name="here",
        models=(model,),
        shapes=((1, 32), (2, 64)),
        quick=True,
        device="cpu",
        gpu_memory_bytes=1 << 20,
        command="test",
    )
    profile = profile_machine(request, lambda *progress: seen.append(progress))
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
    done = [progress[1] for progress in seen]
    assert done == list(range(seen[-1][2] + 1)), "every probe reports once, and the last call says all"
    save("profile.json", profile)
    assert load("profile.json", MachineProfile) == profile
    assert [file.name for file in tmp_path.iterdir()] == ["profile.json"], "the disk probe cleans up"


def test_unknown_device_is_refused() -> None:
    request = ProfileRequest(name="x", models=(tiny_model(),), shapes=((1, 16),), device="tpu")
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        profile_machine(request, lambda *_: None)
