"""Damaged checkpoints and unusual configs: a message, or what transformers makes of them."""

from __future__ import annotations

import json
import logging
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM

from builders import tiny_model
from checkpoints import random_state_dict
from fuzzing import readings
from runtime.compute.eager import rotary_positions, skeleton
from runtime.inputs.weights import SafetensorsWeights
from slideplan.hf_config import model_from_config

MODEL = tiny_model(layers=1, hidden=8, heads=2, kv_heads=1, head_dim=4, ffn=8, vocabulary=16)
WHOLE = save(random_state_dict(MODEL))
HEADER_BYTES = 8 + struct.unpack("<Q", WHOLE[:8])[0]
HEADER: dict[str, Any] = json.loads(WHOLE[8:HEADER_BYTES])


def opened(files: dict[str, bytes]) -> SafetensorsWeights | None:
    """The checkpoint of a folder, read to its end; None where it is refused as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            source = SafetensorsWeights(MODEL, Path(folder))
        except ValueError as error:
            assert folder in str(error)
            assert "\n" not in str(error)
            return None
        for unit in range(MODEL.units):
            assert all(piece.values.is_floating_point() for piece in source.pieces(unit))
        return source


def with_header(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", (len(header) if length is None else length) % (1 << 64)) + header + WHOLE[HEADER_BYTES:]


def test_the_whole_file_is_read() -> None:
    source = opened({"model.safetensors": WHOLE})
    assert source is not None
    assert source.notes == []


@readings(200)
@given(st.integers(0, HEADER_BYTES + 16), st.binary(max_size=4), st.integers(-8, 8))
def test_bytes_changed_anywhere_in_the_header(place: int, content: bytes, grown: int) -> None:
    changed = WHOLE[:place] + content + WHOLE[place + len(content) :]
    opened({"model.safetensors": changed[: len(changed) + min(grown, 0)] + b"\0" * max(grown, 0)})


NUMBER = st.one_of(st.integers(-2, 300), st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30]), st.none(), st.floats())
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "F32", "F8_E4M3", "I64", "X", "", None]),
        "shape": st.one_of(st.lists(NUMBER, max_size=4), NUMBER),
        "data_offsets": st.one_of(st.lists(NUMBER, max_size=3), NUMBER),
    },
)


@readings(200)
@given(
    st.dictionaries(st.one_of(st.sampled_from(sorted(HEADER)), st.text(max_size=6)), st.one_of(ENTRY, st.none()), max_size=3),
    st.one_of(st.none(), st.integers(-(1 << 63), 1 << 63)),
)
def test_entries_of_the_header_changed(changes: dict[str, Any], length: int | None) -> None:
    header = {name: {**HEADER.get(name, {}), **entry} for name, entry in changes.items() if entry is not None}
    kept = {name: entry for name, entry in HEADER.items() if name not in changes}
    opened({"model.safetensors": with_header(json.dumps(kept | header).encode(), length)})


LEAVES = st.one_of(st.none(), st.text(max_size=4), NUMBER)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner), max_leaves=6
)  # fmt: skip
PLACES = st.sampled_from(["a.safetensors", "b.safetensors", "..", ".", "", "/", "\0", "x" * 300])
MAPS = st.one_of(JSON, st.dictionaries(st.sampled_from(sorted(HEADER)), PLACES))


@readings(150)
@given(st.one_of(st.binary(max_size=32), MAPS.map(lambda value: json.dumps({"weight_map": value}).encode())))
def test_any_index(index: bytes) -> None:
    opened({"model.safetensors.index.json": index, "a.safetensors": WHOLE})


# Values that a config may well have, small enough to build the model of every one that is accepted.
TYPES = ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "mrope", None]
SCALINGS = st.fixed_dictionaries(
    {},
    optional={
        "rope_type": st.sampled_from(TYPES),
        "type": st.sampled_from(["linear", "su", "yarn"]),
        "rope_theta": st.sampled_from([1e4, 500000, None]),
        "factor": st.sampled_from([1, 2.0, 8, 0.5, None]),
        "original_max_position_embeddings": st.sampled_from([16, 64, 128, None]),
        "low_freq_factor": st.sampled_from([1.0, 4]),
        "high_freq_factor": st.sampled_from([4.0, 2]),
        "short_factor": st.sampled_from([[1.0, 1.5], [1, 2, 3]]),
        "long_factor": st.just([2, 3]),
        "attention_factor": st.sampled_from([1.0, 1.2]),
        "mscale": st.sampled_from([0.7, 1.0]),
        "mscale_all_dim": st.just(0.9),
        "beta_fast": st.just(8),
        "truncate": st.booleans(),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
    },
)  # fmt: skip
CONFIGS = st.fixed_dictionaries(
    {
        "model_type": st.sampled_from(["llama", "mistral", "qwen2", "qwen3"]),
        "hidden_size": st.sampled_from([8, 12]),
        "num_attention_heads": st.sampled_from([2, 4]),
        "num_hidden_layers": st.integers(1, 2),
        "intermediate_size": st.integers(1, 9),
        "vocab_size": st.integers(1, 40),
    },
    optional={
        "num_key_value_heads": st.sampled_from([1, 2, 4, None]),
        "head_dim": st.sampled_from([4, 6, 8, None]),
        "max_position_embeddings": st.sampled_from([64, 128]),
        "rope_scaling": st.one_of(st.none(), SCALINGS),
        "rope_parameters": st.one_of(st.none(), SCALINGS),
        "rope_theta": st.sampled_from([1e4, 1e6]),
        "original_max_position_embeddings": st.sampled_from([16, 32]),
        "partial_rotary_factor": st.sampled_from([1.0, 0.5]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "sliding_window": st.sampled_from([16, None]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 2),
        "layer_types": st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=1, max_size=2),
    },
)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    logging.disable(logging.WARNING)  # transformers warns of much that these configs do
    yield
    logging.disable(logging.NOTSET)


@readings(120)
@given(CONFIGS)
def test_what_is_accepted_is_what_transformers_makes_of_it(config: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        try:
            model = model_from_config(Path(folder))
        except ValueError:
            return
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        rotary = type(network.model.rotary_emb)(network.config)
    assert model.parameter_count == sum(parameter.numel() for parameter in network.parameters())
    ours = rotary_positions(skeleton(model), 60, model.hidden, torch.device("cpu"))
    theirs = rotary(torch.empty(1, 1, 1, dtype=torch.bfloat16), torch.arange(60)[None])
    assert all(torch.equal(left, right) for left, right in zip(ours, theirs, strict=True))
    layers = network.config.layer_types if hasattr(network.config, "layer_types") else []
    slides = network.config.model_type == "mistral" or "sliding_attention" in layers
    expected = getattr(network.config, "sliding_window", None) if slides and network.config.model_type != "llama" else None
    assert model.sliding_window == expected
