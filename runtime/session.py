"""A plan with its memory reserved, which runs its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from runtime.compute.handlers import ComputeHandlers
from runtime.handlers import Handlers, compile_update, updates_of
from runtime.inputs.data import Position, TokenWindows
from runtime.lanes.backend import Backend
from runtime.lanes.executor import Executor
from runtime.lanes.watchdog import patience_ns
from runtime.memory.buffers import DYNAMIC, Buffers
from runtime.memory.drive import Drive
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.state import UnitState
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import SlotPool
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.progress import Progress, Show, silent


class Start(Protocol):
    """Where a run begins."""

    def fill(self, states: Sequence[UnitState], show: Show) -> Position:
        """Write weights, and optimizer state where there is some already, of all units."""


class Session:
    """A plan with its memory reserved. Once it has begun somewhere, it runs steps.

    `host_update` should be compiled, or the first updates pay for it.
    """

    def __init__(
        self,
        plan: Plan,
        backend: Backend,
        windows: TokenWindows,
        settings: AdamW,
        host_update: HostUpdate,
        show: Show = silent,
        drive: Drive | None = None,
        seed: int = 0,
    ) -> None:
        """drive: with the plan's slots on the SSD, where there are any. seed: of random rounding, of lossy state."""
        self.plan = plan
        self.backend = backend
        graph, policy = plan.graph, plan.policy
        reserved_here = [pool for pool in graph.pools if pool.tensor_class not in DYNAMIC and pool.tier is not Tier.SSD]
        total = sum(pool.total_bytes for pool in reserved_here)
        done = 0

        def reserved(pool: SlotPool) -> None:
            nonlocal done
            done += pool.total_bytes
            show(Progress("reserving memory", done, total))

        self.buffers = Buffers(graph, backend, policy.gradient_dtype, progress=reserved, drive=drive)
        self.states = [UnitState(graph, plan.model, policy, self.buffers, unit) for unit in range(plan.model.units)]
        self.compute = ComputeHandlers(
            plan.model,
            graph,
            self.buffers,
            backend,
            windows,
            policy,
            plan.workload.seq_len,
        )
        self.handlers = Handlers(plan, self.buffers, self.compute, settings, host_update, seed)
        self.windows = windows
        self._warm_up(host_update)
        self._begun = Position(0, 0)
        self._executor: Executor | None = None
        if policy.kernels == "graphed":
            self.compute.capture(backend, [task for task in graph.tasks if task.lane.kind is LaneKind.COMPUTE])
        # All of the above ran on the default stream, for which no lane waits.
        backend.release_unused()

    def begin(self, start: Start, show: Show = silent) -> None:
        """Take weights and state from where the run begins. No lane may be running."""
        self._begun = start.fill(self.states, show)
        self._executor = None
        self.windows.begin(self._begun)
        self.backend.release_unused()  # as above

    def close(self) -> None:
        """Give back page locks and room on the drive. No lane may be running."""
        self.backend.close()
        if self.buffers.drive is not None:
            self.buffers.drive.close()

    @property
    def first_step(self) -> int:
        """Steps that earlier runs have done."""
        return self._begun.step

    @property
    def steps_done(self) -> int:
        """Steps done, earlier runs' included, once the last executor has ended."""
        return self._begun.step if self._executor is None else self._executor.first_step + self._executor.steps

    def _warm_up(self, host_update: HostUpdate) -> None:
        """Compile updates before the clock starts; no slot is touched. Units compile in the first, warm-up, step."""
        device, state = self.backend.device, self.plan.policy.state
        updates = updates_of(state, device, host_update)
        if self.plan.graph.queue(LaneKind.GPU_UPDATE) and self.backend.name == "cuda":
            compile_update(updates[Tier.GPU], device, state)
        if self.plan.graph.queue(LaneKind.HOST_UPDATE) and state != "exact":  # the exact one is compiled by who has made it
            compile_update(updates[Tier.HOST], torch.device("cpu"), state)

    def executor(self, steps: int) -> Executor:
        """An executor of the next `steps` steps: data and optimizer go on where the last one ended."""
        prediction, drive = self.plan.prediction.record, self.buffers.drive
        self._executor = Executor(
            self.plan.graph,
            self.backend,
            self.handlers.issue,
            steps,
            self.steps_done,
            patience_ns(prediction.step_ns),
            [span.duration_ns for span in prediction.spans],
            None if drive is None else drive.patience,
        )
        return self._executor
