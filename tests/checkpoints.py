"""Small Hugging Face directories for tests."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

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
