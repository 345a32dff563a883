"""A plan with its memory reserved and its weights in place."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from runtime.compute.handlers import ComputeHandlers
from runtime.handlers import UPDATES, Handlers, compile_gpu_update, gpu_update
from runtime.inputs.data import TokenWindows
from runtime.inputs.weights import WeightSource
from runtime.lanes.backend import Backend
from runtime.lanes.clock import RunError
from runtime.lanes.executor import Executor
from runtime.memory.buffers import DYNAMIC, Buffers, parameter_views
from runtime.optimizer.adamw import AdamW, HostUpdate, Rehearsal
from runtime.optimizer.split_master import join, split
from slideplan.graph.tasks import Lane, Role, SlotPool, Task, TaskKind
from slideplan.plan import Plan

LEAST_REHEARSAL_NS = 1_000_000_000  # where passes over a small state take less
LEAST_PASSES = 2


@dataclass(frozen=True)
class Progress:
    """What the caller may show: a phase with its share done, or a finished step with its loss; and what is to be known."""

    phase: str
    done: int
    total: int
    loss: float | None = None
    norm: float | None = None
    note: str = ""


class Session:
    """A plan with its memory reserved and its weights in place, ready to run steps.

    `host_update` should be compiled, or the first updates pay for it.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        source: WeightSource,
        windows: TokenWindows,
        settings: AdamW,
        host_update: HostUpdate,
        progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.plan = plan
        self.backend = backend
        graph, policy = plan.graph, plan.policy
        total = sum(pool.total_bytes for pool in graph.pools if pool.tensor_class not in DYNAMIC)
        done = 0

        def reserved(pool: SlotPool) -> None:
            nonlocal done
            done += pool.total_bytes
            progress(Progress("reserving memory", done, total))

        self.buffers = Buffers(graph, backend, policy.gradient_dtype, progress=reserved)
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
            policy.kernels,
            policy.gradient_norms,
        )
        self.handlers = Handlers(self.buffers, self.compute, settings, host_update)
        self._warm_up(host_update)
        self._steps_done = 0
        if policy.kernels == "graphed":
            self.compute.capture(backend, [task for task in graph.tasks if task.lane is Lane.COMPUTE])
        # All of the above ran on the default stream, for which no lane waits.
        backend.release_unused()

    def _update_task(self, unit: int) -> Task:
        return next(task for task in self.plan.graph.tasks if task.kind in UPDATES and task.unit == unit)

    def _halves(self, unit: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """bf16 weights and remainders of a unit where its update finds them, per parameter."""
        task = self._update_task(unit)
        layout = self.plan.model.parameters(self.plan.model.role(unit))
        high = self.buffers[task.slot(UPDATES[task.kind][1])]
        if task.kind is TaskKind.UPDATE_PASSING:
            # Its chunks lie one after the other where loads take them from, and only the last is not full.
            load = next(load for load in self.plan.graph.tasks if load.kind is TaskKind.LOAD_STATE and load.unit == unit)
            first = self.buffers[load.slot(Role.HOST_REMAINDER)]
            remainder = first.as_strided((high.numel(),), (1,))
        else:
            remainder = self.buffers[task.slot(Role.REMAINDER)]
        return parameter_views(high, layout), parameter_views(remainder, layout)

    def _place(self, unit: int, source: WeightSource) -> None:
        high, remainder = self._halves(unit)
        for name, rows, values in source.pieces(unit):
            split(values, high[name][rows], remainder[name][rows])

    def master_weights(self, unit: int) -> dict[str, torch.Tensor]:
        """fp32 master weights of a unit, by name within the unit. Nothing may be running."""
        high, remainder = self._halves(unit)
        return {name: join(high[name], remainder[name]).view(high[name].shape) for name in high}

    def _warm_up(self, host_update: HostUpdate) -> None:
        """Compile the GPU's updates before the clock starts; no slot is touched. Units compile in the first, warm-up, step."""
        if Lane.GPU_UPDATE in self.plan.graph.lanes and self.backend.name == "cuda":
            device = self.backend.device
            compile_gpu_update(gpu_update(device, host_update), device, self.plan.policy.gpu_moments)

    def rehearse(self) -> int | None:
        """Nanoseconds that the host's updates of one step take, one after the other: the median of some passes.

        Nothing else may be running.

        Nothing is changed by it, as long as gradients are finite: before the first step they are zero. None where the
        host updates nothing. Raises RunError, naming the task, if an update fails.
        """
        updates = [self.plan.graph.tasks[number] for number in self.plan.graph.lanes.get(Lane.HOST_UPDATE, ())]
        if not updates:
            return None
        self._rehearsal_ns(updates)  # threads wake up, and pages are found for the first time
        passes: list[int] = []
        while len(passes) < LEAST_PASSES or sum(passes) < LEAST_REHEARSAL_NS:
            passes.append(self._rehearsal_ns(updates))
        return round(median(passes))

    def _rehearsal_ns(self, updates: list[Task]) -> int:
        started = time.perf_counter_ns()
        for task in updates:
            try:
                self.handlers.update(task, 0, Rehearsal())
            except Exception as error:
                raise RunError(f"rehearsing {task.name}: {type(error).__name__}: {error}") from error
        return max(1, time.perf_counter_ns() - started)

    def executor(self, steps: int) -> Executor:
        """An executor of the next `steps` steps: data and optimizer go on where the last one ended."""
        first = self._steps_done
        self._steps_done += steps
        return Executor(self.plan.graph, self.backend, self.handlers, steps, first)
