"""`runtime execute`: from a plan on disk to a measurement on disk."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

from runtime.inputs.data import TokenWindows
from runtime.inputs.prepare import DataRequest, prepare
from runtime.inputs.weights import RandomWeights, SafetensorsWeights, WeightSource
from runtime.lanes.backend import Backend, make_backend
from runtime.lanes.clock import RunError
from runtime.lanes.threads import set_compute_threads
from runtime.machine import identity, resident_bytes
from runtime.measure import PeakMemory, measurement
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.rehearsal import rehearse
from runtime.session import Session
from runtime.training import train
from slideplan.codec import save
from slideplan.graph.tasks import tier_bytes
from slideplan.hf_config import model_from_config
from slideplan.machine.host import available_host_bytes
from slideplan.measurement import Measurement
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes

# Beside its slots a run takes tokens, libraries and a part of a parameter in fp32 on its way into them.
MARGIN_BYTES = 1 << 30


@dataclass(frozen=True)
class RunRequest:
    """What to run. `data` None: the sources of Python's standard library. `weights` None: random ones.

    byte_tokens: bytes are tokens though there are weights that have learned others.
    document_end: "auto" (the tokenizer's end-of-text token), "none", or the text of a token.
    token_cache: folder of prepared tokens; None: the default one.
    """

    plan: Plan
    plan_path: str
    out: Path
    steps: int
    device: str = "auto"
    data: Path | None = None
    weights: Path | None = None
    settings: AdamW = field(default_factory=AdamW)
    seed: int = 0
    byte_tokens: bool = False
    document_end: str = "auto"
    token_cache: Path | None = None
    warmup_steps: int = 2
    command: str = ""


def check_request(request: RunRequest) -> None:
    """Everything that can be refused before memory is reserved. Raises ValueError."""
    plan = request.plan
    if plan.policy.other is not None:
        raise ValueError(
            f"{request.plan_path}: policy.other is {plan.policy.other.name}: the plan describes how another system works, and "
            "can be priced but not executed; run a plan of `planner simulate`"
        )
    plan.check(request.plan_path)
    if request.steps < 1:
        raise ValueError(f"--steps is {request.steps}, must be at least 1")
    if request.warmup_steps < 0:
        raise ValueError(f"--warmup is {request.warmup_steps}, must be zero or more")
    if not 0 <= request.seed < 1 << 31:
        raise ValueError(f"--seed is {request.seed}, must be in 0..{(1 << 31) - 1}")
    if request.weights is not None:
        _check_model(plan.model, request.weights, plan.workload.seq_len)


def _check_model(planned: ModelSpec, weights: Path, seq_len: int) -> None:
    """Raise ValueError where the folder's config describes another model than the planned one, for such sequences."""
    found = model_from_config(weights)
    differing = [
        f"{name} is {getattr(found, name)}, planned {getattr(planned, name)}"
        for name in planned.__struct_fields__
        if name != "name"
        and getattr(found, name) != getattr(planned, name)
        # Up to how many positions a model is offered changes nothing below them: scaled frequencies are read without it.
        and not (name == "max_positions" and seq_len <= found.max_positions)
    ]
    if differing:
        raise ValueError(
            f"--weights {weights}: is not the model that was planned ({planned.name}): {'; '.join(differing)}; "
            f"plan for it with `planner simulate --model {weights}`"
        )


def check_machine(plan: Plan, backend: Backend, where: str) -> None:
    """Raise ValueError where the plan was made for another machine or does not fit in what is free."""
    differences = plan.machine.identity.differences(identity(backend))
    if differences:
        raise ValueError(
            f"{where}: was made for machine {plan.machine.name}, this one differs (planned, here): {'; '.join(differences)}; "
            "measure this machine with `planner profile` and plan again"
        )
    if plan.policy.kernels == "graphed" and backend.name == "cpu":
        raise ValueError(f'{where}: policy.kernels is "graphed": nothing can be captured on a CPU; plan with --kernels fused')
    free = {Tier.HOST: available_host_bytes()}
    if backend.name == "cuda":
        free[Tier.GPU] = torch.cuda.mem_get_info(backend.device)[0]
    else:  # the device's memory is RAM too
        free[Tier.HOST] -= tier_bytes(plan.graph.pools, Tier.GPU)
    for tier, available in free.items():
        need = tier_bytes(plan.graph.pools, tier) + (MARGIN_BYTES if tier is Tier.HOST else 0)
        if need > available:
            raise ValueError(
                f"{where}: needs {format_bytes(need)} of {tier} memory, {format_bytes(max(0, available))} are free: lacks "
                f"{format_bytes(need - available)}; free some, or plan with a smaller --{tier}-memory"
            )


def _weights(request: RunRequest, backend: Backend, show: Show) -> WeightSource:
    model = request.plan.model
    if request.weights is None:
        return RandomWeights(model, request.seed, backend.device)
    source = SafetensorsWeights(model, request.weights)
    for note in source.notes:
        show(Progress("checking weights", 1, 1, note=note))
    return source


def _token_windows(request: RunRequest, show: Show) -> TokenWindows:
    """Prepare the data in the memory that the plan's slots take later, and say what was read."""
    plan = request.plan
    wanted = DataRequest(
        data=request.data,
        weights=request.weights,
        vocabulary=plan.model.vocabulary,
        byte_tokens=request.byte_tokens,
        document_end=request.document_end,
        cache=request.token_cache,
        host_bytes=tier_bytes(plan.graph.pools, Tier.HOST) + MARGIN_BYTES - resident_bytes(),
    )
    data = prepare(wanted, show)
    try:
        windows = TokenWindows(data.tokens, plan.workload.seq_len, plan.workload.global_batch, request.seed)
    except ValueError as error:  # more may lie there than was read
        raise ValueError(f"{error}; {data.said_of_files()}") from None
    for line in (data.said(request.steps, plan.workload.global_batch, windows.windows), data.said_of_tokens()):
        show(Progress("data", 1, 1, note=line))
    return windows


def execute(request: RunRequest, show: Show) -> Measurement:
    """Run the plan and write metrics and measurement into the run folder, which `folder.claimed` has made.

    Raises ValueError for what the user can mend, before memory is reserved; RunError if the run fails.
    """
    check_request(request)
    plan = request.plan
    backend = make_backend(request.device)
    check_machine(plan, backend, request.plan_path)
    source = _weights(request, backend, show)
    windows = _token_windows(request, show)
    set_compute_threads(backend)
    host_update = HostUpdate(plan.machine.optimizer_threads)
    if host_update.threads < plan.machine.optimizer_threads:
        raise ValueError(
            f"{request.plan_path}: machine.optimizer_threads is {plan.machine.optimizer_threads}, numba gives this process "
            f"{host_update.threads}; unset NUMBA_NUM_THREADS, or measure this machine with it and plan again"
        )
    host_update.compile()  # it may refuse
    on_gpu = plan.ledger.tiers[Tier.GPU]
    backend.limit_gpu_bytes(on_gpu.capacity_bytes, on_gpu.fixed_bytes)
    try:
        session = Session(plan, backend, source, windows, request.settings, host_update, show)
        memory = PeakMemory(session)
        rehearsed_ns = rehearse(session, show)
        recorder = train(session, request.steps, request.out, show)
        found = measurement(session, recorder, memory, request.warmup_steps, request.command, rehearsed_ns)
    except BaseException:
        # After a fault of the device closing may fail too; the fault is what the user must see.
        with contextlib.suppress(Exception):
            backend.close()
        raise
    backend.close()
    try:
        save(request.out / "measurement.json", found)
    except ValueError as error:  # nothing that was asked for is wrong
        raise RunError(str(error)) from None
    return found
