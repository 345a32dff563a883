from __future__ import annotations

import pytest

from builders import tiny_model
from slideplan.hf_config import config_of
from slideplan.model import ALIGN_ELEMENTS, UnitRole


def test_units_and_names():
    model = tiny_model()
    assert [model.unit_name(unit) for unit in range(6)] == ["embedding", "layer000", "layer001", "layer002", "layer003", "head"]
    assert (model.unit_prefix(0), model.unit_prefix(1), model.unit_prefix(5)) == ("", "model.layers.0.", "")
    for unit in (-1, 6):
        with pytest.raises(IndexError, match=r"of a model with 6 units"):
            model.role(unit)


@pytest.mark.parametrize("fields", [{}, {"hidden": 70, "head_dim": 18, "ffn": 33}, {"qk_norm": True, "attention_bias": "qkvo"}])
def test_flat_buffers_are_aligned_and_hold_every_parameter_once(fields: dict):
    model = tiny_model(**fields)
    for role in UnitRole:
        end = 0
        for parameter in model.parameters(role):
            assert parameter.offset % ALIGN_ELEMENTS == 0
            assert end <= parameter.offset < end + ALIGN_ELEMENTS
            end = parameter.offset + parameter.elements
        assert end <= model.flat_elements(role) < end + ALIGN_ELEMENTS
        assert model.unit_parameter_count(role) == sum(parameter.elements for parameter in model.parameters(role))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"layers": 0}, "layers is 0"), ({"kv_heads": 3}, "not a multiple of kv_heads"), ({"head_dim": 7}, "needs an even one")],
)
def test_impossible_shapes(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny_model(**fields)


@pytest.mark.parametrize(
    "fields", [{}, {"head_dim": 32}, {"architecture": "qwen3", "qk_norm": True}, {"heads": 8, "kv_heads": 8}]
)
def test_flops_equal_those_that_torch_counts(fields: dict):
    """Eager attention computes the whole square, causal attention (seq_len + 1) / 2 of its seq_len columns."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    counter_mode = pytest.importorskip("torch.utils.flop_counter").FlopCounterMode
    model, micro_batch, seq_len = tiny_model(layers=1, **fields), 3, 10
    config = transformers.AutoConfig.for_model(**config_of(model), attn_implementation="eager")
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(config)
        layer = network.model.layers[0]
        rotary = tuple(torch.empty(micro_batch, seq_len, model.head_dim) for _ in range(2))
        x = torch.empty(micro_batch, seq_len, model.hidden, requires_grad=True)
    tokens, aten = micro_batch * seq_len, torch.ops.aten

    def counted(step) -> tuple[int, int]:
        with counter_mode(display=False) as counter:
            step()
        counts = counter.get_flop_counts()["Global"]
        return counts.get(aten.mm, 0) + counts.get(aten.addmm, 0), counts.get(aten.bmm, 0)

    outputs = []
    linear, attention = counted(lambda: outputs.append(layer(x, position_embeddings=rotary)))
    assert linear == model.matmul_flops(UnitRole.LAYER, tokens)
    assert attention * (seq_len + 1) == model.attention_flops(tokens, seq_len) * 2 * seq_len
    output = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    linear, _ = counted(lambda: output.sum().backward())
    assert linear == 2 * model.matmul_flops(UnitRole.LAYER, tokens)

    linear, attention = counted(lambda: network.lm_head(x))
    assert (linear, attention) == (model.matmul_flops(UnitRole.HEAD, tokens), 0)
    assert model.matmul_flops(UnitRole.EMBEDDING, tokens) == 0


@pytest.mark.parametrize(
    ("vocabulary", "padding"), [(2**16, 0), (2**17, ALIGN_ELEMENTS), (3 * 2**17, ALIGN_ELEMENTS), (2**17 + 1, 0)]
)
def test_moments_of_an_element_never_lie_whole_colliding_distances_apart(vocabulary: int, padding: int):
    """Those of units such as Mistral's embeddings would, and the host's memory would serve them more slowly."""
    model = tiny_model(vocabulary=vocabulary, hidden=512, heads=8, kv_heads=4)
    elements = model.flat_elements(UnitRole.EMBEDDING)
    assert elements == vocabulary * 512 + padding
    assert 4 * elements % (256 << 20)
