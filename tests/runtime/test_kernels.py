"""Triton kernels against float64 and against the host, on the GPU or in Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

from running import elementary_adamw
from runtime.handlers import Update, compile_update, updates_of
from runtime.optimizer.adamw import (
    ALONE_ELEMENTS,
    CHUNK_ELEMENTS,
    CHUNKS_PER_THREAD,
    LEAST_CHUNK_ELEMENTS,
    AdamW,
    HostUpdate,
    Rehearsal,
)
from runtime.optimizer.host_lossy import LossyHostUpdate, blank_state
from runtime.optimizer.lossy import update_lossy
from runtime.optimizer.moments8 import CODES, LEAST_SCALE, compress, expand
from runtime.optimizer.rounding import Draws, noise
from runtime.optimizer.split_master import join, split
from slideplan.placement import Tier

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


def lossy_state(elements: int, state: str, seed: int = 0) -> list[torch.Tensor | None]:
    weights, remainder, moments = blank_state(elements, state, torch.device("cpu"))
    weights.copy_(torch.randn(elements, generator=torch.Generator().manual_seed(seed)))
    return [weights, remainder, moments]


def same(left: list[torch.Tensor | None], right: list[torch.Tensor | None]) -> bool:
    pairs = [(a, b.cpu()) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


LOSSY = ["bf16-moments", "lean"]


@pytest.mark.parametrize("state", LOSSY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", [2, 64, 130, 256, 1024, 3010, ALONE_ELEMENTS + 514])
def test_lossy_updates_of_host_and_gpu_equal_torchs_bit_for_bit(elements: int, dtype: torch.dtype, state: str) -> None:
    from runtime.kernels.adamw_lossy import update_gpu_lossy

    torch.manual_seed(elements)
    expected = lossy_state(elements, state)
    host = [each if each is None else each.clone() for each in expected]
    device = [each if each is None else each.to(DEVICE, copy=True) for each in expected]
    on_host = LossyHostUpdate(HostUpdate(2))
    for step in range(4):
        gradient = (torch.randn(elements) * 10.0 ** (step - 2)).to(dtype)
        gradient[: elements // 3] = 0
        draws = Draws.of(7, step, 3, first=512)
        update_lossy(*expected, gradient, SETTINGS, step, draws)
        on_host(*host, gradient, SETTINGS, step, draws)
        update_gpu_lossy(*device, gradient.to(DEVICE), SETTINGS, step, draws)
        assert same(expected, host), step
        assert same(expected, device), step


@pytest.mark.parametrize("state", LOSSY)
def test_a_lossy_update_in_chunks_is_that_of_the_whole(state: str) -> None:
    elements, cut = 4096, 1024
    gradient = torch.randn(elements, generator=torch.Generator().manual_seed(1))
    whole, update = lossy_state(elements, state), LossyHostUpdate(HostUpdate(2))
    start = lossy_state(elements, state)[0]
    update(*whole, gradient, SETTINGS, 3, Draws.of(1, 3, 2))
    found = []
    for first in range(0, elements, cut):
        _, low, moments = blank_state(cut, state, torch.device("cpu"))
        piece = start[first : first + cut].clone()
        update(piece, low, moments, gradient[first : first + cut], SETTINGS, 3, Draws.of(1, 3, 2, first))
        found.append(piece)
    assert torch.equal(torch.cat(found), whole[0])


@pytest.mark.parametrize("state", LOSSY)
def test_random_bits_differ_by_seed_step_unit_and_element(state: str) -> None:
    gradient, ends = torch.full((4096,), 1e-3), []
    update = LossyHostUpdate(HostUpdate(1))
    for draws in (Draws.of(0, 0, 0), Draws.of(1, 0, 0), Draws.of(0, 1, 0), Draws.of(0, 0, 1), Draws.of(0, 0, 0, first=4096)):
        found = lossy_state(4096, state)
        update(*found, gradient, AdamW(lr=1e-4), 0, draws)
        ends.append(found[2 if state == "bf16-moments" else 0].view(torch.uint8).clone())
    assert all(not torch.equal(ends[0], other) for other in ends[1:])


def test_weights_in_bf16_move_on_average_by_steps_far_below_their_precision() -> None:
    """A step of a 400th of what two neighbours differ by: rounded to the nearest, none would ever move."""
    n, steps = 1 << 16, 40
    weights, _, moments = blank_state(n, "lean", torch.device("cpu"))
    weights.fill_(1.0)
    update = LossyHostUpdate(HostUpdate(2))
    for step in range(steps):
        update(weights, None, moments, torch.ones(n), AdamW(lr=1e-5, beta1=0.0, beta2=0.0), step, Draws.of(0, step, 1))
    moved = 1 - weights.double().mean().item()
    assert moved == pytest.approx(steps * 1e-5, rel=0.05)
    assert (weights != 1.0).double().mean() < 0.3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("state", LOSSY)
def test_what_is_no_number_stays_none_in_lossy_weights(state: str, value: float) -> None:
    from runtime.kernels.adamw_lossy import update_gpu_lossy

    gradient = torch.ones(512)
    gradient[300] = value
    for update, device in ((update_lossy, "cpu"), (LossyHostUpdate(HostUpdate(1)), "cpu"), (update_gpu_lossy, DEVICE)):
        found = [each if each is None else each.to(device) for each in lossy_state(512, state)]
        for step in range(2):
            update(*found, gradient.to(device), SETTINGS, step, Draws.of(0, step, 0))
        assert not found[0][300].isfinite()
        assert found[0][:256].isfinite().all()


@pytest.mark.parametrize("moment", [0, 1])
def test_a_moment_of_8_bits_is_near_and_right_on_average(moment: int) -> None:
    """Within an eighth for all magnitudes of its octaves, and without bias: as much is rounded up as down."""
    octaves = CODES[moment] // 8
    values = torch.logspace(-octaves + 1, 0, 4 * 256, base=2)
    found = []
    for step in range(400):
        random = noise(values.numel(), Draws.of(0, step, 0), torch.device("cpu"))[0] & (1 << 20) - 1
        found.append(expand(*compress(values, moment, random), moment) / values - 1)
        assert found[-1].abs().max() <= 1 / 8
    errors = torch.stack(found)
    assert errors.mean().abs() < 2e-4
    assert errors.mean(0).abs().max() < 0.02


@pytest.mark.parametrize("moment", [0, 1])
def test_moments_of_8_bits_begin_at_zero_and_end_above_what_is_subnormal(moment: int) -> None:
    codes, scales = compress(torch.zeros(300), moment)
    assert not codes.any()
    assert not expand(codes, torch.zeros(2), moment).any(), "of a slot that nobody has written"
    tiny = torch.finfo(torch.float32).smallest_normal
    codes, scales = compress(torch.linspace(0, 1, 300) * 8 * tiny, moment)
    assert scales.view(torch.int32).tolist() == [LEAST_SCALE[moment] << 20] * 2
    found = expand(codes, scales, moment)
    assert ((found == 0) | (found >= tiny)).all()
    assert found[8:].min() >= moment * tiny, "a second moment that is not zero stays so"


@pytest.mark.parametrize("state", LOSSY)
def test_training_with_lossy_state_goes_nearly_where_exact_state_goes(state: str) -> None:
    """A noisy quadratic: both end near its minimum, and a second moment that must fall does fall."""
    torch.manual_seed(0)
    target = torch.randn(1024)

    def trained(weights: torch.Tensor, low: torch.Tensor | None, moments: torch.Tensor, update: Update) -> float:
        generator = torch.Generator().manual_seed(1)
        for step in range(600):
            remainder = torch.zeros(1024, dtype=torch.int16) if low is None else low
            gradient = join(weights, remainder) - target + 0.3 * torch.randn(1024, generator=generator)
            update(weights, low, moments, gradient, AdamW(lr=1e-2), step, Draws.of(0, step, 0))
        return float((weights.float() - target).norm() / target.norm())

    exact, lossy = (
        trained(*blank_state(1024, each, torch.device("cpu")), updates_of(each, torch.device("cpu"), HostUpdate(1))[Tier.HOST])
        for each in ("exact", state)
    )
    assert exact < 0.1
    assert lossy < 1.2 * exact


def test_a_second_moment_of_8_bits_never_vanishes_under_a_first() -> None:
    """An element far below its block's largest takes a step no larger than that one's."""
    state, gradient = blank_state(256, "lean", torch.device("cpu")), torch.full((256,), 3e-8)
    gradient[0] = 1e3
    for step in range(5):
        update_lossy(*state, gradient, AdamW(lr=1e-3), step, Draws.of(0, step, 0))
    moved = state[0].float().abs()
    assert moved[1:].max() <= 1.01 * moved[0]


@pytest.mark.parametrize("state", ["exact", *LOSSY])
def test_updates_are_compiled_for_both_gradient_types(state: str) -> None:
    device, seen = torch.device(DEVICE), []
    update = updates_of(state, device, HostUpdate(1))[Tier.GPU]

    def watched(weights, remainder, moments, gradient, settings, step, draws) -> None:
        seen.append((moments.dtype, gradient.dtype))
        update(weights, remainder, moments, gradient, settings, step, draws)

    compile_update(watched, device, state)
    of_state = {"exact": torch.float32, "bf16-moments": torch.bfloat16, "lean": torch.uint8}[state]
    assert set(seen) == {(of_state, torch.bfloat16), (of_state, torch.float32)}


def test_threads_that_two_lanes_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.optimizer.adamw.numba.threading_layer", lambda: "workqueue")
    with pytest.raises(ValueError, match="unset NUMBA_THREADING_LAYER"):
        HostUpdate(2).compile()
