"""Any config.json gives a model or one line that names the file: never another exception, never gigabytes."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from fuzzing import readings
from public_configs import PUBLIC
from slideplan.hf_config import config_of, model_from_config
from slideplan.model import ModelSpec, UnitRole

FIELDS = sorted(
    {field for public in PUBLIC for field in public.config} | {"rope_parameters", "layer_types", "auto_map", "mm_x"}
)
NUMBERS = st.one_of(
    st.integers(), st.integers(1, 64), st.floats(), st.sampled_from([0, -1, 2**31, 2**63, 10**300, 10**400, 1e308, 5e-324])
)
WORDS = st.sampled_from(["linear", "yarn", "longrope", "llama3", "dynamic", "silu"])
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8), WORDS)
ROPE_KEYS = st.sampled_from(
    ["type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor",
     "short_factor", "long_factor", "attention_factor", "truncate", "partial_rotary_factor", "full_attention"]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=8), st.dictionaries(st.text(max_size=8), inner, max_size=4), st.dictionaries(ROPE_KEYS, inner)
    ),
    max_leaves=12,
)


def read(content: bytes) -> ModelSpec | None:
    """The model of a config.json, None where it is refused as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_bytes(content)
        try:
            model = model_from_config(file)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{file}: ")
            assert "\n" not in message
            assert len(message) < 1000
            return None
        # What was read is one thing with what is written: nothing is left that a second reading would see otherwise.
        file.write_text(json.dumps(config_of(model)))
        assert model_from_config(file) == model
        return model


@readings(150)
@given(st.sampled_from(PUBLIC), st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=4))
@example(PUBLIC[2], {"hidden_size": 10**400})
@example(PUBLIC[2], {"rope_theta": 10**400})
@example(PUBLIC[2], {"num_hidden_layers": 2**31 - 1})
@example(PUBLIC[2], {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1})
@example(PUBLIC[2], {"rope_scaling": {"rope_type": "longrope", "short_factor": [10**400] * 64, "long_factor": [1] * 64}})
def test_changed_fields(public: Any, changes: dict[str, Any]) -> None:
    model = read(json.dumps(public.config | changes).encode())
    if model is not None:
        assert 0 < model.parameter_count <= 10**14
        assert model.unit_parameter_count(UnitRole.LAYER) > 0


@readings(100)
@given(st.one_of(st.binary(max_size=64), VALUES.map(lambda value: json.dumps(value).encode())))
@example(b"")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}")
@example(b'\xef\xbb\xbf{"model_type": "llama"}')
@example(b'{"model_type": "\\ud800"}')
@example(b" " * (17 << 20))
def test_any_content(content: bytes) -> None:
    assert read(content) is None
