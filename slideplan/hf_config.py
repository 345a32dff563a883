"""Hugging Face `config.json` to model spec and back. Pure JSON, so that planning needs no transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from slideplan.model import Architecture, ModelSpec, RopeValue

# Where a config leaves a field out, its class in transformers decides; these are the classes' values.
_DEFAULT_ROPE_THETA = 10000.0
_DEFAULT_RMS_NORM_EPS = 1e-6
_DEFAULT_MISTRAL_WINDOW = 4096
_DEFAULT_QWEN_FULL_LAYERS = 28  # `max_window_layers`: the layers before it attend to everything
_DEFAULT_QWEN3_HEAD_DIM = 128
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
_CAUSAL_LM: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _Fields:
    """Typed access to a config's fields; null counts as absent, as it does in transformers."""

    def __init__(self, where: Path, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def error(self, field: str, problem: str) -> ValueError:
        return ValueError(f"{self.where}: field `{field}` {problem}")

    def has(self, field: str) -> bool:
        return self.values.get(field) is not None

    def _read(self, field: str, kind: str, types: tuple[type, ...], default: Any) -> Any:
        if not self.has(field):
            if default is None:
                raise self.error(field, f"is missing; add it ({kind})")
            return default
        value = self.values[field]
        # bool is a subclass of int: "true" heads are a mistake, not one head.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.error(field, f"is {value!r}, must be {kind}; correct it")
        return value

    def integer(self, field: str, default: int | None = None) -> int:
        value: int = self._read(field, "a positive whole number", (int,), default)
        if value < 1:
            raise self.error(field, f"is {value}, must be a positive whole number; correct it")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        value = float(self._read(field, "a positive number", (int, float), default))
        if not 0 < value < float("inf"):
            raise self.error(field, f"is {value}, must be a positive number; correct it")
        return value

    def boolean(self, field: str) -> bool:
        value: bool = self._read(field, "true or false", (bool,), False)
        return value


def model_from_config(path: Path) -> ModelSpec:
    """Read a directory with a `config.json`, or the file itself; the model is named after the directory.

    Understands llama, mistral, qwen2 and qwen3 in the old layout (`rope_theta`, `rope_scaling`) and
    the new one (`rope_parameters`). Raises ValueError naming file, field, value and remedy.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _Fields(file, _read_object(file))
    architecture = _architecture(config)
    _refuse_unsupported(config)
    heads = config.integer("num_attention_heads")
    rope_theta, rope_scaling = _rope(config)
    # Only Llama's class falls back to one key head per query head; the others have fixed numbers.
    fallback = heads if architecture == "llama" or "num_key_value_heads" in config.values else None
    try:
        return ModelSpec(
            name=file.resolve().parent.name,
            architecture=architecture,
            hidden=config.integer("hidden_size"),
            layers=config.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=config.integer("num_key_value_heads", fallback),
            head_dim=_head_dim(config, architecture, heads),
            ffn=config.integer("intermediate_size"),
            vocabulary=config.integer("vocab_size"),
            tied_embeddings=config.boolean("tie_word_embeddings"),
            attention_bias=_attention_bias(config, architecture),
            qk_norm=architecture == "qwen3",
            rms_norm_eps=config.number("rms_norm_eps", _DEFAULT_RMS_NORM_EPS),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_positions=config.integer("max_position_embeddings"),
            sliding_window=_sliding_window(config, architecture),
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: {text}") from None


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


def _read_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{file}: cannot be read: {error.strerror}; name a directory with a Hugging Face config.json"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON: {error}; fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a JSON {type(value).__name__}, must be an object; fetch the file again")
    return value


def _architecture(config: _Fields) -> Architecture:
    given = config.values.get("model_type")
    for architecture in _CAUSAL_LM:
        if given == architecture:
            return architecture
    raise config.error("model_type", f"is {given!r}; supported are {', '.join(_CAUSAL_LM)}")


def _refuse_unsupported(config: _Fields) -> None:
    if config.values.get("hidden_act", "silu") != "silu":
        raise config.error("hidden_act", f"is {config.values['hidden_act']!r}; only 'silu' is supported")
    if config.boolean("mlp_bias"):
        raise config.error("mlp_bias", "is true; feed-forward biases are not supported")
    if config.values.get("attention_dropout") not in (None, 0, 0.0):
        raise config.error(
            "attention_dropout", f"is {config.values['attention_dropout']!r}; dropout is not supported, set it to 0"
        )
    if config.has("quantization_config"):
        raise config.error("quantization_config", "is set; training needs the weights before quantization")


def _head_dim(config: _Fields, architecture: Architecture, heads: int) -> int:
    if config.has("head_dim"):
        return config.integer("head_dim")
    if architecture == "qwen3":
        return _DEFAULT_QWEN3_HEAD_DIM
    hidden = config.integer("hidden_size")
    if hidden % heads:
        raise config.error("head_dim", f"is missing and hidden_size {hidden} is no multiple of {heads} heads; add head_dim")
    return hidden // heads


def _attention_bias(config: _Fields, architecture: Architecture) -> Literal["none", "qkv", "qkvo"]:
    if architecture == "qwen2":
        return "qkv"
    if not config.boolean("attention_bias"):
        return "none"
    if architecture == "mistral":
        # Its class in transformers ignores the field: the biases would silently stay untrained.
        raise config.error("attention_bias", "is true; Mistral layers have no biases, use model_type llama")
    return "qkvo"


def _rope(config: _Fields) -> tuple[float, dict[str, RopeValue] | None]:
    """Base frequency and, if frequencies are scaled, how: with `rope_type`, without `rope_theta`."""
    field = "rope_scaling" if config.has("rope_scaling") else "rope_parameters"
    given = config.values.get(field) or {}
    if not isinstance(given, dict):
        raise config.error(field, f"is {given!r}, must be an object; correct it")
    values = dict(given)
    for key, value in values.items():
        numbers = isinstance(value, list) and all(isinstance(v, int | float) for v in value)
        if not (numbers or value is None or isinstance(value, str | int | float)):
            raise config.error(f"{field}.{key}", f"is {value!r}; rotary parameters per layer type are not supported")
    rotated = values.get("partial_rotary_factor", config.values.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise config.error("partial_rotary_factor", f"is {rotated!r}; partial rotary embedding is not supported")
    values.pop("partial_rotary_factor", None)
    inner = _Fields(config.where, {f"{field}.rope_theta": values.pop("rope_theta", None)})
    theta = inner.number(f"{field}.rope_theta", config.number("rope_theta", _DEFAULT_ROPE_THETA))
    old_name = values.pop("type", "default")
    kind = values.setdefault("rope_type", old_name)
    if kind not in _ROPE_TYPES:
        raise config.error(f"{field}.rope_type", f"is {kind!r}; supported are {', '.join(_ROPE_TYPES)}")
    if kind == "default":
        return theta, None
    factor = values.get("factor")
    if kind != "longrope" and (isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor < 1e6):
        raise config.error(f"{field}.factor", f"is {factor!r}, must be a number of at least 1 for {kind}; correct it")
    for key in _LLAMA3_KEYS if kind == "llama3" else ():
        if isinstance(values.get(key), bool) or not isinstance(values.get(key), int | float):
            raise config.error(f"{field}.{key}", f"is {values.get(key)!r}, must be a number for llama3; correct it")
    # Lists of whole numbers would be read back as fractions, and the plan's digest would change.
    return theta, {key: [float(v) for v in value] if isinstance(value, list) else value for key, value in values.items()}


def _sliding_window(config: _Fields, architecture: Architecture) -> int | None:
    """Attention window in tokens, None where every layer attends to everything."""
    if architecture == "llama":
        return None
    if architecture == "mistral":
        window = config.values.get("sliding_window", _DEFAULT_MISTRAL_WINDOW)
        return None if window is None else config.integer("sliding_window", _DEFAULT_MISTRAL_WINDOW)
    if not config.boolean("use_sliding_window") or not config.has("sliding_window"):
        return None
    kinds = config.values.get("layer_types")
    if kinds is None:
        # Zero is a legal value here: every layer slides.
        first = config.values.get("max_window_layers", _DEFAULT_QWEN_FULL_LAYERS)
        if type(first) is not int:
            raise config.error("max_window_layers", f"is {first!r}, must be a whole number; correct it")
        sliding = first < config.integer("num_hidden_layers")
    elif isinstance(kinds, list) and set(kinds) <= {"full_attention", "sliding_attention"}:
        sliding = "sliding_attention" in kinds
    else:
        raise config.error("layer_types", f"is {kinds!r}; supported are lists of full_attention and sliding_attention")
    return config.integer("sliding_window") if sliding else None
