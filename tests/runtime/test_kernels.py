"""Triton kernels against float64 and against the host, on the GPU or in Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

from running import elementary_adamw
from slideplan.runtime.optimizer import CHUNK_ELEMENTS, CHUNKS_PER_THREAD, LEAST_CHUNK_ELEMENTS, AdamW, HostUpdate
from slideplan.runtime.split_master import join, split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton")

SETTINGS = AdamW(lr=3e-3, weight_decay=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [1, 63, 1024, 3001])
def test_gpu_update_equals_the_hosts_bit_for_bit(elements: int, dtype: torch.dtype) -> None:
    from slideplan.runtime.kernels.adamw import update_gpu

    torch.manual_seed(elements)
    weights, remainder = torch.empty(elements, dtype=torch.bfloat16), torch.empty(elements, dtype=torch.int16)
    split(torch.randn(elements), weights, remainder)
    host = [weights, remainder, torch.zeros(2, elements)]
    device = [tensor.clone().to(DEVICE) for tensor in host]
    for step in range(3):
        gradient = (torch.randn(elements) * 10.0 ** (step - 2)).to(dtype)
        HostUpdate(2)(*host, gradient, SETTINGS, step)
        update_gpu(*device, gradient.to(DEVICE), SETTINGS, step)
        for left, right in zip(host, device, strict=True):
            assert torch.equal(left, right.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [5001, 8 * LEAST_CHUNK_ELEMENTS * CHUNKS_PER_THREAD + 1, 8 * CHUNK_ELEMENTS + 7])
def test_host_update_is_elementary_fp32_adamw(elements: int, dtype: torch.dtype) -> None:
    """However it is cut into chunks: every element once."""
    generator = np.random.default_rng(0)
    p = generator.standard_normal(elements).astype(np.float32)
    m, v = np.zeros_like(p), np.zeros_like(p)
    weights, remainder = torch.empty(elements, dtype=torch.bfloat16), torch.empty(elements, dtype=torch.int16)
    split(torch.from_numpy(p), weights, remainder)
    moments = torch.zeros(2, elements)
    for step in range(5):
        gradient = torch.from_numpy(generator.standard_normal(elements).astype(np.float32)).to(dtype)
        HostUpdate(2)(weights, remainder, moments, gradient, SETTINGS, step)
        p, m, v = elementary_adamw(p, m, v, gradient.float().numpy(), SETTINGS, step)
        assert np.array_equal(join(weights, remainder).numpy(), p)
        assert np.array_equal(moments.numpy(), np.stack([m, v]))


def test_host_update_against_float64_and_torch() -> None:
    """Each fp32 step rounds about ten times: 20 half-ulps of the weight and of the step bound the error of one step."""
    torch.manual_seed(1)
    start = torch.randn(4000)
    weights, remainder = torch.empty(4000, dtype=torch.bfloat16), torch.empty(4000, dtype=torch.int16)
    split(start, weights, remainder)
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
    high, remainder = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    split(master, high, remainder)
    assert torch.equal(join(high, remainder).view(torch.int32), master.view(torch.int32))


def test_split_is_exact_and_rounds_to_nearest() -> None:
    torch.manual_seed(2)
    bits = torch.randint(-(2**31), 2**31 - 1, (100_000,)).to(torch.int32)
    master = bits.view(torch.float32)
    master = master[torch.isfinite(master)]
    high, remainder = torch.empty(master.numel(), dtype=torch.bfloat16), torch.empty(master.numel(), dtype=torch.int16)
    split(master, high, remainder)
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
    from slideplan.runtime.kernels.adamw import update_gpu

    nan = torch.tensor([pattern], dtype=torch.int64).to(torch.int32).view(torch.float32)
    high, remainder = torch.empty(1, dtype=torch.bfloat16), torch.empty(1, dtype=torch.int16)
    split(nan, high, remainder)
    assert high.isnan().all()
    assert join(high, remainder).isnan().all()
    for update, device in ((HostUpdate(1), "cpu"), (update_gpu, DEVICE)):
        weights, low = torch.empty(64, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int16)
        split(torch.ones(64), weights, low)
        state = [weights.to(device), low.to(device), torch.zeros(2, 64, device=device)]
        update(*state, nan.expand(64).contiguous().to(device), SETTINGS, 0)
        assert state[0].isnan().all()
