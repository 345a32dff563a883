"""Weights and losses against plain in-memory PyTorch, bit for bit."""

import dataclasses

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import plain_training, plan_for, session_for, train
from slideplan.plan.model import ModelSpec
from slideplan.plan.policy import Policy
from slideplan.runtime.backend import CpuBackend

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
    "inner activations kept": {"keep": (2, 3, 4)},
    "resident weights": {"resident_weights": (1, 2)},
    "resident state": {"resident_state": (0, 1, 2)},
    "nothing offloaded": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
    "updates in order of need": {"update_order": (0, 1, 2, 3, 4, 5)},
    "mixed": {"resident_state": (5,), "resident_weights": (1,), "keep": (4,), "offload_boundaries": True, "window": 3},
}


def check_equal(model: ModelSpec, policy: Policy) -> None:
    workload = tiny_workload()
    backend = CpuBackend()
    losses, weights = train(session_for(plan_for(model, policy, workload, backend), backend), STEPS)
    expected_losses, expected = plain_training(model, policy, workload, STEPS, backend.device)
    assert losses == expected_losses
    for name, value in expected.items():
        if name in weights:
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


def test_chunks_of_the_loss_differ_by_the_order_of_sums_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss is the same; a projection gradient summed in fp32 over chunks, rounded to bf16 each, moves by an ulp of bf16."""
    monkeypatch.setattr("slideplan.runtime.compute.LOSS_CHUNK_BYTES", 4 * 256 * 20)
    model = tiny_model()
    backend = CpuBackend()
    policy = tiny_policy(model)
    _, chunked = train(session_for(plan_for(model, policy, tiny_workload(), backend), backend), 1)
    _, whole = plain_training(model, policy, tiny_workload(), 1, backend.device)
    # One AdamW step moves each weight by at most lr: a gradient that changes its last bits can turn
    # the sign of an update only where the gradient is next to nothing.
    same = torch.isclose(chunked["lm_head.weight"], whole["lm_head.weight"], rtol=0, atol=1e-6)
    assert same.float().mean() > 0.99
    assert (chunked["lm_head.weight"] - whole["lm_head.weight"]).abs().max() <= 2.1e-3
    assert not torch.equal(chunked["lm_head.weight"], whole["lm_head.weight"]), "chunks were not used"


def test_settings_reach_the_update() -> None:
    model = tiny_model()
    backend = CpuBackend()
    plan = plan_for(model, tiny_policy(model), tiny_workload(), backend)
    session = session_for(plan, backend)
    settings = dataclasses.replace(session.handlers._settings, lr=0.0, weight_decay=0.0)
    before = {name: value.clone() for name, value in session.master_weights(1).items()}
    frozen = session_for(plan, backend, settings)
    train(frozen, 2)
    assert all(torch.equal(before[name], value) for name, value in frozen.master_weights(1).items())
