"""Checkpoints in safetensors, whole and in shards, right and wrong."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from builders import tiny_model, tiny_policy, tiny_workload
from checkpoints import random_state_dict, write_checkpoint
from running import masters, plan_for, token_windows, unit_tensors
from runtime.inputs import weights
from runtime.inputs.weights import RandomWeights, SafetensorsWeights
from runtime.lanes.backend import CpuBackend
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.session import Session

MODEL = tiny_model()


@pytest.mark.parametrize("piece_elements", [1, 1000, weights.PIECE_ELEMENTS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_weights_arrive_in_the_master_exactly(
    tmp_path: Path, dtype: torch.dtype, piece_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "PIECE_ELEMENTS", piece_elements)
    tensors = random_state_dict(MODEL, dtype)
    source = SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, tensors))
    backend = CpuBackend()
    plan = plan_for(MODEL, tiny_policy(MODEL, resident_state=(1,)), tiny_workload(), backend)
    windows = token_windows(MODEL, plan.workload)
    session = Session(plan, backend, windows, AdamW(), HostUpdate(plan.machine.optimizer_threads))
    session.begin(source)
    assert all(torch.equal(tensors[name].float(), value) for name, value in masters(session).items())


def test_shards(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    source = SafetensorsWeights(MODEL, tmp_path)
    for name, value in unit_tensors(source, 2).items():
        assert torch.equal(value, tensors[MODEL.unit_prefix(2) + name])
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-2\.safetensors: not a readable safetensors file"):
        SafetensorsWeights(MODEL, tmp_path)


def test_wrong_checkpoints_are_refused(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    wrong = dict(tensors)
    wrong["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 3, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"model\.layers\.2\.mlp\.up_proj\.weight .* shape \[3, 3\], expected \[128, 64\]"):
        SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, wrong))
    del wrong["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, wrong))
    wrong["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 64, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"has dtype I8\b"):
        SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, wrong))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a readable safetensors file"):
        SafetensorsWeights(MODEL, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither"):
        SafetensorsWeights(MODEL, tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        SafetensorsWeights(MODEL, tmp_path / "nothing")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors index"):
        SafetensorsWeights(MODEL, tmp_path)


def test_random_weights_do_not_depend_on_order() -> None:
    source = RandomWeights(MODEL, seed=0, device=torch.device("cpu"))
    first = unit_tensors(source, 3)
    unit_tensors(source, 1)
    assert all(torch.equal(value, first[name]) for name, value in unit_tensors(source, 3).items())
    assert not torch.equal(unit_tensors(source, 2)["mlp.up_proj.weight"], first["mlp.up_proj.weight"])
