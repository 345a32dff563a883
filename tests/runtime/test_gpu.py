"""The same exactness on a GPU: streams, pinned arenas, Triton, deterministic kernels."""

import os

import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import plain_training, plan_for, session_for, train
from slideplan.plan.model import ModelSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

STEPS = 5
POLICIES = {
    "window of 2": {"window": 2},
    "window of 3": {"window": 3},
    "one micro-batch": {"micro_batch": 4, "micro_batches": 1, "gradient_dtype": "bf16"},
    "boundaries on the host": {"offload_boundaries": True},
    "inner activations kept": {"keep": (2, 3, 4)},
    "resident weights": {"resident_weights": (1, 2)},
    "resident state": {"resident_state": (0, 1, 2)},
    "nothing offloaded": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
    "updates in order of need": {"update_order": (0, 1, 2, 3, 4, 5)},
}


def gpu_model(**changes) -> ModelSpec:
    """Large enough for flash attention and tensor cores."""
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "vocabulary": 1024}
    return tiny_model(**shape | changes)


@pytest.fixture(autouse=True)
def deterministic():
    """Flash attention's backward sums in any order unless told otherwise."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tied", [False, True])
def test_trains_as_in_memory(name: str, tied: bool) -> None:
    from slideplan.runtime.backend import CudaBackend

    model = gpu_model(tied_embeddings=tied)
    workload = tiny_workload(seq_len=128)
    policy = tiny_policy(model, **POLICIES[name])
    backend = CudaBackend()
    session = session_for(plan_for(model, policy, workload, backend), backend)
    try:
        losses, weights = train(session, STEPS)
    finally:
        session.close()
    expected_losses, expected = plain_training(model, policy, workload, STEPS, backend.device)
    unequal = [
        f"{name}: {(weights[name] != value).sum().item()} of {value.numel()}, {(weights[name] - value).abs().max().item():.2e}"
        for name, value in expected.items()
        if name in weights and not torch.equal(weights[name], value)
    ]
    assert not unequal, "; ".join(unequal)
    assert losses == expected_losses


def test_lane_failure_on_the_gpu_stops_the_run() -> None:
    from slideplan.runtime.backend import CudaBackend
    from slideplan.runtime.executor import Executor
    from slideplan.runtime.lanes import LaneError

    model = gpu_model()
    backend = CudaBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(seq_len=128), backend), backend)

    def failing(task, step) -> None:
        if task.name.startswith("backward_recompute/layer001") and step == 1:
            raise RuntimeError("out of luck")
        session.handlers(task, step)

    with pytest.raises(LaneError, match="step 1, task backward_recompute/layer001"):
        list(Executor(session.plan.graph, backend, failing, 4))
    session.close()
