"""Checkpoints of published models, with every tensor's true name and shape and no values, are opened by the loader."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from public_configs import ACCEPTED, PublicConfig, label
from runtime.inputs.weights import SafetensorsWeights
from slideplan.hf_config import model_from_config

SHARD_BYTES = 4 << 30


def write_hollow(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Shards in which only headers take space on the disk: what follows them is a hole."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if filled > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += 2 * torch.Size(shape).numel()
    placed = {}
    for number, shard in enumerate(shards):
        header, end = {}, 0
        for name, shape in shard.items():
            start, end = end, end + 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        file = folder / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
        placed |= dict.fromkeys(shard, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """What transformers' model of the folder's config stores; tied weights once."""
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: tuple(tensor.shape) for name, tensor in network.named_parameters()}


@pytest.mark.parametrize("public", ACCEPTED, ids=label)
def test_every_tensor_is_found_and_none_is_left(public: PublicConfig, tmp_path: Path) -> None:
    shapes = shapes_of(public.write(tmp_path))
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == public.parameters
    write_hollow(tmp_path, shapes)
    try:
        assert SafetensorsWeights(model_from_config(tmp_path), tmp_path).notes == []
    finally:
        for shard in tmp_path.glob("*.safetensors"):
            shard.unlink()  # hollow as they are, they look like terabytes


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    shapes = shapes_of(ACCEPTED[0].write(tmp_path))
    missing = "model.layers.3.mlp.down_proj.weight"
    write_hollow(tmp_path, {name: shape for name, shape in shapes.items() if name != missing})
    with pytest.raises(ValueError, match=f"tensor {missing} is missing"):
        SafetensorsWeights(model_from_config(tmp_path), tmp_path)
