"""Rotary embeddings of every variant of config.json, held against transformers' own model of the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from runtime.compute.eager import rotary_positions, skeleton
from slideplan.hf_config import config_of, model_from_config

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
LISTS = {"short_factor": [1 + 0.05 * i for i in range(8)], "long_factor": [1 + 0.3 * i for i in range(8)]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LONGROPE = {"rope_type": "longrope", **LISTS}
ORIGINAL = {"original_max_position_embeddings": 64}


def old(scaling: dict[str, Any] | None, **beside: Any) -> dict[str, Any]:
    return {"rope_theta": 5e5, "rope_scaling": scaling, **beside}


def new(parameters: dict[str, Any], **beside: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 5e5, **parameters}, **beside}


VARIANTS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "base frequency": {"rope_theta": 1000000},
    "null": old(None),
    "default": new({"rope_type": "default"}),
    "default ignores a factor": new({"rope_type": "default", "factor": 2.0}),
    "original length beside the default": {"rope_theta": 1e4, **ORIGINAL},
    "base frequency inside wins": {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "base frequency beside new parameters": {"rope_theta": 1e6, "rope_parameters": {"rope_type": "default"}},
    "whole heads": new({"rope_type": "default", "partial_rotary_factor": 1.0}),
    "empty scaling beside parameters": new({**LLAMA3, **ORIGINAL}, rope_scaling={}),
    "null scaling beside parameters": new({**LLAMA3, **ORIGINAL}, rope_scaling=None),
    "scaling beside empty parameters": old({**LLAMA3, **ORIGINAL}, rope_parameters={}),
    "scaling and the same parameters": old({**LLAMA3, **ORIGINAL}, rope_parameters={**LLAMA3, **ORIGINAL, "rope_theta": 5e5}),
    "linear": old({"type": "linear", "factor": 4}),
    "linear, new": new({"rope_type": "linear", "factor": 4.0}),
    "both names of the type": old({"type": "mrope", "rope_type": "linear", "factor": 4.0}),
    "dynamic": old({"type": "dynamic", "factor": 2.0}),
    "dynamic, new": new({"rope_type": "dynamic", "factor": 2.0}),
    "yarn": old({**YARN, **ORIGINAL}),
    "yarn, original length on top": old(YARN, **ORIGINAL),
    "yarn, original length on top wins": old({**YARN, "original_max_position_embeddings": 256}, **ORIGINAL),
    "yarn, no original length": old(YARN),
    "yarn, fine-tuned": old({**YARN, **ORIGINAL, "finetuned": True}),
    "yarn, factor from lengths": old({**YARN, **ORIGINAL, "factor": None}),
    "yarn, everything": old(
        {**YARN, **ORIGINAL, "beta_fast": 16, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.8, "truncate": False}
    ),
    "yarn, attention factor": new({**YARN, **ORIGINAL, "attention_factor": 1.3}),
    "longrope": old({**LONGROPE, **ORIGINAL}),
    "longrope, original length on top": old(LONGROPE, **ORIGINAL),
    "longrope, no original length": old(LONGROPE),
    "longrope, factor": old({**LONGROPE, **ORIGINAL, "factor": 3.0}),
    "longrope, attention factor": new({**LONGROPE, **ORIGINAL, "attention_factor": 1.2}),
    "longrope, whole numbers": old({"type": "longrope", "short_factor": [1] * 8, "long_factor": [2] * 8}, **ORIGINAL),
    "longrope, longer than it will be": old({**LONGROPE, "original_max_position_embeddings": 1024}),
    "llama3": old({**LLAMA3, **ORIGINAL}),
    "llama3, original length on top": old(LLAMA3, **ORIGINAL),
    "llama3, no original length": old(LLAMA3),
    "llama3, new": new({**LLAMA3, **ORIGINAL}),
    "proportional": new({"rope_type": "proportional", "partial_rotary_factor": 0.5}),
    "proportional, factor": new({"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0}),
    "proportional, part on top": new({"rope_type": "proportional"}, partial_rotary_factor=0.5),
}


def cos_and_sin(rotary: torch.nn.Module, seq_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary(torch.empty(1, 1, 64, dtype=torch.bfloat16), torch.arange(seq_len)[None])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", VARIANTS)
def test_cos_and_sin_are_those_of_transformers(name: str, kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **SHAPE, **VARIANTS[name]}))
    model = model_from_config(tmp_path)
    parts = skeleton(model)
    network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.bfloat16)
    for seq_len in (48, 500):  # within and beyond the original length
        ours = rotary_positions(parts, seq_len, 64, torch.device("cpu"))
        for left, right in zip(ours, cos_and_sin(network.model.rotary_emb, seq_len), strict=True):
            assert left.shape == (1, seq_len, 16)
            assert torch.equal(left, right), (left - right).abs().max()
    # As JSON again it is the same model, whatever it is offered to.
    (tmp_path / "config.json").write_text(json.dumps(config_of(model)))
    assert model_from_config(tmp_path) == model


def test_variants_differ_from_each_other(tmp_path: Path) -> None:
    """Or the test above would hold as well if all of them were read as the default."""
    seen = set()
    for name in (
        "nothing",
        "linear",
        "yarn",
        "longrope",
        "llama3",
        "proportional",
        "yarn, everything",
        "llama3, no original length",
    ):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SHAPE, **VARIANTS[name]}))
        cos, _ = rotary_positions(skeleton(model_from_config(tmp_path)), 500, 64, torch.device("cpu"))
        seen.add(cos.float().numpy().tobytes())
    assert len(seen) == 8


@pytest.mark.parametrize("name", [name for name in VARIANTS if "no original" not in name])
def test_more_positions_change_nothing_below_them(name: str, tmp_path: Path) -> None:
    """Whatever a run folder's config offers, a plan computes what it was made for."""
    config = {"model_type": "llama", **SHAPE, **VARIANTS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = model_from_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config_of(planned), "max_position_embeddings": 4096}))
    offered = model_from_config(tmp_path)
    assert offered.rope_scaling == planned.rope_scaling
    parts = [skeleton(model) for model in (planned, offered)]
    for seq_len in (48, 500):
        both = [rotary_positions(each, seq_len, 64, torch.device("cpu")) for each in parts]
        assert all(torch.equal(left, right) for left, right in zip(*both, strict=True))
