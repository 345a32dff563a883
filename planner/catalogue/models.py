"""Published model shapes as data, and how a name or a directory becomes one."""

from __future__ import annotations

from pathlib import Path

from planner.catalogue.near import hint
from slideplan.command import path
from slideplan.hf_config import model_from_config
from slideplan.model import Architecture, ModelSpec, RopeValue


def _llama3_scaling(factor: float) -> dict[str, RopeValue]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def _qwen3(name: str, hidden: int, layers: int, heads: int, ffn: int, *, tied: bool) -> ModelSpec:
    return ModelSpec(
        name=name, architecture="qwen3", hidden=hidden, layers=layers, heads=heads, kv_heads=8, head_dim=128, ffn=ffn,
        vocabulary=151936, tied_embeddings=tied, qk_norm=True, rms_norm_eps=1e-6, rope_theta=1e6, max_positions=40960,
    )  # fmt: skip


def _qwen25(
    name: str, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, max_positions: int, eps: float = 1e-6
) -> ModelSpec:
    small = hidden <= 2048  # up to 3B: tied, and the vocabulary padded less
    return ModelSpec(
        name=name, architecture="qwen2", hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=hidden // heads, ffn=ffn, vocabulary=151936 if small else 152064, tied_embeddings=small,
        attention_bias="qkv", rms_norm_eps=eps, rope_theta=1e6, max_positions=max_positions,
    )  # fmt: skip


def _llama3(name: str, hidden: int, layers: int, heads: int, ffn: int, *, tied: bool) -> ModelSpec:
    return ModelSpec(
        name=name, architecture="llama", hidden=hidden, layers=layers, heads=heads, kv_heads=8, head_dim=hidden // heads,
        ffn=ffn, vocabulary=128256, tied_embeddings=tied, rms_norm_eps=1e-5, rope_theta=5e5,
        rope_scaling=_llama3_scaling(32.0 if tied else 8.0), max_positions=131072,
    )  # fmt: skip


def _mistral(name: str, hidden: int, layers: int, heads: int, ffn: int, max_positions: int) -> ModelSpec:
    return ModelSpec(
        name=name, architecture="mistral", hidden=hidden, layers=layers, heads=heads, kv_heads=8, head_dim=128, ffn=ffn,
        vocabulary=32768, tied_embeddings=False, rms_norm_eps=1e-5, rope_theta=1e6, max_positions=max_positions,
    )  # fmt: skip


def _tiny(name: str, architecture: Architecture, *, tied: bool = False) -> ModelSpec:
    return ModelSpec(
        name=name, architecture=architecture, hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=128,
        vocabulary=256, tied_embeddings=tied, attention_bias="qkv" if architecture == "qwen2" else "none",
        qk_norm=architecture == "qwen3", max_positions=512,
    )  # fmt: skip


_DEMO = ModelSpec(
    name="demo", architecture="llama", hidden=256, layers=8, heads=8, kv_heads=4, head_dim=32, ffn=768,
    vocabulary=256, tied_embeddings=False, max_positions=1024,
)  # fmt: skip

MODELS: dict[str, ModelSpec] = {
    model.name: model
    for model in (
        _tiny("tiny", "llama"),
        _tiny("tiny-mistral", "mistral"),
        _tiny("tiny-qwen2", "qwen2"),
        _tiny("tiny-qwen3", "qwen3", tied=True),
        _DEMO,
        #                       hidden layers heads    ffn
        _qwen3("qwen3-0.6b",      1024,    28,   16,  3072, tied=True),
        _qwen3("qwen3-1.7b",      2048,    28,   16,  6144, tied=True),
        _qwen3("qwen3-4b",        2560,    36,   32,  9728, tied=True),
        _qwen3("qwen3-8b",        4096,    36,   32, 12288, tied=False),
        _qwen3("qwen3-14b",       5120,    40,   40, 17408, tied=False),
        _qwen3("qwen3-32b",       5120,    64,   64, 25600, tied=False),
        #                       hidden layers heads kv    ffn  positions
        _qwen25("qwen2.5-0.5b",    896,    24,   14, 2,  4864,  32768),
        _qwen25("qwen2.5-1.5b",   1536,    28,   12, 2,  8960, 131072),
        _qwen25("qwen2.5-3b",     2048,    36,   16, 2, 11008,  32768),
        _qwen25("qwen2.5-7b",     3584,    28,   28, 4, 18944, 131072),
        _qwen25("qwen2.5-14b",    5120,    48,   40, 8, 13824, 131072, eps=1e-5),
        _qwen25("qwen2.5-32b",    5120,    64,   40, 8, 27648, 131072, eps=1e-5),
        _qwen25("qwen2.5-72b",    8192,    80,   64, 8, 29568, 131072, eps=1e-5),
        #                       hidden layers heads    ffn
        _llama3("llama-3.2-1b",   2048,    16,   32,  8192, tied=True),
        _llama3("llama-3.2-3b",   3072,    28,   24,  8192, tied=True),
        _llama3("llama-3.1-8b",   4096,    32,   32, 14336, tied=False),
        _llama3("llama-3.1-70b",  8192,    80,   64, 28672, tied=False),
        _llama3("llama-3.1-405b", 16384,  126,  128, 53248, tied=False),
        #                              hidden layers heads    ffn  positions
        _mistral("mistral-7b",           4096,    32,   32, 14336,  32768),
        _mistral("mistral-large-123b",  12288,    88,   96, 28672, 131072),
    )
}  # fmt: skip

ALIASES: dict[str, str] = {
    "70b": "llama-3.1-70b",
    "72b": "qwen2.5-72b",
    "123b": "mistral-large-123b",
    "405b": "llama-3.1-405b",
    "mistral-7b-v0.3": "mistral-7b",
    "mistral-large": "mistral-large-123b",
    "mistral-large-2407": "mistral-large-123b",
    "mistral-large-instruct-2407": "mistral-large-123b",
}


def find_model(name_or_path: str) -> ModelSpec:
    """A catalogue entry by name, alias or repository name (any case), or a directory with a `config.json`.

    A catalogue name wins over a directory of the same name; write `./NAME` for the directory.
    Raises ValueError with the nearest names for an unknown one.
    """
    known = _in_catalogue(name_or_path)
    if known is not None:
        return known
    folder = _existing(name_or_path)
    if folder is not None:
        return model_from_config(folder)
    owner, _, repository_name = name_or_path.rpartition("/")
    known = _in_catalogue(repository_name)
    if known is not None and owner and "/" not in owner and owner[0] not in ".~":  # an owner, not the start of a path
        return known
    raise ValueError(
        f"model {name_or_path!r} is neither in the catalogue nor a directory with a config.json; "
        f"{hint(repository_name, [*MODELS, *ALIASES])}`planner models` lists the catalogue"
    )


def _existing(text: str) -> Path | None:
    try:
        found = path(text)
        return found if found.exists() else None
    except OSError:  # a name too long for a file
        return None


def _in_catalogue(name: str) -> ModelSpec | None:
    key = name.casefold()
    return MODELS.get(ALIASES.get(key, key))
