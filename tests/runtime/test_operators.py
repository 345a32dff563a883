"""Operators of the fused kernels against float64: their torch form, and Triton's on the GPU or in its interpreter."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch

from builders import tiny_model
from runtime.compute import operators
from runtime.compute.eager import EagerLayer, rotary_positions, skeleton
from runtime.compute.fused_layer import FusedLayer
from runtime.compute.gradients import GradientSlot
from runtime.memory.buffers import parameter_views
from slideplan.model import ModelSpec, UnitRole

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
# Of bf16, relative; Triton's interpreter cuts off where a GPU rounds to nearest.
ROUNDING = 2.0**-8 if DEVICE == "cuda" else 3 * 2.0**-8


def triton_operators() -> SimpleNamespace:
    from runtime.kernels import cross_entropy, rms_norm, rope, square_sum, swiglu

    return SimpleNamespace(
        rms_norm=rms_norm.rms_norm,
        rms_norm_backward=rms_norm.rms_norm_backward,
        rotate=rope.rotate,
        swiglu=swiglu.swiglu,
        swiglu_backward=swiglu.swiglu_backward,
        cross_entropy_in_place=cross_entropy.cross_entropy_in_place,
        square_sum=square_sum.square_sum,
    )


@pytest.fixture(params=["torch", "triton"])
def ops(request):
    if request.param == "triton":
        pytest.importorskip("triton")
        return triton_operators()
    return operators


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).bfloat16().to(DEVICE)


def close(found: torch.Tensor, exact: torch.Tensor, bound: float = ROUNDING) -> bool:
    """Error in norm, and nothing wild anywhere."""
    error = (found.double() - exact).abs()
    return bool(error.norm() <= bound * exact.norm() and error.max() <= 4 * bound * exact.abs().max())


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 128), (37, 96), (5, 1000), (3, 4097)])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(ops, rows: int, width: int, residual: bool) -> None:
    torch.manual_seed(rows * width)
    x, weight, gradient = random(rows, width, scale=3), random(width), random(rows, width)
    added = random(rows, width) if residual else None
    y, scale = ops.rms_norm(x, weight, 1e-6)
    again, _ = ops.rms_norm(x, weight, 1e-6, scale)
    out = gradient.clone()
    of_weight = ops.rms_norm_backward(x, weight, scale, gradient, out, added)

    exact_x, exact_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    exact = torch.nn.functional.rms_norm(exact_x, (width,), exact_weight, 1e-6)
    exact.backward(gradient.double())
    assert torch.equal(y, again)
    assert close(y, exact.detach(), 1.5 * ROUNDING)
    assert close(out, exact_x.grad + (0 if added is None else added.double()))
    assert close(of_weight, exact_weight.grad, 1e-5)


@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(1, 5, 1, 16), (2, 7, 3, 64), (3, 4, 5, 96)])
def test_rotary_embedding_turns_pairs_and_back(ops, batch: int, length: int, heads: int, width: int) -> None:
    torch.manual_seed(0)
    angle = torch.rand(length, width // 2).double() * 6
    cos, sin = (torch.cat([f(angle)] * 2, 1).bfloat16().to(DEVICE) for f in (torch.cos, torch.sin))
    x = random(batch * length, heads, width)
    turned = x.clone()
    ops.rotate(turned, cos, sin)
    a, b = (half.view(batch, length, heads, -1) for half in x.double().chunk(2, 2))
    c, s = (table[None, :, None, : width // 2].double() for table in (cos, sin))
    exact = torch.cat([a * c - b * s, b * c + a * s], 3).view(x.shape)
    assert close(turned, exact)
    ops.rotate(turned, cos, sin, backward=True)
    assert close(
        turned,
        (x.view(batch, length, heads, -1).double() * (cos.double() ** 2 + sin.double() ** 2)[None, :, None]).view(x.shape),
        2 * ROUNDING,
    )


@pytest.mark.parametrize("elements", [1, 77, 1024, 3001])
def test_gated_silu(ops, elements: int) -> None:
    torch.manual_seed(elements)
    gate, up, gradient = (random(elements, scale=2) for _ in range(3))
    exact_gate, exact_up = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = torch.nn.functional.silu(exact_gate) * exact_up
    exact.backward(gradient.double())
    out = torch.empty_like(gate)
    ops.swiglu(gate, up, out)
    of_gate, of_up, product = gate.clone(), up.clone(), gradient.clone()
    ops.swiglu_backward(of_gate, of_up, product)
    assert torch.equal(product, out)
    assert close(out, exact.detach(), 2 * ROUNDING)
    assert close(of_gate, exact_gate.grad)
    assert close(of_up, exact_up.grad, 2 * ROUNDING)


@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (5, 1000), (3, 8193), (2, 20000)])
def test_cross_entropy_leaves_its_gradient(ops, rows: int, classes: int) -> None:
    torch.manual_seed(classes)
    logits, labels = random(rows, classes, scale=4), torch.randint(0, classes, (rows,)).to(DEVICE)
    exact_logits = logits.double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(exact_logits, labels, reduction="none") * 0.125
    exact.sum().backward()
    losses = ops.cross_entropy_in_place(logits, labels, 0.125)
    assert torch.allclose(losses.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    assert close(logits, exact_logits.grad)


MODELS = {
    "llama": tiny_model(),
    "qwen2": tiny_model(architecture="qwen2", attention_bias="qkv"),
    "qwen3": tiny_model(architecture="qwen3", qk_norm=True, head_dim=32),
    "attention bias": tiny_model(attention_bias="qkvo"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fused_layer_is_as_exact_as_autograd(name: str, keep: bool, dtype: torch.dtype) -> None:
    """Errors of output and all gradients against float64, held against those of the Hugging Face module in bf16."""
    torch.manual_seed(0)
    model, device = MODELS[name], torch.device(DEVICE)
    layout, elements = model.parameters(UnitRole.LAYER), model.flat_elements(UnitRole.LAYER)
    flat = torch.zeros(elements, dtype=torch.bfloat16, device=device).normal_(0, 0.05)
    for parameter in layout:
        if "norm" in parameter.name:
            flat[parameter.offset : parameter.offset + parameter.elements] += 1
    parts = skeleton(model)
    positions = rotary_positions(parts, 24, model.hidden, device)
    x, gradient = random(2, 24, model.hidden), random(2, 24, model.hidden)
    exact = exact_gradients(model, parts.layer, flat, positions, x, gradient)

    def errors(layer) -> dict[str, float]:
        left, g = torch.empty_like(x), gradient.clone()
        slot = torch.full((elements,), float("nan"), dtype=dtype, device=device)
        with torch.no_grad():
            if keep:
                kept = layer.forward_keep(x, left)
                layer.backward(kept, x, g, GradientSlot(slot, accumulate=False))
            else:
                layer.forward(x, left)
                layer.backward_recompute(x, g, GradientSlot(slot, accumulate=False))
        found = {"output": left, "input gradient": g} | parameter_views(slot, layout)
        assert not slot.isnan().any(), "padding included"
        return {key: ((value.double() - exact[key]).norm() / exact[key].norm()).item() for key, value in found.items()}

    fused = errors(FusedLayer(model, flat, positions[0][0], positions[1][0]))
    eager = errors(EagerLayer(parts.layer, flat, layout, positions))
    for key, error in fused.items():
        assert error < max(1.3 * eager[key], ROUNDING), key


def exact_gradients(model: ModelSpec, layer, flat, positions, x, gradient) -> dict[str, torch.Tensor]:
    module = copy.deepcopy(layer).to_empty(device=flat.device).double()
    for name, parameter in module.named_parameters():
        parameter.data.copy_(parameter_views(flat, model.parameters(UnitRole.LAYER))[name])
    entered = x.double().requires_grad_()
    left = module(entered, attention_mask=None, position_embeddings=tuple(each.double() for each in positions))
    left = left if isinstance(left, torch.Tensor) else left[0]
    left.backward(gradient.double())
    found = {"output": left.detach(), "input gradient": entered.grad}
    return found | {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_fused_layer_adds_to_the_sum_of_earlier_micro_batches(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, device = MODELS["qwen2"], torch.device(DEVICE)
    elements = model.flat_elements(UnitRole.LAYER)
    flat = torch.zeros(elements, dtype=torch.bfloat16, device=device).normal_(0, 0.05)
    positions = rotary_positions(skeleton(model), 24, model.hidden, device)
    layer = FusedLayer(model, flat, positions[0][0], positions[1][0])
    slots = [torch.zeros(elements, dtype=dtype, device=device) for _ in range(3)]
    batches = [(random(1, 24, model.hidden), random(1, 24, model.hidden)) for _ in range(2)]
    with torch.no_grad():
        for number, (x, gradient) in enumerate(batches):
            layer.backward_recompute(x, gradient.clone(), GradientSlot(slots[number], accumulate=False))
            layer.backward_recompute(x, gradient.clone(), GradientSlot(slots[2], accumulate=number > 0))
    total = slots[0].double() + slots[1].double()
    assert close(slots[2], total, 1e-5 if dtype is torch.float32 else 1.5 * ROUNDING)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 77, 4096, 12_289, 70_001])
def test_square_sum(ops, elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With few programs, so that each adds up several blocks; what the sum is written into is one of many."""
    if ops is not operators:
        monkeypatch.setattr("runtime.kernels.square_sum.MOST_PROGRAMS", 3)
    torch.manual_seed(elements)
    values = (torch.randn(elements) * 1e-3).to(dtype).to(DEVICE)
    sums = torch.full((3,), -1.0, device=DEVICE)
    ops.square_sum(values, sums[1])
    assert sums[1].item() == pytest.approx(values.double().square().sum().item(), rel=1e-5)
    assert sums[[0, 2]].tolist() == [-1, -1]
    values[elements // 2] = torch.nan
    ops.square_sum(values, sums[1])
    assert sums[1].isnan().item()
