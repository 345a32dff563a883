"""Weights and losses against plain in-memory PyTorch, bit for bit."""

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import EVERYTHING, check_near, check_norms, masters, plain_training, plan_for, session_for, steps_of, train
from runtime.compute.eager import EagerHead, skeleton
from runtime.compute.gradients import GradientSlot
from runtime.compute.head import FusedHead
from runtime.compute.operators import rms_norm, square_sum
from runtime.lanes.backend import CpuBackend
from runtime.memory.buffers import parameter_views
from runtime.rehearsal import rehearse
from runtime.session import Session
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import Policy

STEPS = 5

MODELS = {
    "llama": tiny_model(),
    "llama-tied": tiny_model(tied_embeddings=True),
    "qwen3-tied": tiny_model(architecture="qwen3", qk_norm=True, tied_embeddings=True),
    "qwen2": tiny_model(architecture="qwen2", attention_bias="qkv"),
    "mistral": tiny_model(architecture="mistral"),
    "rope-scaled": tiny_model(
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    ),
}
ONE_MICRO_BATCH = {"micro_batch": 4, "micro_batches": 1, "gradient_dtype": "bf16"}
POLICIES = {
    "one micro-batch": ONE_MICRO_BATCH,
    "two micro-batches": {},
    "four micro-batches": {"micro_batch": 1, "micro_batches": 4},
    "bf16 sums": {"gradient_dtype": "bf16"},
    "window of 3": {"window": 3},
    "boundaries on the host": {"offload_boundaries": True},
    "weights on the SSD": {"ssd_weights": (1, 2, 3, 4), "window": 3},
    "weights on the SSD through one slot": {"ssd_weights": (1, 3), "host_weight_slots": 1},
    "weights on the SSD through many slots": {"ssd_weights": (1, 2, 3, 4), "host_weight_slots": 6, "window": 4},
    "layers on the SSD, in order of need": {
        "ssd_weights": (1, 2, 3, 4),
        "ssd_state": (0, 1, 2, 3, 4, 5),
        "update_order": (0, 1, 2, 3, 4, 5),
        "host_weight_slots": 2,
    },
    "all on the SSD": {
        "ssd_weights": (1, 2, 3, 4),
        "ssd_state": (0, 1, 2, 3, 4, 5),
        "ssd_boundaries": (0, 1, 2, 3),
        "host_weight_slots": 4,
    },
    "state from the SSD through the GPU": {"ssd_stream": (1, 2, 4), "host_state_slots": 3},
    "state from the SSD through one slot each": {
        "ssd_stream": (1, 3),
        "stream_state": (2,),
        "host_state_slots": 1,
        "state_slots": 1,
    },
    "state from the SSD by either way": {
        "ssd_stream": (1, 2),
        "ssd_state": (0, 3),
        "ssd_moments": (5,),
        "ssd_weights": (3, 4),
        "state_chunks": 5,
        "state_slots": 4,
    },
    "inner activations kept": {"keep": (2, 3, 4)},
    "resident weights": {"resident_weights": (1, 2)},
    "resident state": {"resident_state": (0, 1, 2)},
    "nothing offloaded": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
    "updates in order of need": {"update_order": (0, 1, 2, 3, 4, 5)},
    "state passing through": {"resident_state": (0, 1), "stream_state": (2, 3)},
    "all of it through one slot": {"stream_state": (1, 2, 3, 4), "state_slots": 1, "gradient_slots": 1},
    "boundaries on the SSD": {"ssd_boundaries": (0, 1, 2, 3)},
    "boundaries on host and SSD": {"ssd_boundaries": (1, 3), "offload_boundaries": True, "boundary_slots": 6, "window": 4},
    "boundaries through one host slot": {"ssd_boundaries": (0, 2), "host_boundary_slots": 1, "boundary_slots": 3},
    "state on the SSD": {"ssd_state": (0, 1, 2, 3, 4, 5), "ssd_slots": 3, "window": 3},
    "moments on the SSD": {"ssd_moments": (0, 1, 2, 3, 4, 5), "ssd_slots": 4},
    "state on the SSD through one slot": {"ssd_state": (1, 2, 4), "ssd_moments": (5,), "ssd_slots": 1, "ssd_chunks": 2},
    "state on the SSD, in order of need": {"ssd_state": (0, 1, 3), "update_order": (0, 1, 2, 3, 4, 5), "ssd_chunks": 1},
    "mixed": {
        "resident_state": (5,),
        "resident_weights": (1,),
        "stream_state": (2,),
        "keep": (4,),
        "offload_boundaries": True,
        "window": 2,
    },
    "everything that eager kernels can": EVERYTHING | {"offload_inner": (), "ssd_inner": (), "host_inner_slots": 0},
}
# What eager kernels cannot.
FUSED_POLICIES = POLICIES | {
    "inner activations on the host": {"offload_inner": (2, 3), "keep": (4,)},
    "inner activations on the SSD": {"ssd_inner": (1, 2, 4), "offload_inner": (3,), "window": 3},
    "all of them through one host slot": {"ssd_inner": (1, 2, 3, 4), "inner_slots": 3, "host_inner_slots": 1},
    "all of them through one slot": {"offload_inner": (1, 2, 3, 4), "inner_slots": 1, "gradient_dtype": "bf16"},
    "many slots": {"offload_inner": (1, 3), "inner_slots": 7, "offload_boundaries": True},
    "everything on the SSD": {
        "ssd_weights": (1, 2, 3, 4),
        "ssd_state": (0, 1, 2, 3, 4, 5),
        "ssd_boundaries": (0,),
        "ssd_inner": (2, 3, 4),
        "window": 3,
    },
    "everything": EVERYTHING,
}


def check_equal(model: ModelSpec, policy: Policy) -> None:
    workload = tiny_workload()
    backend = CpuBackend()
    losses, weights = train(session_for(plan_for(model, policy, workload, backend), backend), STEPS)
    expected_losses, expected = plain_training(model, policy, workload, STEPS, backend.device)
    assert losses == expected_losses
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("policy", ["one micro-batch", "two micro-batches"])
def test_every_architecture_trains_as_in_memory(name: str, policy: str) -> None:
    check_equal(MODELS[name], tiny_policy(MODELS[name], **POLICIES[policy]))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("one micro-batch", "two micro-batches")])
@pytest.mark.parametrize("model", ["llama", "llama-tied"])
def test_every_policy_trains_as_in_memory(name: str, model: str) -> None:
    check_equal(MODELS[model], tiny_policy(MODELS[model], **POLICIES[name]))


def test_what_is_no_whole_number_of_pages_waits_on_the_ssd_too() -> None:
    """Boundaries of 60 tokens have 7,680 bytes."""
    model, backend, workload = MODELS["llama"], CpuBackend(), tiny_workload(seq_len=30)
    (losses, weights), (expected_losses, expected) = (
        train(session_for(plan_for(model, tiny_policy(model, **knobs), workload, backend), backend), STEPS)
        for knobs in ({"ssd_boundaries": (0, 1, 2), "host_boundary_slots": 3}, {})
    )
    assert losses == expected_losses
    assert all(torch.equal(weights[parameter], value) for parameter, value in expected.items())


def resident(model: ModelSpec, policy: Policy) -> Policy:
    """The same computation with nothing offloaded and nothing recomputed."""
    layers = tuple(range(1, model.head_unit))
    same = {"micro_batch": policy.micro_batch, "micro_batches": policy.micro_batches, "gradient_dtype": policy.gradient_dtype}
    return tiny_policy(model, **same, kernels=policy.kernels, resident_state=tuple(range(model.units)), keep=layers)


@pytest.mark.parametrize(
    ("model", "name"), [*(("llama-tied", name) for name in FUSED_POLICIES), *((model, "mixed") for model in MODELS)]
)
def test_fused_kernels_train_alike_by_every_policy(model: str, name: str) -> None:
    """Bit for bit what they do with everything resident, and nearly what Hugging Face modules do in memory."""
    spec, backend, workload = MODELS[model], CpuBackend(), tiny_workload()
    policy = tiny_policy(spec, **FUSED_POLICIES[name], kernels="fused")
    session = session_for(plan_for(spec, policy, workload, backend), backend)
    start = masters(session)
    losses, weights = train(session, STEPS)
    whole = session_for(plan_for(spec, resident(spec, policy), workload, backend), backend)
    expected_losses, expected = train(whole, STEPS)
    assert losses == expected_losses
    assert all(torch.equal(weights[parameter], value) for parameter, value in expected.items())
    eager_losses, eager = plain_training(spec, policy, workload, STEPS, backend.device)
    assert losses == pytest.approx(eager_losses, rel=1e-3)
    check_near(start, weights, eager)


LOSSY_PLACEMENTS = {
    "streamed": {},
    "all on the GPU": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
    "passing": {"resident_state": (0, 1), "stream_state": (2, 3), "state_chunks": 3},
    "on the SSD": {"ssd_state": (0, 1, 2, 3, 4, 5), "ssd_chunks": 3},
    "moments on the SSD": {"ssd_moments": (1, 3, 5), "ssd_chunks": 2, "update_order": (0, 1, 2, 3, 4, 5)},
    "from the SSD to the GPU": {"ssd_stream": (1, 2), "state_chunks": 3},
}


@pytest.mark.parametrize("state", ["bf16-moments", "lean"])
@pytest.mark.parametrize("name", LOSSY_PLACEMENTS)
def test_lossy_state_trains_the_same_wherever_it_lies(state: str, name: str) -> None:
    """Bit for bit what torch's operations make of it in memory, unit by unit: chunks, threads and tiers do not matter."""
    model, backend, workload = MODELS["llama"], CpuBackend(), tiny_workload()
    policy = tiny_policy(model, **LOSSY_PLACEMENTS[name], state=state)
    losses, weights = train(session_for(plan_for(model, policy, workload, backend), backend), STEPS)
    expected_losses, expected = plain_training(model, policy, workload, STEPS, backend.device)
    assert losses == expected_losses
    assert all(torch.equal(weights[parameter], value) for parameter, value in expected.items())


def test_lossy_state_trains_nearly_as_exact_state() -> None:
    model, backend, workload, steps = MODELS["llama"], CpuBackend(), tiny_workload(), 8
    found = {}
    for state in ("exact", "bf16-moments", "lean"):
        policy = tiny_policy(model, resident_state=(1, 2, 3), state=state)
        found[state] = train(session_for(plan_for(model, policy, workload, backend), backend), steps)
    losses, weights = found.pop("exact")
    for state, (lossy_losses, lossy) in found.items():
        assert lossy_losses == pytest.approx(losses, rel=0.02), state
        assert lossy_losses[-1] < lossy_losses[0] - 0.2
        assert any(not torch.equal(lossy[name], value) for name, value in weights.items())


@pytest.mark.parametrize("kernels", ["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accumulate", [False, True])
def test_many_chunks_of_the_loss_are_as_exact_as_one(
    kernels: str, dtype: torch.dtype, accumulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Error of the projection's gradient against float64, in norm: sixteen chunks and blocks of rows against one."""
    monkeypatch.setattr("runtime.compute.eager.PRODUCT_BYTES", 2 * 64 * 100)
    torch.manual_seed(0)
    tokens, model = 512, tiny_model(vocabulary=700)
    flat = torch.randn(model.flat_elements(UnitRole.HEAD)).bfloat16()
    layout = model.parameters(UnitRole.HEAD)
    norm = parameter_views(flat, layout)["model.norm.weight"]
    projection = parameter_views(flat, layout)["lm_head.weight"]
    entered, labels = torch.randn(tokens, 64).bfloat16(), torch.randint(0, 700, (tokens,))
    before = torch.randn(700, 64).to(dtype) if accumulate else torch.zeros(700, 64, dtype=dtype)

    normed = rms_norm(entered, norm, model.rms_norm_eps)[0]
    logits = torch.nn.functional.linear(normed, projection).double()
    probabilities = logits.softmax(1) - torch.nn.functional.one_hot(labels, 700)
    exact = before.double() + (probabilities / tokens).T @ normed.double()
    expected_loss = torch.nn.functional.cross_entropy(logits, labels).item()
    errors = {}
    for chunk in (tokens, tokens // 16):
        head = FusedHead(model, flat, chunk) if kernels == "fused" else EagerHead(skeleton(model).norm, flat, layout, chunk)
        slot = torch.zeros_like(flat, dtype=dtype)
        gradient = parameter_views(slot, layout)["lm_head.weight"].copy_(before)
        loss = head.loss(entered, labels, None, GradientSlot(slot, accumulate), torch.empty_like(entered), 1 / tokens)
        assert loss.item() == pytest.approx(expected_loss, rel=1e-6)
        errors[chunk] = ((gradient.double() - exact).norm() / exact.norm()).item()
    # Each chunk's product is rounded to bf16 once, its sum is not: a little more than one rounding in all.
    assert errors[tokens // 16] < 1.25 * errors[tokens]
    assert errors[tokens] < 3e-3


def test_one_chunk_of_logits_exists_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner reserves memory for one."""
    alive: list[int] = []
    chunks: list[weakref.ref] = []
    linear = torch.nn.functional.linear

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        alive.append(sum(chunk() is not None for chunk in chunks))
        logits = linear(*arguments)
        chunks.append(weakref.ref(logits))
        return logits

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    model = tiny_model()
    flat = torch.randn(model.flat_elements(UnitRole.HEAD)).bfloat16()
    entered, labels = torch.randn(64, 64).bfloat16(), torch.randint(0, 256, (64,))
    FusedHead(model, flat, 16).loss(
        entered, labels, None, GradientSlot(torch.zeros_like(flat), accumulate=False), torch.empty_like(entered), 1.0
    )
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "knobs",
    [
        {"window": 2},
        {"micro_batches": 1, "micro_batch": 4, "gradient_dtype": "bf16"},
        {"resident_state": (0, 1, 2), "stream_state": (3,), "keep": (4,)},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_norms_of_gradients_are_those_of_training_in_memory(knobs: dict[str, Any], tied: bool) -> None:
    model, workload, backend = tiny_model(tied_embeddings=tied), tiny_workload(), CpuBackend()
    policy = tiny_policy(model, **knobs, gradient_norms=True)
    expected: list[dict[str, float]] = []
    plain_training(model, policy, workload, 3, backend.device, norms=expected)
    session = session_for(plan_for(model, policy, workload, backend), backend)
    losses, norms = zip(*steps_of(session, 3), strict=True)
    check_norms(session, list(norms), expected, rel=1e-4)
    without = session_for(plan_for(model, tiny_policy(model, **knobs), workload, backend), backend)
    assert steps_of(without, 3) == [[loss] for loss in losses]


def test_every_gradient_is_passed_over_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is priced: when it is complete, not with every micro-batch."""
    model, backend = tiny_model(), CpuBackend()
    passed: list[int] = []

    def counting(values: torch.Tensor, out: torch.Tensor) -> None:
        passed.append(values.numel())
        square_sum(values, out)

    monkeypatch.setattr("runtime.compute.handlers.square_sum", counting)
    policy = tiny_policy(model, micro_batch=1, micro_batches=4, gradient_norms=True)
    train(session_for(plan_for(model, policy, tiny_workload(), backend), backend), 2)
    assert sorted(passed) == sorted(2 * [model.unit_parameter_count(model.role(unit)) for unit in range(model.units)])


def test_settings_reach_the_update() -> None:
    model = tiny_model()
    backend = CpuBackend()
    plan = plan_for(model, tiny_policy(model), tiny_workload(), backend)
    session = session_for(plan, backend)
    settings = dataclasses.replace(session.handlers._settings, lr=0.0, weight_decay=0.0)
    before = {name: value.clone() for name, value in session.states[1].master().items()}
    frozen = session_for(plan, backend, settings)
    train(frozen, 2)
    assert all(torch.equal(before[name], value) for name, value in frozen.states[1].master().items())


def check_two_runs(before_each: Callable[[Session], object]) -> None:
    """Two runs of a session, each after this, train as one run of as many steps does."""
    model = tiny_model()
    backend = CpuBackend()
    plan = plan_for(model, tiny_policy(model), tiny_workload(), backend)
    whole_losses, whole = train(session_for(plan, backend), 4)
    session = session_for(plan, backend)
    losses = []
    for _ in range(2):
        before_each(session)
        losses += train(session, 2)[0]
    assert losses == whole_losses
    assert all(torch.equal(whole[name], value) for name, value in masters(session).items())


def test_two_runs_of_a_session_go_on_where_the_first_ended() -> None:
    check_two_runs(lambda _: None)


def test_a_rehearsal_of_host_updates_changes_nothing_of_the_training() -> None:
    """Before the first step, and in the middle."""
    taken: list[int | None] = []
    check_two_runs(lambda session: taken.append(rehearse(session, lambda _: None)))
    assert len(taken) == 2
    assert all(nanoseconds is not None and nanoseconds > 0 for nanoseconds in taken)
    model, backend = tiny_model(), CpuBackend()
    resident = plan_for(model, tiny_policy(model, resident_state=tuple(range(model.units))), tiny_workload(), backend)
    assert rehearse(session_for(resident, backend), lambda _: None) is None
