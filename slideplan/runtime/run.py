"""`runtime execute`: from a plan on disk to a measurement on disk."""

from __future__ import annotations

import datetime
import gc
import json
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numba
import psutil
import torch
import transformers

from slideplan import __version__
from slideplan.plan.codec import digest, save
from slideplan.plan.graph import Role, SlotPool, Task, TaskKind, TensorClass, tier_bytes
from slideplan.plan.hf_config import model_from_config
from slideplan.plan.measurement import Measurement
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import Plan
from slideplan.plan.policy import Tier
from slideplan.plan.quantities import format_bytes
from slideplan.plan.timeline import Span, step_record
from slideplan.runtime.backend import (
    Backend,
    identity,
    make_backend,
    peak_resident_bytes,
    reset_peak_resident,
    resident_bytes,
)
from slideplan.runtime.buffers import Buffers, parameter_views
from slideplan.runtime.compute import ComputeHandlers
from slideplan.runtime.data import TokenWindows, default_text, tokenize
from slideplan.runtime.executor import Executor
from slideplan.runtime.handlers import UPDATES, Handlers
from slideplan.runtime.optimizer import AdamW, HostUpdate
from slideplan.runtime.split_master import join, split
from slideplan.runtime.threads import ThreadBudget
from slideplan.runtime.weights import RandomWeights, SafetensorsWeights, WeightSource


@dataclass(frozen=True)
class RunRequest:
    """What to run. `data` None: the sources of Python's standard library. `weights` None: random ones."""

    plan: Plan
    plan_path: str
    out: Path
    steps: int
    device: str = "auto"
    data: Path | None = None
    weights: Path | None = None
    settings: AdamW = field(default_factory=AdamW)
    seed: int = 0
    warmup_steps: int = 2
    command: str = ""


@dataclass(frozen=True)
class Progress:
    """What the caller may show: a phase with its share done, or a finished step with its loss."""

    phase: str
    done: int
    total: int
    loss: float | None = None


class Session:
    """A plan with its memory reserved and its weights in place, ready to run steps."""

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        source: WeightSource,
        windows: TokenWindows,
        settings: AdamW,
        threads: ThreadBudget,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.plan = plan
        self.backend = backend
        graph, policy = plan.graph, plan.policy
        static = [pool for pool in graph.pools if pool.tensor_class not in (TensorClass.INNER, TensorClass.WORKSPACE)]
        total = sum(pool.total_bytes for pool in static)
        done = 0

        def reserved(pool: SlotPool) -> None:
            nonlocal done
            done += pool.total_bytes
            progress(Progress("reserving memory", done, total))

        dtype = torch.float32 if policy.gradient_dtype == "fp32" else torch.bfloat16
        self.buffers = Buffers(graph, backend, dtype, progress=reserved)
        for unit in range(plan.model.units):
            self._place(unit, source)
            progress(Progress("placing weights", unit + 1, plan.model.units))
        self.compute = ComputeHandlers(
            plan.model,
            graph,
            self.buffers,
            backend.device,
            windows,
            policy.micro_batch,
            policy.micro_batches,
            plan.workload.seq_len,
        )
        host_update = HostUpdate(threads.optimizer)
        self.handlers = Handlers(self.buffers, self.compute, settings, host_update)
        self._warm_up(host_update)

    def _update_task(self, unit: int) -> Task:
        return next(task for task in self.plan.graph.tasks if task.kind in UPDATES and task.unit == unit)

    def _halves(self, unit: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """bf16 weights and remainders of a unit where its update finds them, per parameter."""
        task = self._update_task(unit)
        layout = self.plan.model.parameters(self.plan.model.role(unit))
        high = self.buffers[task.slot(UPDATES[task.kind][1])]
        return parameter_views(high, layout), parameter_views(self.buffers[task.slot(Role.REMAINDER)], layout)

    def _place(self, unit: int, source: WeightSource) -> None:
        high, remainder = self._halves(unit)
        for name, value in source.unit(unit):
            split(value.float(), high[name], remainder[name])

    def master_weights(self, unit: int) -> dict[str, torch.Tensor]:
        """fp32 master weights of a unit, by name within the unit. Nothing may be running."""
        high, remainder = self._halves(unit)
        return {name: join(high[name], remainder[name]).view(high[name].shape) for name in high}

    def _warm_up(self, host_update: HostUpdate) -> None:
        """Compile kernels before the clock starts; no slot is touched."""
        host_update.compile()
        if any(task.kind is TaskKind.UPDATE_GPU for task in self.plan.graph.tasks) and self.backend.name == "cuda":
            from slideplan.runtime.kernels.adamw import compile_gpu_update

            compile_gpu_update(self.backend.device)

    def executor(self, steps: int) -> Executor:
        """An executor over this session's slots."""
        return Executor(self.plan.graph, self.backend, self.handlers, steps)

    def close(self) -> None:
        """Release all memory; the session is over."""
        self.backend.close()


def check_request(request: RunRequest) -> None:
    """Everything that can be refused before memory is reserved. Raises ValueError."""
    plan = request.plan
    plan.check(request.plan_path)
    for knob, value in plan.policy.foreign_knobs().items():
        raise ValueError(
            f"{request.plan_path}: policy.{knob} is {value!r}, which describes how another system works and can be priced "
            "but not executed; run a plan of `planner simulate`"
        )
    if request.steps < 1:
        raise ValueError(f"--steps is {request.steps}, must be at least 1")
    if request.warmup_steps < 0:
        raise ValueError(f"--warmup is {request.warmup_steps}, must be zero or more")
    if request.weights is not None:
        _check_model(plan.model, request.weights)


def _check_model(planned: ModelSpec, weights: Path) -> None:
    found = model_from_config(weights)
    differing = [
        f"{name} is {getattr(found, name)}, planned {getattr(planned, name)}"
        for name in planned.__struct_fields__
        if name != "name" and getattr(found, name) != getattr(planned, name)
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
    free = {Tier.HOST: _free_host_bytes()}
    if backend.name == "cuda":
        free[Tier.GPU] = torch.cuda.mem_get_info(backend.device)[0]
    else:  # the device's memory is RAM too
        free[Tier.HOST] -= tier_bytes(plan.graph.pools, Tier.GPU)
    for tier, available in free.items():
        need = tier_bytes(plan.graph.pools, tier)
        if need > available:
            raise ValueError(
                f"{where}: needs {format_bytes(need)} of {tier} memory, {format_bytes(max(0, available))} are free: lacks "
                f"{format_bytes(need - available)}; free some, or plan with a smaller --{tier}-memory"
            )


def _free_host_bytes() -> int:
    """RAM that can still be taken: what the system calls available."""
    return int(psutil.virtual_memory().available)


def execute(request: RunRequest, progress: Callable[[Progress], None]) -> Measurement:
    """Run the plan and write plan, metrics and measurement into the run folder.

    Raises ValueError for what the user can mend, before memory is reserved; LaneError if a lane fails.
    """
    check_request(request)
    plan = request.plan
    backend = make_backend(request.device)
    check_machine(plan, backend, request.plan_path)
    source: WeightSource = (
        RandomWeights(plan.model, request.seed, backend.device)
        if request.weights is None
        else SafetensorsWeights(plan.model, request.weights)
    )
    workload = plan.workload
    tokens = tokenize(
        request.data or default_text(), request.weights, plan.model.vocabulary, request.steps * workload.tokens + 1
    )
    windows = TokenWindows(tokens, workload.seq_len, workload.global_batch, request.seed)
    threads = ThreadBudget.of(backend)
    threads.apply()
    request.out.mkdir(parents=True, exist_ok=True)
    save(request.out / "plan.json", plan)
    session = Session(plan, backend, source, windows, request.settings, threads, progress)
    try:
        measurement = _measure(session, request, progress)
    finally:
        session.close()
    save(request.out / "measurement.json", measurement)
    return measurement


def _measure(session: Session, request: RunRequest, progress: Callable[[Progress], None]) -> Measurement:
    backend = session.backend
    gc.collect()
    reset_peak_resident()
    before = resident_bytes()
    executor = session.executor(request.steps)
    origins: list[int] = []
    spans: list[list[Span]] = []
    losses: list[float] = []

    def harvest(step: int) -> None:
        origin, found = executor.spans(step)
        origins.append(origin)
        spans.append(found)

    with (request.out / "metrics.jsonl").open("w") as metrics:
        for step in executor:
            losses.append(session.compute.losses.pop(step).item())
            metrics.write(json.dumps({"step": step, "loss": losses[-1]}) + "\n")
            metrics.flush()
            progress(Progress("training", step + 1, request.steps, losses[-1]))
            if step >= 2:
                harvest(step - 2)
    for step in range(len(spans), request.steps):
        harvest(step)
    return _measurement(request, backend, origins, spans, losses, _peaks(session, before))


def _peaks(session: Session, before_bytes: int) -> dict[Tier, int]:
    """Peak bytes per tier, as far as the backend can tell.

    Without a GPU the device's tensors lie in this process and cannot be told from its own: what the
    process held before the first step, less the device's slots, stands for the host.
    """
    peak_gpu = session.backend.peak_gpu_bytes()
    if peak_gpu is None:
        return {Tier.HOST: before_bytes - tier_bytes(session.buffers.reserved(), Tier.GPU)}
    return {Tier.GPU: peak_gpu, Tier.HOST: peak_resident_bytes()}


def _measurement(
    request: RunRequest,
    backend: Backend,
    origins: list[int],
    spans: list[list[Span]],
    losses: list[float],
    peak_bytes: dict[Tier, int],
) -> Measurement:
    plan = request.plan
    # A step lasts from its first compute task to that of the next; the last one, to its own last task.
    ends = [*origins[1:], origins[-1] + max(span.end_ns for span in spans[-1])]
    step_ns = [end - start for start, end in zip(origins, ends, strict=True)]
    # The last step is left out where others are there: no step follows into which it could overlap.
    steady = list(_steady(len(step_ns), request.warmup_steps))
    middle = sorted(steady, key=lambda step: step_ns[step])[len(steady) // 2]
    task_ns = tuple(
        round(median(spans[step][number].end_ns - spans[step][number].start_ns for step in steady))
        for number in range(len(plan.graph.tasks))
    )
    return Measurement(
        version=__version__,
        plan_digest=digest(plan),
        machine=identity(backend),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "numba": numba.__version__,
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=request.command,
        steady_steps=tuple(steady),
        step_ns=tuple(step_ns),
        losses=tuple(losses),
        task_ns=task_ns,
        record=step_record(plan.graph, plan.workload, step_ns[middle], spans[middle], peak_bytes),
    )


def _steady(steps: int, warmup: int) -> Iterator[int]:
    """Steps to judge by: after the warm-up and before the last, or what there is."""
    return iter(range(warmup, steps - 1) if steps - 1 > warmup else range(max(0, steps - 1), steps))
