"""Handlers of the compute lane: embedding, decoder layers and head on the slots that a task names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from runtime.compute.eager import EagerHead, EagerLayer, rotary_positions, skeleton
from runtime.compute.fused_layer import FusedLayer
from runtime.compute.gradients import GradientSink, GradientSlot, Projection
from runtime.compute.head import FusedHead, Head
from runtime.compute.operators import square_sum
from runtime.compute.uploads import TokenUploads
from runtime.inputs.data import MicroBatch, TokenWindows
from runtime.lanes.backend import Backend, Fetched
from runtime.memory.buffers import Buffers, parameter_views
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import COMPUTE_KINDS, TaskKind
from slideplan.graph.tasks import Role, Task, TaskGraph
from slideplan.lowering.sizes import loss_chunk_tokens
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import ComputePolicy, Kernels

VOCABULARY = "model.embed_tokens.weight"


class LayerKernels(Protocol):
    """A decoder layer bound to a weight slot. Activations and gradients are [batch, sequence, hidden]."""

    def forward(self, entered: torch.Tensor, left: torch.Tensor) -> None:
        """Output of the layer into `left`."""

    def forward_keep(self, entered: torch.Tensor, left: torch.Tensor, wide: torch.Tensor | None) -> Any:
        """Forward; what it returns is for `backward` of a layer bound to the slot that then holds the weights.

        wide: slot for what waits elsewhere until then, [2, tokens, ffn]; None where all is kept.
        """

    def backward(
        self, kept: Any, entered: torch.Tensor, gradient: torch.Tensor, into: GradientSlot, wide: torch.Tensor | None
    ) -> None:
        """Backward of a kept forward. `gradient`: of the output, replaced by that of the input. `wide`: what waited."""

    def backward_recompute(self, entered: torch.Tensor, gradient: torch.Tensor, into: GradientSlot) -> None:
        """Backward from the input alone. `gradient`: of the output, replaced by that of the input."""


class ComputeHandlers:
    """Runs compute tasks, each on the slots in its accesses. Used by one thread: the compute lane's."""

    def __init__(
        self,
        model: ModelSpec,
        graph: TaskGraph,
        buffers: Buffers,
        backend: Backend,
        windows: TokenWindows,
        knobs: ComputePolicy,
        seq_len: int,
    ) -> None:
        self._model = model
        self._buffers = buffers
        self._backend = backend
        self.device = device = backend.device
        micro_batch, micro_batches = knobs.micro_batch, knobs.micro_batches
        self._uploads = TokenUploads(windows, micro_batch, device)
        self._shape = (micro_batch, seq_len, model.hidden)
        self._scale = 1.0 / (micro_batch * micro_batches * seq_len)
        self._layers: dict[tuple[str, int], LayerKernels]
        self._head: Head
        self._layers, self._head = _bind(model, graph, buffers, seq_len, knobs.kernels, device)
        self._embedding_sink = GradientSink(model.parameters(UnitRole.EMBEDDING))
        self._kept: dict[tuple[str, int], Any] = {}
        self._batches: dict[int, MicroBatch] = {}
        tokens = micro_batch * seq_len
        # At one address for the whole run, as captured tasks need them; per micro-batch.
        self._labels = torch.zeros(micro_batches, tokens, dtype=torch.int64, device=device)
        self._loss_sum = torch.zeros(micro_batches, dtype=torch.float32, device=device)
        self._replay: dict[str, Callable[[], None]] = {}
        self._losses: dict[int, torch.Tensor] = {}
        self._last = graph.tasks[graph.queue(LaneKind.COMPUTE)[-1]].name
        # Of each step: its loss, and where it is measured the norm of all gradients.
        self.results: dict[int, Fetched] = {}
        self._run = {
            (UnitRole.EMBEDDING, TaskKind.FORWARD): self._embed,
            (UnitRole.EMBEDDING, TaskKind.BACKWARD): self._embed_backward,
            (UnitRole.LAYER, TaskKind.FORWARD): self._forward,
            (UnitRole.LAYER, TaskKind.FORWARD_KEEP): self._forward_keep,
            (UnitRole.LAYER, TaskKind.BACKWARD): self._backward,
            (UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE): self._backward_recompute,
            (UnitRole.HEAD, TaskKind.LOSS): self._loss,
        }

    def __call__(self, task: Task, step: int) -> None:
        """Issue one compute task on the current stream."""
        with torch.no_grad():
            if task.name in self._replay:
                self._replay[task.name]()
            else:
                self._issue(task, step)
            if task.kind is TaskKind.LOSS:
                assert task.micro is not None
                loss = self._loss_sum[task.micro].clone()
                self._losses[step] = self._losses[step] + loss if step in self._losses else loss
                # Here, where the device has work for longer than the host needs to deal out tokens.
                self._uploads.send(step + 1, task.micro)
            if task.name == self._last:
                self.results[step] = self._backend.fetch(torch.stack(self._numbers(task, step)), LaneKind.COMPUTE)

    def _numbers(self, task: Task, step: int) -> list[torch.Tensor]:
        """What the step computed, told after its last task."""
        loss = self._losses.pop(step)
        return [loss, self._buffers[task.slot(Role.NORM)].sum().sqrt()] if task.has(Role.NORM) else [loss]

    def _issue(self, task: Task, step: int) -> None:
        self._run[self._model.role(task.unit), task.kind](task, step)
        if task.has(Role.NORM):
            square_sum(self._buffers[task.slot(Role.GRADIENT)], self._buffers[task.slot(Role.NORM)][task.unit])

    def capture(self, backend: Backend, tasks: Iterable[Task]) -> None:
        """Capture the layers' and the head's tasks of one step, in this order; slots that they write lose what they held.

        One unit of each sort runs once before, so that nothing is compiled or loaded during capture.
        """
        with torch.no_grad():
            captured = [task for task in tasks if self._model.role(task.unit) is not UnitRole.EMBEDDING]
            # What filled the slots ran on the default stream; the memory that it worked in serves no other.
            backend.release_unused()
            with backend.lane(LaneKind.COMPUTE):
                for task in one_of_each_sort(captured):
                    self._issue(task, 0)
            backend.release_unused()
            replays = backend.capture(LaneKind.COMPUTE, [partial(self._issue, task, 0) for task in captured])
            self._replay = {task.name: replay for task, replay in zip(captured, replays, strict=True)}

    # -- embedding -----------------------------------------------------------------------------

    def _embed(self, task: Task, step: int) -> None:
        assert task.micro is not None
        batch = self._uploads.take(step, task.micro)
        self._batches[task.micro] = batch
        self._labels[task.micro].copy_(batch.labels)
        left = self._boundary(task, Role.OUTPUT).view(-1, self._model.hidden)
        torch.index_select(self._vocabulary(task, Role.WEIGHTS), 0, batch.inputs, out=left)

    def _embed_backward(self, task: Task, step: int) -> None:
        """Sum the rows of equal tokens first, then add each distinct token's row to the dense gradient.

        The sum is torch's own embedding backward over the distinct tokens only, which keeps it
        deterministic and its result as small as the batch, not as the vocabulary.
        """
        assert task.micro is not None
        batch = self._batches.pop(task.micro)
        gradient = self._boundary(task, Role.BOUNDARY_GRADIENT).view(-1, self._model.hidden)
        rows = torch.ops.aten.embedding_dense_backward(gradient, batch.positions_in_distinct, batch.distinct.numel(), -1, False)
        slot = self._gradient(task, Role.GRADIENT)
        self._embedding_sink.aim(slot)
        table = self._embedding_sink.view(VOCABULARY)
        if not slot.accumulate:
            table.zero_()
        table.index_add_(0, batch.distinct, rows.to(table.dtype))

    # -- layers --------------------------------------------------------------------------------

    def _forward(self, task: Task, step: int) -> None:
        self._layer(task).forward(self._boundary(task, Role.INPUT), self._boundary(task, Role.OUTPUT))

    def _forward_keep(self, task: Task, step: int) -> None:
        entered, left = self._boundary(task, Role.INPUT), self._boundary(task, Role.OUTPUT)
        kept = self._layer(task).forward_keep(entered, left, self._wide(task))
        self._kept[task.slot(Role.INNER)] = kept

    def _backward(self, task: Task, step: int) -> None:
        kept = self._kept.pop(task.slot(Role.INNER))
        entered, gradient = self._boundary(task, Role.INPUT), self._boundary(task, Role.BOUNDARY_GRADIENT)
        self._layer(task).backward(kept, entered, gradient, self._gradient(task, Role.GRADIENT), self._wide(task))

    def _backward_recompute(self, task: Task, step: int) -> None:
        entered, gradient = self._boundary(task, Role.INPUT), self._boundary(task, Role.BOUNDARY_GRADIENT)
        self._layer(task).backward_recompute(entered, gradient, self._gradient(task, Role.GRADIENT))

    # -- head ----------------------------------------------------------------------------------

    def _loss(self, task: Task, step: int) -> None:
        assert task.micro is not None
        tied = None
        if task.has(Role.TIED_WEIGHTS):
            slot = self._gradient(task, Role.TIED_GRADIENT)
            self._embedding_sink.aim(slot)
            tied = Projection(self._vocabulary(task, Role.TIED_WEIGHTS), self._embedding_sink.view(VOCABULARY), slot.accumulate)
        self._loss_sum[task.micro] = self._head.loss(
            self._boundary(task, Role.INPUT).view(-1, self._model.hidden),
            self._labels[task.micro],
            tied,
            self._gradient(task, Role.GRADIENT),
            self._boundary(task, Role.BOUNDARY_GRADIENT).view(-1, self._model.hidden),
            self._scale,
        )

    # -- slots ---------------------------------------------------------------------------------

    def _vocabulary(self, task: Task, role: Role) -> torch.Tensor:
        """The embedding's matrix, [vocabulary, hidden]."""
        return parameter_views(self._buffers[task.slot(role)], self._model.parameters(UnitRole.EMBEDDING))[VOCABULARY]

    def _layer(self, task: Task) -> LayerKernels:
        return self._layers[task.slot(Role.WEIGHTS)]

    def _boundary(self, task: Task, role: Role) -> torch.Tensor:
        return self._buffers[task.slot(role)].view(self._shape)

    def _wide(self, task: Task) -> torch.Tensor | None:
        if not task.has(Role.FEED_FORWARD):
            return None
        return self._buffers[task.slot(Role.FEED_FORWARD)].view(2, -1, self._model.ffn)

    def _gradient(self, task: Task, role: Role) -> GradientSlot:
        return GradientSlot(self._buffers[task.slot(role)], task.builds_on(role))


def _bind(
    model: ModelSpec, graph: TaskGraph, buffers: Buffers, seq_len: int, kernels: Kernels, device: torch.device
) -> tuple[dict[tuple[str, int], LayerKernels], Head]:
    """A layer for every weight slot that layers use, and the head on its own slot."""
    parts = skeleton(model)
    positions = rotary_positions(parts, seq_len, model.hidden, device)
    chunk_tokens = loss_chunk_tokens(model.vocabulary, kernels)
    slots = {
        task.slot(Role.WEIGHTS)
        for task in graph.tasks
        if task.kind in COMPUTE_KINDS and task.has(Role.WEIGHTS) and model.role(task.unit) is UnitRole.LAYER
    }
    head_flat = buffers[next(task.slot(Role.WEIGHTS) for task in graph.tasks if task.kind is TaskKind.LOSS)]
    if kernels != "eager":
        cos, sin = (table[0] for table in positions)
        return {key: FusedLayer(model, buffers[key], cos, sin) for key in slots}, FusedHead(model, head_flat, chunk_tokens)
    layout, own = (model.parameters(role) for role in (UnitRole.LAYER, UnitRole.HEAD))
    layers = {key: EagerLayer(parts.layer, buffers[key], layout, positions) for key in slots}
    return dict(layers), EagerHead(parts.norm, head_flat, own, chunk_tokens)


def one_of_each_sort(tasks: Sequence[Task]) -> list[Task]:
    """Tasks of one unit of each sort, in their order. Units are of one sort if their tasks are alike but for unit and slots."""
    sorts: dict[int, list[tuple[object, ...]]] = {}
    for task in tasks:
        used = [(access.role, access.mode) for access in task.accesses]
        sorts.setdefault(task.unit, []).append((task.kind, task.micro, *used))
    first: dict[tuple[tuple[object, ...], ...], int] = {}
    for unit, sort in sorts.items():
        first.setdefault(tuple(sort), unit)
    chosen = set(first.values())
    return [task for task in tasks if task.unit in chosen]
