"""The same exactness on a GPU: streams, pinned arenas, Triton, deterministic kernels."""

import os
import random
import threading
import time

import numpy as np
import pytest
import torch

from builders import tiny_model, tiny_policy, tiny_workload
from running import (
    EVERYTHING,
    check_near,
    check_norms,
    loss_of,
    masters,
    plain_training,
    plan_for,
    session_for,
    state_dict,
    steps_of,
    train,
)
from runtime.compute.uploads import TokenUploads
from runtime.inputs.data import TokenWindows
from runtime.inputs.weights import RandomWeights
from runtime.lanes import watchdog
from runtime.lanes.backend import STREAM_LANES, CudaBackend
from runtime.lanes.clock import Hung, LaneError
from runtime.lanes.executor import Executor
from runtime.rehearsal import rehearse
from slideplan.model import ModelSpec
from slideplan.policy import Policy, Workload

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
    "boundaries on the SSD": {"ssd_boundaries": (0, 1, 2, 3), "window": 3},
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
    "everything that eager kernels can": EVERYTHING | {"offload_inner": (), "ssd_inner": (), "host_inner_slots": 0},
}
OFFLOADED = {
    "inner activations on the host": {"offload_inner": (2, 3), "keep": (4,)},
    "inner activations on the SSD": {"ssd_inner": (1, 2, 4), "offload_inner": (3,), "window": 3},
    "all of them through one host slot": {"ssd_inner": (1, 2, 3, 4), "inner_slots": 3, "host_inner_slots": 1},
    "all of them through one slot": {"offload_inner": (1, 2, 3, 4), "inner_slots": 1, "window": 3},
    "everything on the SSD": {
        "ssd_weights": (1, 2, 3, 4),
        "ssd_state": (0, 1, 2, 3, 4, 5),
        "ssd_boundaries": (0,),
        "ssd_inner": (2, 3, 4),
        "window": 3,
    },
    "everything": EVERYTHING,
}


def gpu_model(**changes) -> ModelSpec:
    """Large enough for flash attention and tensor cores."""
    shape = {"hidden": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 512, "vocabulary": 1024}
    return tiny_model(**shape | changes)


def trained(model: ModelSpec, policy: Policy, workload: Workload) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final master weights of a run on the GPU."""
    backend = CudaBackend()
    try:
        return train(session_for(plan_for(model, policy, workload, backend), backend), STEPS)
    finally:
        backend.close()


@pytest.fixture(autouse=True)
def deterministic():
    """Flash attention's backward sums in any order unless told otherwise."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", [*POLICIES, *OFFLOADED])
@pytest.mark.parametrize("kernels", ["fused", "graphed"])
@pytest.mark.parametrize("tied", [False, True])
def test_kernels_train_alike_by_every_policy(name: str, kernels: str, tied: bool) -> None:
    """Bit for bit what fused kernels do with everything resident, and nearly what Hugging Face modules do in memory."""
    model, workload = gpu_model(qk_norm=True, architecture="qwen3", tied_embeddings=tied), tiny_workload(seq_len=128)
    policy = tiny_policy(model, **(POLICIES | OFFLOADED)[name], kernels=kernels)
    same = {"micro_batch": policy.micro_batch, "micro_batches": policy.micro_batches, "gradient_dtype": policy.gradient_dtype}
    layers = tuple(range(1, model.head_unit))
    whole = tiny_policy(model, **same, kernels="fused", resident_state=tuple(range(model.units)), keep=layers)
    (losses, weights), (expected_losses, expected) = (trained(model, each, workload) for each in (policy, whole))
    unequal = [parameter for parameter, value in expected.items() if not torch.equal(weights[parameter], value)]
    assert not unequal
    assert losses == expected_losses
    device = CudaBackend().device
    eager_losses, eager = plain_training(model, policy, workload, STEPS, device)
    assert losses == pytest.approx(eager_losses, rel=2e-3)
    start = {
        name: value.float().cpu() for name, value in state_dict(RandomWeights(model, seed=1, device=device), model).items()
    }
    check_near(start, weights, eager)


def test_moments_of_8_bits_train_alike_however_activations_lie() -> None:
    model, workload = gpu_model(), tiny_workload(seq_len=128)
    found = []
    for knobs in ({"state": "lean"}, {"state": "lean", "offload_inner": (2, 3), "kernels": "graphed"}, {}):
        policy = tiny_policy(model, **{"resident_state": (0, 1, 2), "kernels": "fused", **knobs})
        found.append(trained(model, policy, workload))
    lossy, same, exact = found
    assert lossy[0] == same[0]
    assert all(torch.equal(lossy[1][name], value) for name, value in same[1].items())
    assert any(not torch.equal(lossy[1][name], value) for name, value in exact[1].items())
    assert lossy[0] == pytest.approx(exact[0], rel=0.02)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("tied", [False, True])
def test_trains_as_in_memory(name: str, tied: bool) -> None:

    model = gpu_model(tied_embeddings=tied)
    workload = tiny_workload(seq_len=128)
    policy = tiny_policy(model, **POLICIES[name])
    losses, weights = trained(model, policy, workload)
    expected_losses, expected = plain_training(model, policy, workload, STEPS, CudaBackend().device)
    unequal = [
        f"{name}: {(weights[name] != value).sum().item()} of {value.numel()}, {(weights[name] - value).abs().max().item():.2e}"
        for name, value in expected.items()
        if not torch.equal(weights[name], value)
    ]
    assert expected.keys() == weights.keys()
    assert not unequal, "; ".join(unequal)
    assert losses == expected_losses


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kernels", ["eager", "fused", "graphed"])
def test_norms_of_gradients_are_those_of_training_in_memory(kernels: str, tied: bool) -> None:
    model, workload = gpu_model(tied_embeddings=tied), tiny_workload(seq_len=128)
    knobs = {"resident_state": (0, 1), "stream_state": (2,), "keep": (4,), "kernels": kernels}
    policy = tiny_policy(model, **knobs, gradient_norms=True)
    expected: list[dict[str, float]] = []
    backend = CudaBackend()
    plain_training(model, policy, workload, STEPS, backend.device, norms=expected)
    session = session_for(plan_for(model, policy, workload, backend), backend)
    losses, norms = zip(*steps_of(session, STEPS), strict=True)
    check_norms(session, list(norms), expected, rel=1e-3 if kernels == "eager" else 1e-2)
    backend.close()
    assert trained(model, tiny_policy(model, **knobs), workload)[0] == list(losses)


def test_a_rehearsal_of_host_updates_changes_nothing_of_the_training() -> None:
    model, workload = gpu_model(), tiny_workload(seq_len=128)
    policy = tiny_policy(model, kernels="graphed")
    backend = CudaBackend()
    session = session_for(plan_for(model, policy, workload, backend), backend)
    assert rehearse(session, lambda _: None) is not None
    losses, weights = train(session, STEPS)
    backend.close()
    expected_losses, expected = trained(model, policy, workload)
    assert losses == expected_losses
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_lane_failure_on_the_gpu_stops_the_run() -> None:

    model = gpu_model()
    backend = CudaBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(seq_len=128), backend), backend)

    def failing(task, step) -> None:
        if task.name.startswith("backward_recompute/layer001") and step == 1:
            raise RuntimeError("out of luck")
        session.handlers(task, step)

    with pytest.raises(LaneError, match=r"step 1, task backward_recompute/layer001\b"):
        list(Executor(session.plan.graph, backend, failing, 4))
    backend.close()


def test_a_kernel_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the stream's queue is full behind it: whoever issues anything then waits until it ends."""
    monkeypatch.setattr(watchdog, "LOOK_NS", 100_000_000)
    model = gpu_model()
    backend = CudaBackend()
    session = session_for(plan_for(model, tiny_policy(model), tiny_workload(seq_len=128), backend), backend)

    def endless(task, step) -> None:
        if task.name.startswith("backward_recompute/layer001") and step == 1:
            torch.cuda._sleep(1 << 35)  # some 20 s
            filled = torch.zeros((), device=backend.device)
            for _ in range(2000):
                filled.add_(1)
        session.handlers(task, step)

    started = time.monotonic()
    executor = Executor(session.plan.graph, backend, endless, 4, patience_ns=8_000_000_000)
    with pytest.raises(Hung, match=r"^lane compute, step 1, task backward_recompute/layer001\S*, unit 2: has not moved for"):
        list(executor)
    noticed_s = time.monotonic() - started
    backend.synchronize()
    assert noticed_s < time.monotonic() - started - 5
    while any(thread.is_alive() for thread in executor._threads.values()):
        time.sleep(0.01)
    backend.close()


class Dawdling:
    """Keeps streams busy for a random while before tasks, so that a missing wait shows."""

    def __init__(self, handler, seed: int) -> None:
        self._handler = handler
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def __call__(self, task, step) -> None:
        with self._lock:
            cycles = self._random.choice((0, 0, 2_000_000, 6_000_000))
        if cycles and task.lane.kind in STREAM_LANES:
            torch.cuda._sleep(cycles)
        self._handler(task, step)


MIXED = {"offload_boundaries": True, "resident_state": (1,), "keep": (4,), "window": 2}


def run_dawdling(backend, seed: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = gpu_model()
    workload = tiny_workload(seq_len=128)
    session = session_for(plan_for(model, tiny_policy(model, **MIXED), workload, backend), backend)
    try:
        executor = Executor(session.plan.graph, backend, Dawdling(session.handlers, seed), STEPS)
        losses = [loss_of(session, step) for step in executor]
        return losses, masters(session)
    finally:
        backend.close()


def test_streams_wait_for_each_other_however_slow_they_are() -> None:
    model = gpu_model()
    policy = tiny_policy(model, **MIXED)
    expected_losses, expected = plain_training(model, policy, tiny_workload(seq_len=128), STEPS, torch.device("cuda"))
    for seed in range(3):
        losses, weights = run_dawdling(CudaBackend(), seed)
        assert losses == expected_losses
        assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_without_waits_between_streams_the_result_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_dawdling(CudaBackend(), 0)
    monkeypatch.setattr(CudaBackend, "join", lambda self, marker, lane: None)
    found = run_dawdling(CudaBackend(), 0)
    assert found[0] != expected[0]


def test_tokens_sent_ahead_do_not_wait_for_weights_that_are_loaded() -> None:
    device = torch.device("cuda")
    uploads = TokenUploads(TokenWindows(np.arange(4097, dtype=np.uint32), 512, 8), 8, device)
    weights = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    slot = torch.empty_like(weights, device=device)
    loads, loaded = torch.cuda.Stream(), torch.cuda.Event()
    uploads.send(0, 0)
    torch.cuda.synchronize()
    with torch.cuda.stream(loads):
        for _ in range(8):
            slot.copy_(weights, non_blocking=True)
        loaded.record()
    inputs = uploads.take(0, 0).inputs.clone()
    torch.cuda.current_stream().synchronize()
    waited = loaded.query()
    loads.synchronize()  # the allocator knows nothing of this stream: the slot must not be freed while copies write it
    assert not waited
    assert sorted(inputs.tolist()) == list(range(4096))


def test_limit_of_device_memory_holds() -> None:
    backend = CudaBackend()
    backend.limit_gpu_bytes(backend.peak_gpu_bytes() + (64 << 20), 0)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 30, dtype=torch.uint8, device=backend.device)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, backend.device)
