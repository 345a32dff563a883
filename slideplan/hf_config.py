"""Hugging Face `config.json` to model spec and back. Pure JSON, so that planning needs no transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from slideplan.hf_fields import Fields, read_json_object, shown
from slideplan.hf_rope import rotary
from slideplan.model import Architecture, ModelSpec

# Where a config leaves a field out, its class in transformers decides; these are the classes' values.
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_WINDOW = 4096
_DEFAULT_QWEN_FULL_LAYERS = 28  # `max_window_layers`: the layers before it attend to everything
_DEFAULT_QWEN3_HEAD_DIM = 128
_DEFAULT_POSITIONS: dict[Architecture, int] = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
# Published models have 126 layers at most and 10^13 parameters at most; a plan grows with the layers.
_MAX_LAYERS = 4096
_MAX_PARAMETERS = 10**14
_CAUSAL_LM: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Fields with which a model is another one than its `model_type` says; the class of that type would not read them.
_OTHER_MODELS = (
    "text_config", "vision_config", "audio_config", "block_configs", "per_layer_config",
    "num_experts", "num_local_experts", "n_routed_experts", "is_encoder_decoder", "add_cross_attention",
    "final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier",
    "residual_multiplier", "attention_multiplier", "scale_emb", "scale_depth", "dim_model_base",
)  # fmt: skip
_OWN_NORMS = ("qk_norm", "use_qk_norm", "qk_layernorm")
# What `auto_map` may name without touching the model.
_PREPARATION = ("AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor", "AutoImageProcessor", "AutoVideoProcessor")


def model_from_config(path: Path) -> ModelSpec:
    """Read a directory with a `config.json`, or the file itself; the model is named after the directory.

    A snapshot in the hub's cache is named after its repository. Understands llama, mistral, qwen2 and qwen3 in the old
    layout (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`). Raises ValueError naming file, field,
    value and remedy.
    """
    file = path / "config.json" if path.is_dir() else path
    config = Fields(file, read_json_object(file, _remedy(path)))
    architecture = _architecture(config)
    _refuse_unsupported(config, architecture)
    heads = config.integer("num_attention_heads")
    head_dim = _head_dim(config, architecture, heads)
    max_positions = config.integer("max_position_embeddings", _DEFAULT_POSITIONS[architecture])
    rope_theta, rope_scaling = rotary(config, head_dim, max_positions)
    # Where it is absent, only Llama's class takes one key head per query head, and where it is null, Qwen's too.
    null = "num_key_value_heads" in config.values and architecture != "mistral"
    fallback = heads if architecture == "llama" or null else None
    try:
        model = ModelSpec(
            name=_name(file),
            architecture=architecture,
            hidden=config.integer("hidden_size"),
            layers=config.integer("num_hidden_layers", most=_MAX_LAYERS),
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", fallback),
            head_dim=head_dim,
            ffn=config.integer("intermediate_size"),
            vocabulary=config.integer("vocab_size"),
            tied_embeddings=config.boolean("tie_word_embeddings"),
            attention_bias=_attention_bias(config, architecture),
            qk_norm=architecture == "qwen3",
            rms_norm_eps=config.number("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=max_positions,
            sliding_window=_sliding_window(config, architecture),
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: {text}") from None
    if model.parameter_count > _MAX_PARAMETERS:
        raise ValueError(
            f"{file}: `hidden_size` {model.hidden}, `intermediate_size` {model.ffn}, `vocab_size` {model.vocabulary} and "
            f"`num_hidden_layers` {model.layers} make {model.parameter_count:.1e} parameters; correct them"
        )
    return model


def config_of(model: ModelSpec) -> dict[str, Any]:
    """Keyword arguments of the Hugging Face config of this model; as JSON, its `config.json`.

    Raises ValueError for a spec that its architecture's class in transformers cannot express.
    """
    expressible = {
        "llama": (("none", "qkvo"), False),
        "mistral": (("none",), False),
        "qwen2": (("qkv",), False),
        "qwen3": (("none", "qkvo"), True),
    }
    biases, qk_norm = expressible[model.architecture]
    if model.attention_bias not in biases or model.qk_norm != qk_norm:
        raise ValueError(
            f"model {model.name}: {model.architecture} has attention_bias {' or '.join(biases)} and qk_norm {qk_norm}, "
            f"not {model.attention_bias} and {model.qk_norm}; choose another architecture"
        )
    config: dict[str, Any] = {
        "model_type": model.architecture,
        "architectures": [_CAUSAL_LM[model.architecture]],
        "hidden_size": model.hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocabulary,
        "tie_word_embeddings": model.tied_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", **(model.rope_scaling or {}), "rope_theta": model.rope_theta},
        "max_position_embeddings": model.max_positions,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
    if model.architecture in ("llama", "qwen3"):
        config["attention_bias"] = model.attention_bias == "qkvo"
    if model.architecture == "mistral":
        config["sliding_window"] = model.sliding_window
    if model.architecture in ("qwen2", "qwen3"):
        config["use_sliding_window"] = model.sliding_window is not None
        config["sliding_window"] = model.sliding_window
        config["max_window_layers"] = 0 if model.sliding_window is not None else model.layers
    return config


def _name(file: Path) -> str:
    """What the model is called: its folder as the user names it, before links are followed."""
    # Not `resolve`, which would lead from a snapshot of the hub's cache to its blobs.
    folder = Path(os.path.abspath(file)).parent  # noqa: PTH100
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return folder.name or "model"


def _remedy(path: Path) -> str:
    snapshots = path / "snapshots"
    if snapshots.is_dir():
        return f"name one of the folders in {snapshots}"
    return "name a directory with a Hugging Face config.json"


def _architecture(config: Fields) -> Architecture:
    given = config.values.get("model_type")
    for architecture in _CAUSAL_LM:
        if given == architecture:
            return architecture
    raise config.error("model_type", f"is {shown(given)}; supported are {', '.join(_CAUSAL_LM)}")


def _refuse_unsupported(config: Fields, architecture: Architecture) -> None:
    """Raise ValueError where the model is another one, or is trained another way, than the architecture's plain one."""
    _refuse_other_classes(config, architecture)
    values = config.values
    for field, value in values.items():
        other = field in _OTHER_MODELS or field.startswith("mm_") or (field in _OWN_NORMS and architecture != "qwen3")
        if other and value:  # what is null, false, zero or empty is not there
            raise config.error(field, f"is {shown(value)}, which {_CAUSAL_LM[architecture]} does not have; it is another model")
    if values.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.error("hidden_act", f"is {shown(values['hidden_act'])}; only 'silu' is supported")
    if config.boolean("mlp_bias"):
        raise config.error("mlp_bias", "is true; feed-forward biases are not supported")
    if values.get("attention_dropout") not in (None, 0, 0.0):
        raise config.error(
            "attention_dropout", f"is {shown(values['attention_dropout'])}; dropout is not supported, set it to 0"
        )
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is set; training needs the weights before quantization")


def _refuse_other_classes(config: Fields, architecture: Architecture) -> None:
    """Hold `architectures` and `auto_map` against the class whose training is known."""
    causal = _CAUSAL_LM[architecture]
    # A base model has the same layers; whether its head is there, the checkpoint tells.
    plain = (causal.casefold(), causal.replace("ForCausalLM", "Model").casefold())
    named = config.values.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(each, str) and each.casefold() in plain for each in named):
        raise config.error("architectures", f"is {shown(named)}; for model_type {architecture} only {causal} is supported")
    code = config.values.get("auto_map") or {}
    own = [f"{key}: {code[key]}" for key in code if key not in _PREPARATION] if isinstance(code, dict) else [code]
    if own:
        raise config.error(
            "auto_map",
            f"names code of the model's own ({shown(own[0])}), which is not run here; remove the field if {causal} of "
            "transformers is the same model",
        )


def _head_dim(config: Fields, architecture: Architecture, heads: int) -> int:
    hidden = config.integer("hidden_size")
    if architecture == "llama" and hidden % heads:  # its class refuses that whatever head_dim says
        raise config.error("hidden_size", f"is {hidden}, must be a multiple of num_attention_heads {heads}; correct it")
    if config.has("head_dim"):
        return config.integer("head_dim")
    if "head_dim" in config.values and architecture in ("qwen2", "qwen3"):
        raise config.error(
            "head_dim", f"is null, which transformers cannot read for {architecture}; remove it or give the number"
        )
    if architecture == "qwen3":
        return _DEFAULT_QWEN3_HEAD_DIM
    if hidden % heads:
        raise config.error("head_dim", f"is missing and hidden_size {hidden} is no multiple of {heads} heads; add head_dim")
    return hidden // heads


def _attention_bias(config: Fields, architecture: Architecture) -> Literal["none", "qkv", "qkvo"]:
    if architecture == "qwen2":
        return "qkv"
    if not config.boolean("attention_bias"):
        return "none"
    if architecture == "mistral":
        # Its class in transformers ignores the field: the biases would silently stay untrained.
        raise config.error("attention_bias", "is true; Mistral layers have no biases, use model_type llama")
    return "qkvo"


def _sliding_window(config: Fields, architecture: Architecture) -> int | None:
    """Attention window in tokens, None where every layer attends to everything."""
    kinds = _layer_types(config)
    if architecture == "llama":
        if "sliding_attention" in kinds:
            raise config.error("layer_types", "has sliding_attention; LlamaForCausalLM has no windows, use model_type mistral")
        return None
    present = "sliding_window" in config.values
    window = config.integer("sliding_window", _DEFAULT_WINDOW) if config.has("sliding_window") or not present else None
    if architecture == "mistral":
        if kinds:
            raise config.error("layer_types", "is set; transformers reads such a config as Ministral, which is not supported")
        return window
    if not config.boolean("use_sliding_window") or window is None:
        return None
    if kinds:
        return window if "sliding_attention" in kinds else None
    # Zero is a legal value here: every layer slides.
    first = config.values.get("max_window_layers", _DEFAULT_QWEN_FULL_LAYERS)
    if type(first) is not int:
        raise config.error("max_window_layers", f"is {shown(first)}, must be a whole number; correct it")
    return window if first < config.integer("num_hidden_layers") else None


def _layer_types(config: Fields) -> list[str]:
    """Kind of attention by layer; empty where the config leaves it to the class."""
    kinds = config.values.get("layer_types")
    if kinds is None:
        return []
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise config.error("layer_types", f"is {shown(kinds)}; supported are lists of full_attention and sliding_attention")
    layers = config.integer("num_hidden_layers", most=_MAX_LAYERS)
    if len(kinds) != layers:
        raise config.error("layer_types", f"has {len(kinds)} entries, num_hidden_layers is {layers}; correct one of them")
    return kinds
