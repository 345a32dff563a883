"""Runs on a GPU that save and go on train bit for bit as runs that do neither, without anything set for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders import tiny_model, tiny_workload
from runtime import rehearsal
from runtime.checkpoints.manifest import Saving
from runtime.lanes.backend import CudaBackend
from saved_runs import CUT, PLACEMENTS, Run, check_same, planned

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

SHAPE = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "vocabulary": 1024}
MODELS = {"untied": tiny_model(**SHAPE), "tied": tiny_model(**SHAPE, tied_embeddings=True)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rehearsals; and the tiny plans' ledgers leave no room for what a real GPU's libraries take."""
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
    monkeypatch.setattr(CudaBackend, "limit_gpu_bytes", lambda *_: None)


@pytest.mark.parametrize("kernels", ["fused", "graphed"])
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_that_was_cut_trains_bit_for_bit_as_one_that_was_not(tmp_path: Path, model: str, name: str, kernels: str) -> None:
    plan = planned(MODELS[model], CudaBackend(), tiny_workload(seq_len=128), **PLACEMENTS[name] | {"kernels": kernels})
    whole, cut = Run(tmp_path / "whole", plan), Run(tmp_path / "cut", plan, Saving(every=2))
    whole.train()
    cut.train(steps=CUT)
    cut.resume()
    check_same(whole, cut)


def test_a_plan_with_other_tiers_goes_on_bit_for_bit(tmp_path: Path) -> None:
    workload = tiny_workload(seq_len=128)
    before = planned(MODELS["tied"], CudaBackend(), workload, kernels="fused")
    after = planned(
        MODELS["tied"], CudaBackend(), workload, kernels="fused", resident_state=(0, 1), stream_state=(2, 3), window=3
    )
    whole, cut = Run(tmp_path / "whole", before), Run(tmp_path / "cut", before)
    whole.train()
    cut.train(steps=CUT)
    cut.resume(plan=after)
    check_same(whole, cut)
