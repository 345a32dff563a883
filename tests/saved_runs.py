"""Run folders of tiny runs that save, stop and go on, for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builders import tiny_model, tiny_policy, tiny_workload
from running import EVERYTHING, plan_for
from runtime import run, training
from runtime.checkpoints.manifest import Saving
from runtime.checkpoints.resuming import candidates
from runtime.lanes.backend import Backend, CpuBackend
from runtime.optimizer.adamw import AdamW
from slideplan.codec import save
from slideplan.model import ModelSpec
from slideplan.plan import Plan
from slideplan.policy import Workload
from slideplan.progress import Progress

SETTINGS = AdamW(lr=1e-3, weight_decay=0.01)
STEPS, CUT = 5, 3
UNTIED, TIED = tiny_model(vocabulary=256), tiny_model(vocabulary=256, tied_embeddings=True)

PLACEMENTS = {
    "streamed": {},
    "boundaries on the host": {"offload_boundaries": True},
    "resident weights": {"resident_weights": (1, 2)},
    "resident state": {"resident_state": (0, 1, 2)},
    "nothing offloaded": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
    "kept": {"keep": (2, 3, 4)},
    "deferred updates": {"update_order": (0, 1, 2, 3, 4, 5)},
    "passing": {"resident_state": (0, 1), "stream_state": (2, 3)},
    "lean state": {"resident_state": (1, 2, 3), "ssd_state": (4,), "state": "lean"},
    "lean state that passes": {"stream_state": (1, 2, 3), "state": "lean", "state_chunks": 3},
    "moments in bf16": {"resident_state": (1,), "stream_state": (2,), "state": "bf16-moments"},
    "state on the SSD": {"ssd_state": (0, 1, 2, 3, 4, 5)},
    "layers on the SSD": {"ssd_state": (0, 1, 2, 3), "ssd_weights": (1, 2, 4)},
    "lean state that passes from the SSD": {"ssd_stream": (1, 2), "state": "lean"},
    "moments on the SSD": {"ssd_moments": (1, 3, 5), "ssd_chunks": 2},
    "everything": EVERYTHING | {"kernels": "fused"},
}


def text(folder: Path) -> Path:
    """So little that the runs go through it more than once."""
    data = folder / "text.txt"
    if not data.exists():
        data.write_text("".join(f"{number} times {number} is {number * number}.\n" for number in range(12)))
    return data


def planned(model: ModelSpec, backend: Backend | None = None, workload: Workload | None = None, **knobs: object) -> Plan:
    """A plan of these knobs; by default for the CPU, and for steps of few tokens."""
    return plan_for(model, tiny_policy(model, **knobs), workload or tiny_workload(), backend or CpuBackend())


def notes_of(error: BaseException) -> str:
    return "; ".join(getattr(error, "__notes__", []))


def lose_the_loss(patch: pytest.MonkeyPatch, first_step: int) -> None:
    """Losses of this step and later ones are not finite."""
    result_of = training.result_of

    def broken(*where: Any) -> training.StepResult:
        found = result_of(*where)
        return found if found.step < first_step else found._replace(loss=float("nan"))

    patch.setattr(training, "result_of", broken)


class Run:
    """A run folder; what is shown is kept."""

    def __init__(self, folder: Path, plan: Plan, saving: Saving | None = None) -> None:
        folder.mkdir(parents=True)
        save(folder / "plan.json", plan)
        self.folder = folder
        self.shown: list[Progress] = []
        self.request = run.RunRequest(
            plan=plan,
            plan_path="plan.json",
            out=folder,
            steps=STEPS,
            device=plan.machine.identity.backend,
            settings=SETTINGS,
            saving=saving or Saving(),
            data=text(folder.parent),
            ssd=(folder.parent,),
        )

    def train(self, **changes: object) -> None:
        run.execute(dataclasses.replace(self.request, **changes), self.shown.append)

    def resume(self, step: int | None = None, **changes: object) -> None:
        found = candidates(self.folder, self.shown.append, step)
        self.train(found=found, **changes)

    @property
    def notes(self) -> str:
        return "\n".join(each.note for each in self.shown if each.note)

    @property
    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def state(self, step: int = STEPS) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint by file and name, as bytes."""
        folder = self.folder / "checkpoints" / f"step-{step:08}"
        return {
            f"{file.name}/{name}": value.reshape(-1).view(torch.uint8)
            for file in sorted(folder.glob("*.safetensors"))
            for name, value in load_file(file).items()
        }


def check_same(left: Run, right: Run) -> None:
    assert left.metrics == right.metrics
    first, second = left.state(), right.state()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
