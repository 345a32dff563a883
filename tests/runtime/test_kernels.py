"""Triton kernels against float64 and against the host, on the GPU or in Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

from running import elementary_adamw
from runtime.handlers import compile_gpu_update, gpu_update
from runtime.optimizer.adamw import (
    ALONE_ELEMENTS,
    CHUNK_ELEMENTS,
    CHUNKS_PER_THREAD,
    LEAST_CHUNK_ELEMENTS,
    AdamW,
    HostUpdate,
    Rehearsal,
)
from runtime.optimizer.moments8 import decode, encode, noise, update_8bit
from runtime.optimizer.split_master import join, split
from slideplan.lowering.sizes import moment_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

SETTINGS = AdamW(lr=3e-3, weight_decay=0.1)


def halves(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Its bf16 weights and remainders."""
    high, remainder = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split(master, high, remainder)
    return high, remainder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 63, 1024, 3001])
def test_gpu_update_equals_the_hosts_bit_for_bit(elements: int, dtype: torch.dtype) -> None:
    from runtime.kernels.adamw import update_gpu

    torch.manual_seed(elements)
    weights, remainder = halves(torch.randn(elements))
    host = [weights, remainder, torch.zeros(2, elements)]
    device = [tensor.clone().to(DEVICE) for tensor in host]
    for step in range(3):
        gradient = (torch.randn(elements) * 10.0 ** (step - 2)).to(dtype)
        HostUpdate(2)(*host, gradient, SETTINGS, step)
        update_gpu(*device, gradient.to(DEVICE), SETTINGS, step)
        for left, right in zip(host, device, strict=True):
            assert torch.equal(left, right.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "elements", [5001, ALONE_ELEMENTS + 1, 8 * LEAST_CHUNK_ELEMENTS * CHUNKS_PER_THREAD + 1, 8 * CHUNK_ELEMENTS + 7]
)
def test_host_update_is_elementary_fp32_adamw(elements: int, dtype: torch.dtype) -> None:
    """However it is cut into chunks: every element once."""
    generator = np.random.default_rng(0)
    p = generator.standard_normal(elements).astype(np.float32)
    m, v = np.zeros_like(p), np.zeros_like(p)
    weights, remainder = halves(torch.from_numpy(p))
    moments = torch.zeros(2, elements)
    for step in range(5):
        gradient = torch.from_numpy(generator.standard_normal(elements).astype(np.float32)).to(dtype)
        HostUpdate(2)(weights, remainder, moments, gradient, SETTINGS, step)
        p, m, v = elementary_adamw(p, m, v, gradient.float().numpy(), SETTINGS, step)
        assert np.array_equal(join(weights, remainder).numpy(), p)
        assert np.array_equal(moments.numpy(), np.stack([m, v]))


def test_an_update_leaves_torch_its_threads() -> None:
    """Compute that is timed after it on the same thread would have other cores than in a run."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        HostUpdate(2).compile()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_rehearsal_changes_no_bit(dtype: torch.dtype) -> None:
    """Of state in the middle of training, tiny and huge values and infinite weights included."""
    torch.manual_seed(3)
    elements = ALONE_ELEMENTS + 3
    weights, remainder = halves(torch.randn(elements) * 10.0 ** torch.randint(-38, 38, (elements,)))
    weights[:2] = torch.tensor([torch.inf, -torch.inf])
    remainder[:2] = 0
    moments = torch.stack([torch.randn(elements), torch.rand(elements)]) * 10.0 ** torch.randint(-37, 30, (2, elements))
    gradient = (torch.randn(elements) * 10.0 ** torch.randint(-38, 18, (elements,))).to(dtype)
    before = [tensor.clone() for tensor in (weights, remainder, moments)]
    HostUpdate(2)(weights, remainder, moments, gradient, Rehearsal(), 0)
    for now, was, bits in zip((weights, remainder, moments), before, (torch.int16, torch.int16, torch.int32), strict=True):
        assert torch.equal(now.view(bits), was.view(bits))


def test_host_update_against_float64_and_torch() -> None:
    """Each fp32 step rounds about ten times: 20 half-ulps of the weight and of the step bound the error of one step."""
    torch.manual_seed(1)
    start = torch.randn(4000)
    weights, remainder = halves(start)
    moments = torch.zeros(2, 4000)
    arguments = {"lr": SETTINGS.lr, "weight_decay": SETTINGS.weight_decay, "foreach": False}
    exact = torch.nn.Parameter(start.double())
    single = torch.nn.Parameter(start.clone())
    optimizers = [torch.optim.AdamW([exact], **arguments), torch.optim.AdamW([single], **arguments)]
    steps = 5
    for step in range(steps):
        gradient = torch.randn(4000)
        HostUpdate(2)(weights, remainder, moments, gradient, SETTINGS, step)
        exact.grad, single.grad = gradient.double(), gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    ours = join(weights, remainder)
    # Weights stay below 8 in size, steps below 2 lr: 2^-24 relative each.
    bound = steps * 20 * (8 + 2 * SETTINGS.lr) * 2.0**-24
    assert (ours.double() - exact.detach()).abs().max() < bound
    assert (ours - single.detach()).abs().max() < bound


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -1.0, 3.4e38, -1e-40, 2.0**-126, float("inf"), -float("inf")])
def test_split_of_special_values(value: float) -> None:
    master = torch.tensor([value])
    high, remainder = halves(master)
    assert torch.equal(join(high, remainder).view(torch.int32), master.view(torch.int32))


def test_split_is_exact_and_rounds_to_nearest() -> None:
    torch.manual_seed(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[torch.isfinite(master)]
    high, remainder = halves(master)
    assert torch.equal(join(high, remainder).view(torch.int32), master.view(torch.int32))
    ties = master.view(torch.int32) & 0xFFFF == 0x8000
    assert torch.equal(high[~ties].view(torch.int16), master.bfloat16()[~ties].view(torch.int16))


def test_settings_are_checked() -> None:
    for wrong in ({"lr": -1.0}, {"lr": float("nan")}, {"beta1": 1.0}, {"beta2": -0.1}, {"eps": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            AdamW(**wrong)


@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, 0x7F800001 | 0x00010000, -1, -0x00400000])
def test_nan_stays_nan_in_the_weight_that_computes(pattern: int) -> None:
    """0x7FFFFFFF is the NaN that GPUs produce; rounded like a number it would become -0.0."""
    from runtime.kernels.adamw import update_gpu

    nan = torch.tensor([pattern], dtype=torch.int64).to(torch.int32).view(torch.float32)
    high, remainder = halves(nan)
    assert high.isnan().all()
    assert join(high, remainder).isnan().all()
    for update, device in ((HostUpdate(1), "cpu"), (update_gpu, DEVICE)):
        weights, low = halves(torch.ones(64))
        state = [weights.to(device), low.to(device), torch.zeros(2, 64, device=device)]
        update(*state, nan.expand(64).contiguous().to(device), SETTINGS, 0)
        assert state[0].isnan().all()


def moments_8bit(elements: int) -> torch.Tensor:
    return torch.zeros(moment_bytes(elements, "8bit"), dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [2, 64, 130, 256, 1024, 3010])
def test_gpu_update_of_8_bits_equals_torchs_bit_for_bit(elements: int, dtype: torch.dtype) -> None:
    from runtime.kernels.adamw8 import update_gpu_8bit

    torch.manual_seed(elements)
    weights, remainder = halves(torch.randn(elements))
    host = [weights, remainder, moments_8bit(elements)]
    device = [tensor.clone().to(DEVICE) for tensor in host]
    for step in range(4):
        gradient = (torch.randn(elements) * 10.0 ** (step - 2)).to(dtype)
        gradient[: elements // 3] = 0
        update_8bit(*host, gradient, SETTINGS, step)
        update_gpu_8bit(*device, gradient.to(DEVICE), SETTINGS, step)
        for left, right in zip(host, device, strict=True):
            assert torch.equal(left, right.cpu()), step


@pytest.mark.parametrize("largest", [127, 255])
def test_a_moment_of_8_bits_is_near_and_right_on_average(largest: int) -> None:
    """Within an eighth for all magnitudes of its octaves, and without bias: as much is rounded up as down."""
    octaves = largest // 8
    values = torch.logspace(-octaves + 1, 0, 4 * 256, base=2).view(4, 256)
    scales = values.amax(1, keepdim=True)
    found = []
    for step in range(400):
        random = noise(values.numel(), step, torch.device("cpu")).view_as(values) & (1 << 20) - 1
        decoded = decode(encode(values, scales, random, largest), scales, largest)
        found.append(decoded / values - 1)
        assert found[-1].abs().max() <= 1 / 8
    errors = torch.stack(found)
    assert errors.mean().abs() < 2e-4
    assert errors.mean(0).abs().max() < 0.02
    assert (
        decode(encode(torch.zeros(1, 256), torch.zeros(1, 1), random[:1], largest), torch.zeros(1, 1), largest).abs().max() == 0
    )


def test_training_with_moments_of_8_bits_goes_nearly_where_exact_ones_go() -> None:
    """A noisy quadratic: both end near its minimum, and a second moment that must fall does fall."""
    torch.manual_seed(0)
    target = torch.randn(1024)
    ends = []
    for update, moments in ((HostUpdate(1), torch.zeros(2, 1024)), (update_8bit, moments_8bit(1024))):
        weights, remainder = halves(torch.zeros(1024))
        generator = torch.Generator().manual_seed(1)
        for step in range(600):
            gradient = join(weights, remainder) - target + 0.3 * torch.randn(1024, generator=generator)
            update(weights, remainder, moments, gradient, AdamW(lr=1e-2), step)
        ends.append((join(weights, remainder) - target).norm() / target.norm())
    exact, lossy = ends
    assert exact < 0.1
    assert lossy < 1.2 * exact


def test_a_second_moment_of_8_bits_never_vanishes_under_a_first() -> None:
    """An element far below its block's largest takes a step no larger than that one's."""
    weights, remainder = torch.zeros(256, dtype=torch.bfloat16), torch.zeros(256, dtype=torch.int16)
    moments, gradient = moments_8bit(256), torch.full((256,), 3e-8)
    gradient[0] = 1e3
    for step in range(5):
        update_8bit(weights, remainder, moments, gradient, AdamW(lr=1e-3), step)
    moved = join(weights, remainder).abs()
    assert moved[1:].max() <= moved[0]


@pytest.mark.parametrize("moments", ["fp32", "8bit"])
def test_updates_on_the_device_are_compiled_for_both_gradient_types(moments: str) -> None:
    device, seen = torch.device(DEVICE), []
    update = gpu_update(device, HostUpdate(1))

    def watched(weights, remainder, state, gradient, settings, step) -> None:
        seen.append((state.dtype, gradient.dtype))
        update(weights, remainder, state, gradient, settings, step)

    compile_gpu_update(watched, device, moments)
    of_state = torch.float32 if moments == "fp32" else torch.uint8
    assert seen == [(of_state, torch.bfloat16), (of_state, torch.float32)]


def test_threads_that_two_lanes_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.optimizer.adamw.numba.threading_layer", lambda: "workqueue")
    with pytest.raises(ValueError, match="unset NUMBA_THREADING_LAYER"):
        HostUpdate(2).compile()
