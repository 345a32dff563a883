from __future__ import annotations

import json
import os
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
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
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
    for absent in (ABSENT, None):
        assert "`num_key_value_heads` is missing" in refusal(tmp_path, model_type="mistral", num_key_value_heads=absent)
    assert "hidden_size 66 is no multiple of 4 heads; add head_dim" in refusal(tmp_path, model_type="mistral", hidden_size=66)
    assert "`hidden_size` is 66, must be a multiple of num_attention_heads 4" in refusal(tmp_path, hidden_size=66, head_dim=16)


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
        (
            {"model_type": "qwen3", "sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
            64,
        ),
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
        ({"head_dim": None, "model_type": "qwen2"}, "field `head_dim` is null, which transformers cannot read for qwen2"),
        ({"head_dim": None, "model_type": "qwen3"}, "field `head_dim` is null"),
        ({"rope_theta": None}, "field `rope_theta` is null, which transformers cannot read; remove it or give its value"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "field `rope_parameters.rope_theta` is null"),
        ({"rope_parameters": {"rope_type": None, "rope_theta": 1e4}}, "field `rope_parameters.rope_type` is null"),
        ({"rope_scaling": {"type": None}}, "field `rope_scaling.type` is null"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": None}}, "field `rope_scaling.truncate` is null"),
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
        (
            {"architectures": ["LlavaLlamaForCausalLM"]},
            "field `architectures` is ['LlavaLlamaForCausalLM']; for model_type llama",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM is supported"),
        ({"architectures": ["Qwen2ForRewardModel"], "model_type": "qwen2"}, "field `architectures` is ['Qwen2ForRewardModel']"),
        ({"architectures": ["LlamaForCausalLMEagle3"]}, "field `architectures`"),
        ({"architectures": ["LlamaForCausalLM", "LlamaForTokenClassification"]}, "field `architectures`"),
        ({"architectures": ["MistralForCausalLM"]}, "field `architectures`"),
        ({"architectures": "LlamaForCausalLM"}, "field `architectures`"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_x.LlamaForCausalLM"}},
            "field `auto_map` names code of the model's own",
        ),
        (
            {"auto_map": {"AutoConfig": "configuration_clex.CLEXLlamaConfig"}},
            "('AutoConfig: configuration_clex.CLEXLlamaConfig')",
        ),
        ({"auto_map": {"AutoModel": "a--b.C", "AutoTokenizer": ["x", None]}}, "field `auto_map`"),
        ({"auto_map": "modeling_x"}, "field `auto_map`"),
        ({"mm_vision_tower": "a/vision-tower"}, "field `mm_vision_tower` is 'a/vision-tower'"),
        ({"vision_config": {"hidden_size": 8}}, "field `vision_config`"),
        ({"num_local_experts": 8}, "field `num_local_experts` is 8, which LlamaForCausalLM does not have; it is another model"),
        ({"residual_multiplier": 0.22}, "field `residual_multiplier` is 0.22"),
        ({"use_qk_norm": True}, "field `use_qk_norm` is True"),
        ({"layer_types": ["full_attention"]}, "field `layer_types` has 1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["sliding_attention"] * 4}, "LlamaForCausalLM has no windows"),
        (
            {"layer_types": ["full_attention"] * 4, "model_type": "mistral"},
            "transformers reads such a config as Ministral",
        ),
        ({"num_hidden_layers": 5000}, "field `num_hidden_layers` is 5000, more than 4096"),
        ({"vocab_size": 10**400}, "..., more than 2147483647"),
        (
            {"hidden_size": 2**30, "intermediate_size": 2**30},
            "`hidden_size` 1073741824, `intermediate_size` 1073741824, `vocab_size`",
        ),
        ({"rope_theta": 10**400}, "field `rope_theta` is inf, must be a positive number"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "`rope_scaling.rope_type` is missing, and transformers would ignore factor without it",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "field `rope_scaling.rope_type` is 'mrope'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 1.0, "alpha": 1000.0}}, "field `rope_scaling.alpha` is 1000.0"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3]}}, "`rope_scaling.mrope_section` is [2, 3], which"),
        ({"rope_scaling": {"rope_type": "linear"}}, "`rope_scaling.factor` is None, must be a number of at least 1 for linear"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "`rope_scaling.factor` is True"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "`rope_scaling.factor` is 0.5"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "`rope_scaling.high_freq_factor` is 1.0, must be more than low"),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": None},
            "field `original_max_position_embeddings` is null",
        ),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": "8k"},
            "field `original_max_position_embeddings` is '8k'",
        ),
        (
            {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "default"}},
            "field `rope_scaling` is {'rope_type': 'llama3'",
        ),
        ({"rope_scaling": LLAMA3, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, "`rope_parameters` say otherwise"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}},
            "`rope_scaling.long_factor` is None, must be a list of 8",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 7, "long_factor": [1] * 8}},
            "short_factor` has 7 numbers",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1] * 8, "long_factor": ["1"] * 8}},
            "`rope_scaling.long_factor`",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "truncate": "no"}},
            "`rope_scaling.truncate` is 'no', must be true or false",
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2},
            "`rope_scaling.rope_type` is dynamic, which divides by",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1}, "must be more than 1 for yarn"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}},
            "`partial_rotary_factor` is 0.5",
        ),
        ({"rope_parameters": {"rope_type": "proportional", "partial_rotary_factor": 1.5}}, "must be a number in 0..1"),
    ],
)
def test_refusals_name_file_field_and_value(tmp_path: Path, changes: dict, message: str):
    assert says(refusal(tmp_path, **changes), message)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"architectures": []},
        {"architectures": ["LlamaForCausalLM"]},
        {"architectures": ["LLaMAForCausalLM"]},  # as the first conversions of its weights wrote it
        {"architectures": ["LlamaModel"]},
        {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}},
        {"hidden_act": "swish"},
        {"num_experts": 0, "mm_vision_tower": None, "vision_config": {}},
        {"original_max_position_embeddings": 64},
        {"layer_types": ["full_attention"] * 4},
        {"max_window_layers": 2, "transformers_version": "4.0", "pretraining_tp": 1, "torch_dtype": "bfloat16"},
    ],
)
def test_what_changes_nothing(tmp_path: Path, changes: dict):
    plain = read(tmp_path)
    assert read(tmp_path, **changes) == plain


@pytest.mark.parametrize(
    ("model_type", "positions"), [("llama", 2048), ("mistral", 131072), ("qwen2", 32768), ("qwen3", 32768)]
)
def test_positions_where_absent_are_the_classes(tmp_path: Path, model_type: str, positions: int):
    assert read(tmp_path, model_type=model_type, max_position_embeddings=ABSENT).max_positions == positions
    transformers = pytest.importorskip("transformers")
    assert transformers.AutoConfig.for_model(model_type).max_position_embeddings == positions


def test_a_model_of_the_hubs_cache_has_its_repositorys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = tmp_path / "models--acme--tiny-1.5b"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    config_file(cache / "blobs").rename(cache / "blobs" / "c0ffee")
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    assert model_from_config(snapshot).name == "tiny-1.5b"
    assert model_from_config(snapshot / "config.json").name == "tiny-1.5b"
    monkeypatch.chdir(snapshot)
    assert model_from_config(Path()).name == "tiny-1.5b"
    assert model_from_config(Path("config.json")).name == "tiny-1.5b"
    link = tmp_path / "my-model"
    link.symlink_to(snapshot)
    assert model_from_config(link).name == "my-model"
    assert model_from_config(link / ".").name == "my-model"
    with pytest.raises(ValueError, match=f"name one of the folders in {cache / 'snapshots'}$"):
        model_from_config(cache)


def test_large_files_pipes_and_pointers_are_no_config(tmp_path: Path):
    file = tmp_path / "config.json"
    os.mkfifo(file)
    with pytest.raises(ValueError, match=r"config\.json: is not a file; name a directory"):
        model_from_config(file)
    file.unlink()
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 600\n")
    with pytest.raises(ValueError, match=r"config\.json: is a Git LFS pointer .* `git lfs pull`"):
        model_from_config(tmp_path)
    with file.open("wb") as opened:
        opened.truncate(1 << 40)  # a hole; reading it would take a terabyte
    with pytest.raises(ValueError, match="is larger than 16 MiB"):
        model_from_config(tmp_path)


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
