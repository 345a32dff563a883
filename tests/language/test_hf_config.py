from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import tiny_model
from slideplan.hf_config import config_of, model_from_config
from wording import says

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip
ABSENT = object()


def config_file(folder: Path, base: dict[str, Any] = LLAMA, **changes: Any) -> Path:
    fields = {key: value for key, value in (base | changes).items() if value is not ABSENT}
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


def read(folder: Path, **changes: Any):
    return model_from_config(config_file(folder, **changes).parent)


def refusal(folder: Path, **changes: Any) -> str:
    path = config_file(folder, **changes)
    with pytest.raises(ValueError) as raised:
        model_from_config(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def test_minimal_config_takes_the_defaults_of_transformers(tmp_path: Path):
    model = read(tmp_path)
    assert model.name == tmp_path.name
    assert (model.head_dim, model.rms_norm_eps, model.rope_theta) == (16, 1e-6, 10000.0)
    assert (model.tied_embeddings, model.attention_bias, model.qk_norm, model.rope_scaling) == (False, "none", False, None)


def test_directory_and_file_are_the_same(tmp_path: Path):
    path = config_file(tmp_path)
    assert model_from_config(path) == model_from_config(tmp_path)


def test_old_and_new_rope_layouts_agree(tmp_path: Path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    new = read(tmp_path, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5} | scaling)
    assert new.rope_theta == 5e5
    assert new.rope_scaling == {"rope_type": "llama3"} | scaling
    assert read(tmp_path, rope_theta=500000, rope_scaling={"rope_type": "llama3"} | scaling) == new
    assert read(tmp_path, rope_theta=5e5, rope_scaling={"type": "llama3"} | scaling) == new
    plain = read(tmp_path, rope_theta=1e6, rope_scaling=None)
    assert (plain.rope_theta, plain.rope_scaling) == (1e6, None)
    assert read(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e6}) == plain


@pytest.mark.parametrize(
    ("model_type", "flag", "bias"),
    [("llama", ABSENT, "none"), ("llama", True, "qkvo"), ("qwen3", False, "none"), ("qwen3", True, "qkvo"),
     ("qwen2", ABSENT, "qkv"), ("qwen2", False, "qkv"), ("mistral", False, "none")],
)  # fmt: skip
def test_attention_bias(tmp_path: Path, model_type: str, flag: Any, bias: str):
    assert read(tmp_path, model_type=model_type, attention_bias=flag).attention_bias == bias


def test_head_dim_and_key_heads_where_absent(tmp_path: Path):
    assert read(tmp_path, num_key_value_heads=ABSENT).kv_heads == 4
    assert read(tmp_path, model_type="qwen2", num_key_value_heads=None).kv_heads == 4
    assert read(tmp_path, model_type="qwen3").head_dim == 128
    assert read(tmp_path, head_dim=None).head_dim == 16
    assert read(tmp_path, head_dim=32).head_dim == 32
    assert "`num_key_value_heads` is missing" in refusal(tmp_path, model_type="mistral", num_key_value_heads=ABSENT)
    assert "hidden_size 66 is no multiple of 4 heads; add head_dim" in refusal(tmp_path, hidden_size=66)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"model_type": "llama", "sliding_window": 64}, None),
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, 64),
        (
            {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "layer_types": ["full_attention"] * 4},
            None,
        ),
        ({"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"]}, 64),
    ],
)
def test_sliding_window_only_where_active(tmp_path: Path, changes: dict, window: int | None):
    assert read(tmp_path, **changes).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "field `model_type` is 'gpt2'; supported are llama, mistral, qwen2, qwen3"),
        ({"model_type": ABSENT}, "field `model_type` is None"),
        ({"hidden_act": "gelu"}, "field `hidden_act` is 'gelu'; only 'silu' is supported"),
        ({"mlp_bias": True}, "field `mlp_bias` is true"),
        ({"attention_dropout": 0.1}, "field `attention_dropout` is 0.1; dropout is not supported, set it to 0"),
        ({"attention_bias": True, "model_type": "mistral"}, "field `attention_bias` is true; Mistral layers have no biases"),
        ({"quantization_config": {"bits": 4}}, "field `quantization_config` is set"),
        ({"hidden_size": ABSENT}, "field `hidden_size` is missing; add it (a positive whole number)"),
        ({"vocab_size": None}, "field `vocab_size` is missing"),
        ({"hidden_size": 64.0}, "field `hidden_size` is 64.0, must be a positive whole number"),
        ({"hidden_size": "64"}, "field `hidden_size` is '64', must be a positive whole number"),
        ({"num_hidden_layers": True}, "field `num_hidden_layers` is True, must be a positive whole number"),
        ({"intermediate_size": 0}, "field `intermediate_size` is 0, must be a positive whole number"),
        ({"num_attention_heads": -4}, "field `num_attention_heads` is -4"),
        ({"num_key_value_heads": 3}, "heads (4) is not a multiple of kv_heads (3)"),
        ({"head_dim": 15}, "head_dim is 15, rotary embedding needs an even one"),
        ({"rms_norm_eps": "tiny"}, "field `rms_norm_eps` is 'tiny', must be a positive number"),
        ({"rms_norm_eps": 0}, "field `rms_norm_eps` is 0.0, must be a positive number"),
        ({"rope_theta": [1]}, "field `rope_theta` is [1], must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "field `tie_word_embeddings` is 'yes', must be true or false"),
        ({"rope_scaling": {"type": "spiral"}}, "field `rope_scaling.rope_type` is 'spiral'; supported are default, linear"),
        ({"rope_scaling": 8}, "field `rope_scaling` is 8, must be an object"),
        ({"rope_parameters": {"rope_theta": "x"}}, "field `rope_parameters.rope_theta` is 'x', must be a positive number"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1}}}, "per layer type are not supported"),
        ({"partial_rotary_factor": 0.5}, "field `partial_rotary_factor` is 0.5"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": ["linear"]}, "`layer_types`"),
        ({"model_type": "mistral", "sliding_window": "wide"}, "field `sliding_window` is 'wide'"),
    ],
)
def test_refusals_name_file_field_and_value(tmp_path: Path, changes: dict, message: str):
    assert says(refusal(tmp_path, **changes), message)


@pytest.mark.parametrize(
    ("content", "message"), [(b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[1]", "holds a JSON list")]
)
def test_files_that_are_no_config(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        model_from_config(tmp_path)


def test_missing_config(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config\.json: cannot be read: No such file .*; name a directory with"):
        model_from_config(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"architecture": "mistral", "sliding_window": 32},
        {"architecture": "qwen2", "attention_bias": "qkv", "sliding_window": 32},
        {"architecture": "qwen3", "qk_norm": True, "attention_bias": "qkvo", "tied_embeddings": True},
        {"attention_bias": "qkvo", "head_dim": 32, "rope_theta": 5e5},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    ],
)
def test_round_trip_of_unusual_models(tmp_path: Path, fields: dict):
    model = tiny_model(**fields)
    (tmp_path / "config.json").write_text(json.dumps(config_of(model)))
    assert model_from_config(tmp_path) == msgspec.structs.replace(model, name=tmp_path.name)


@pytest.mark.parametrize("fields", [{"qk_norm": True}, {"attention_bias": "qkv"}, {"architecture": "qwen2"}])
def test_models_that_transformers_cannot_express(fields: dict):
    with pytest.raises(ValueError, match="choose another architecture"):
        config_of(tiny_model(**fields))
