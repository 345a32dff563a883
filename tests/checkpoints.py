"""Small Hugging Face directories for tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from running import state_dict
from runtime.inputs.weights import RandomWeights
from slideplan.hf_config import config_of
from slideplan.model import ModelSpec


def random_state_dict(model: ModelSpec, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random weights under their Hugging Face names."""
    source = RandomWeights(model, seed=5, device=torch.device("cpu"))
    return {name: value.to(dtype) for name, value in state_dict(source, model).items()}


def write_checkpoint(folder: Path, model: ModelSpec, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """config.json and model.safetensors, with these tensors or random ones."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    save_file(random_state_dict(model) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def masters_of(folder: Path, model: ModelSpec, names: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """fp32 masters of a checkpoint by Hugging Face name, put together here from bits. names: stored name by parameter."""
    found = {}
    for unit in range(model.units):
        file = f"-{unit + 1:05}-of-{model.units:05}.safetensors"
        high, low = load_file(folder / f"model{file}"), load_file(folder / f"optimizer{file}")["remainder"]
        for each in model.parameters(model.role(unit)):
            name = model.unit_prefix(unit) + each.name
            bits = high[(names or {}).get(name, name)].reshape(-1).view(torch.int16).to(torch.int32) << 16
            bits += low[each.offset : each.offset + each.elements].to(torch.int32)
            found[name] = bits.view(torch.float32).view(each.shape)
    return found
