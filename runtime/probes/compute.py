"""Probes of compute: units of a model through the runtime's own handlers, and rates for those not measured."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import msgspec
import numpy as np
import torch

from runtime.compute.fused_layer import attend
from runtime.compute.handlers import ComputeHandlers
from runtime.inputs.data import TokenWindows
from runtime.inputs.weights import RandomWeights
from runtime.lanes.backend import Backend, Marker
from runtime.memory.buffers import Buffers, parameter_views
from runtime.probes.timing import Effort, Work, rate_spread, spread, timed
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import Role
from slideplan.lowering.lower import lower
from slideplan.machine.profile import ComputeCost, Curve, Efficiency, LaunchCost, LayerShape, RatePoint, Spread
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Placement, Tier
from slideplan.policy import GradientDtype, Kernels, Policy, Workload

# Of short units as many that the head, which draws the most power, has about the share of a step that it has in models;
# long ones settle at the clock of their own.
LAYERS, STEP_TOKENS = 8, 1 << 15
MICRO_BATCHES = 2  # the first writes gradients, the second adds to them
CAPTURES = 10  # of a step of the probe, so that the driver's memory grows by more than its granularity
STEPPING_NS = 1_000_000_000  # fewer repeats rather than longer


class UnitProbe:
    """Some layers of a model with embedding and head: the last one keeps its activations, the others recompute."""

    def __init__(
        self,
        backend: Backend,
        model: ModelSpec,
        micro_batch: int,
        seq_len: int,
        kernels: Kernels = "fused",
        gradient_dtype: GradientDtype = "bf16",
    ) -> None:
        self._backend = backend
        self._micro_batch, self._seq_len = micro_batch, seq_len
        self._kernels, self._gradient_dtype = kernels, gradient_dtype
        layers = max(2, min(LAYERS, STEP_TOKENS // (micro_batch * seq_len)))
        self._model = msgspec.structs.replace(model, layers=layers)
        units = [Placement() for _ in range(layers + 2)]
        units[layers] = Placement(inner=Tier.GPU, feed_forward=Tier.GPU)
        policy = Policy(
            micro_batch=micro_batch,
            micro_batches=MICRO_BATCHES,
            window=2,
            prefetch_depth=1,
            gradient_slots=1,
            host_gradient_slots=1,
            boundary_slots=0,
            inner_slots=0,
            state_slots=0,
            state_chunks=0,
            gradient_dtype=gradient_dtype,
            kernels=kernels,
            state="exact",
            gradient_norms=False,
            update_order=tuple(reversed(range(layers + 2))),
            units=tuple(units),
        )
        workload = Workload(seq_len=seq_len, global_batch=MICRO_BATCHES * micro_batch)
        # Inner activations and workspace are what this probe measures; nothing is reserved for them.
        self._graph = lower(self._model, policy, workload, Footprint(inner_bytes=1, workspace_bytes=1))
        self._tasks = [task for task in self._graph.tasks if task.lane.kind is LaneKind.COMPUTE]
        buffers = Buffers(self._graph, backend, gradient_dtype, wanted=lambda pool: pool.tier is Tier.GPU)
        self._initialise(buffers)
        tokens = np.random.default_rng(0).integers(0, model.vocabulary, 4 * MICRO_BATCHES * micro_batch * seq_len + 1)
        windows = TokenWindows(tokens.astype(np.uint32), seq_len, MICRO_BATCHES * micro_batch)
        self._handlers = ComputeHandlers(self._model, self._graph, buffers, backend, windows, policy, seq_len)
        self._steps = 0  # issued so far: tokens are sent ahead, step by step
        backend.synchronize()  # the slots were filled on the default stream, for which no lane waits

    def _initialise(self, buffers: Buffers) -> None:
        """Weights as training starts with them: how fast products are depends on their operands, through the GPU's power."""
        weights = RandomWeights(self._model, 0, self._backend.device)
        for task in (task for task in self._tasks if task.has(Role.WEIGHTS)):
            views = parameter_views(buffers[task.slot(Role.WEIGHTS)], self._model.parameters(self._model.role(task.unit)))
            for name, rows, values in weights.pieces(task.unit):
                views[name][rows].copy_(values)

    def costs(self, repeats: int) -> list[ComputeCost]:
        """Every compute task kind of this model at this shape, and with both ways of writing gradients."""
        saved, workspace = self._memory()
        if self._kernels == "graphed":
            self._handlers.capture(self._backend, self._tasks)
        marks: list[list[tuple[Marker, Marker]]] = []
        with self._backend.lane(LaneKind.COMPUTE):
            self._backend.wait(self._step()[-1][1])
            before = time.perf_counter_ns()
            self._backend.wait(self._step()[-1][1])
            repeats = max(min(repeats, 3), min(repeats, STEPPING_NS // (time.perf_counter_ns() - before)))
            for _ in range(repeats):
                marks.append(self._step())
            self._backend.wait(marks[-1][-1][1])
            anchor = self._backend.anchor()
        # Layers and micro-batches that do the same share a figure; what they need is the most that any did.
        alike: dict[tuple[UnitRole, TaskKind, bool], list[int]] = {}
        for number, task in enumerate(self._tasks):
            alike.setdefault((self._model.role(task.unit), task.kind, task.accumulates), []).append(number)
        return [
            ComputeCost(
                shape=LayerShape.of(self._model, role),
                kind=kind,
                micro_batch=self._micro_batch,
                seq_len=self._seq_len,
                duration_ns=spread(
                    [
                        self._backend.elapsed_ns(anchor, step[number][1]) - self._backend.elapsed_ns(anchor, step[number][0])
                        for step in marks
                        for number in numbers
                    ]
                ),
                saved_bytes=_most(saved[number] for number in numbers),
                workspace_bytes=_most(workspace[number] for number in numbers),
                kernels=self._kernels,
                gradient_dtype=self._gradient_dtype,
                accumulate=accumulate,
            )
            for (role, kind, accumulate), numbers in alike.items()
        ]

    def _step(self) -> list[tuple[Marker, Marker]]:
        marks = []
        for task in self._tasks:
            start = self._backend.mark(LaneKind.COMPUTE)
            self._handlers(task, self._steps)
            marks.append((start, self._backend.mark(LaneKind.COMPUTE)))
        self._steps += 1
        return marks

    def launches(self, repeats: int) -> list[LaunchCost]:
        """Host time to issue each compute task; nothing on a CPU, whose handlers return when all is done.

        A step is issued in one go to an idle stream, as the executor does: no full queue holds the host
        up, and it is as warm as in a run.
        """
        if self._backend.name == "cpu":
            return []
        taken: dict[tuple[TaskKind, UnitRole], list[int]] = {}
        with self._backend.lane(LaneKind.COMPUTE):
            for _ in range(repeats):
                self._backend.wait(self._backend.mark(LaneKind.COMPUTE))
                for task in self._tasks:
                    started = time.perf_counter_ns()
                    self._handlers(task, self._steps)
                    key = task.kind, self._model.role(task.unit)
                    taken.setdefault(key, []).append(time.perf_counter_ns() - started)
                self._steps += 1
        return [
            LaunchCost(kind=kind, lane=LaneKind.COMPUTE, role=role, duration_ns=spread(values), kernels=self._kernels)
            for (kind, role), values in taken.items()
        ]

    def capture_bytes(self) -> int:
        """Device memory that the driver takes for one captured task, beside what its tensors take."""
        layers = [task for task in self._tasks if self._model.role(task.unit) is UnitRole.LAYER]
        with self._backend.lane(LaneKind.COMPUTE):
            self._backend.wait(self._step()[-1][1])
        before = self._backend.outside_bytes()
        captured = self._backend.capture(LaneKind.COMPUTE, [partial(self._handlers, task, 0) for task in layers * CAPTURES])
        return max(0, self._backend.outside_bytes() - before) // max(1, len(captured))

    def work(self) -> Work:
        """Forward of one layer, FLOPs and action: its input stays, so it can run again and again."""
        with self._backend.lane(LaneKind.COMPUTE):
            self._backend.wait(self._step()[-1][1])
        forward = next(task for task in self._tasks if task.kind is TaskKind.FORWARD and task.unit > 0)
        return forward.flops, lambda: self._handlers(forward, 0)

    def _memory(self) -> tuple[list[int | None], list[int | None]]:
        """For each task, bytes that it leaves behind and its peak beyond them; None without a GPU to ask."""
        if self._backend.name == "cpu":
            return [None] * len(self._tasks), [None] * len(self._tasks)
        saved: list[int | None] = []
        workspace: list[int | None] = []
        with self._backend.lane(LaneKind.COMPUTE):
            self._step()  # lazily made library handles and caches are no task's workspace
            for task in self._tasks:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                self._handlers(task, self._steps)
                torch.cuda.synchronize()
                left = max(0, torch.cuda.memory_allocated() - before) if task.kind is TaskKind.FORWARD_KEEP else 0
                saved.append(left)
                workspace.append(max(0, torch.cuda.max_memory_allocated() - before - left))
            self._steps += 1
        return saved, workspace


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)


def efficiency(backend: Backend, effort: Effort) -> tuple[Efficiency, dict[str, Spread]]:
    """Matrix products over sizes, causal attention, and element-wise passes, in bf16; with spreads of the last two."""
    device = backend.device
    sides = [128, 256, 512, 1024] if backend.name == "cpu" else [256, 512, 1024, 2048, 4096, 8192]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float32).bfloat16()

    points = []
    for side in sides:
        a, b = random(side, side), random(side, side)
        out = torch.empty_like(a)
        durations = timed(backend, LaneKind.COMPUTE, partial(torch.mm, a, b, out=out), effort.repeats)
        points.append(RatePoint(size=2 * side**3, rate=rate_spread(2 * side**3, durations)))
    batch, heads, seq_len, width = (1, 4, 256, 64) if backend.name == "cpu" else (8, 32, 2048, 128)
    query, key, value = (random(batch, heads, seq_len, width) for _ in range(3))

    flops = 2 * batch * seq_len * (seq_len + 1) * heads * width
    attention = rate_spread(flops, timed(backend, LaneKind.COMPUTE, partial(attend, query, key, value), effort.repeats))
    side = 1024 if backend.name == "cpu" else 8192
    left, right = random(side, side), random(side, side)
    out = torch.empty_like(left)
    passes = timed(backend, LaneKind.COMPUTE, lambda: torch.mul(left, right, out=out), effort.repeats)
    elementwise = rate_spread(3 * left.nbytes, passes)
    rates = Efficiency(
        gemm=Curve(points=tuple(points)), attention_flops_per_s=attention.p50, elementwise_bytes_per_s=elementwise.p50
    )
    return rates, {"efficiency.attention_flops_per_s": attention, "efficiency.elementwise_bytes_per_s": elementwise}
