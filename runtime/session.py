"""A plan with its memory reserved and its weights in place."""

from __future__ import annotations

from runtime.compute.handlers import ComputeHandlers
from runtime.handlers import Handlers, compile_gpu_update, gpu_update
from runtime.inputs.data import TokenWindows
from runtime.inputs.weights import WeightSource
from runtime.lanes.backend import Backend
from runtime.lanes.executor import Executor
from runtime.memory.buffers import DYNAMIC, Buffers
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.state import UnitState
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import SlotPool
from slideplan.plan import Plan
from slideplan.progress import Progress, Show, silent


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
        show: Show = silent,
    ) -> None:
        self.plan = plan
        self.backend = backend
        graph, policy = plan.graph, plan.policy
        total = sum(pool.total_bytes for pool in graph.pools if pool.tensor_class not in DYNAMIC)
        done = 0

        def reserved(pool: SlotPool) -> None:
            nonlocal done
            done += pool.total_bytes
            show(Progress("reserving memory", done, total))

        self.buffers = Buffers(graph, backend, policy.gradient_dtype, progress=reserved)
        for unit in range(plan.model.units):
            state = self.state(unit)
            for piece in source.pieces(unit):
                state.place(piece)
            show(Progress("placing weights", unit + 1, plan.model.units))
        self.compute = ComputeHandlers(
            plan.model,
            graph,
            self.buffers,
            backend.device,
            windows,
            policy,
            plan.workload.seq_len,
        )
        self.handlers = Handlers(self.buffers, self.compute, settings, host_update)
        self._warm_up(host_update)
        self._steps_done = 0
        if policy.kernels == "graphed":
            self.compute.capture(backend, [task for task in graph.tasks if task.lane.kind is LaneKind.COMPUTE])
        # All of the above ran on the default stream, for which no lane waits.
        backend.release_unused()

    def state(self, unit: int) -> UnitState:
        """Master weights and moments of a unit. Nothing may be running."""
        return UnitState(self.plan.graph, self.plan.model, self.buffers, unit)

    def _warm_up(self, host_update: HostUpdate) -> None:
        """Compile the GPU's updates before the clock starts; no slot is touched. Units compile in the first, warm-up, step."""
        if self.plan.graph.queue(LaneKind.GPU_UPDATE) and self.backend.name == "cuda":
            device = self.backend.device
            compile_gpu_update(gpu_update(device, host_update), device, self.plan.policy.gpu_moments)

    def executor(self, steps: int) -> Executor:
        """An executor of the next `steps` steps: data and optimizer go on where the last one ended."""
        first = self._steps_done
        self._steps_done += steps
        return Executor(self.plan.graph, self.backend, self.handlers, steps, first)
