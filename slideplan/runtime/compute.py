"""Handlers of the compute lane: embedding, decoder layers and head on the slots that a task names."""

from __future__ import annotations

import torch

from slideplan.plan.graph import Role, Task, TaskGraph, TaskKind
from slideplan.plan.model import ModelSpec, UnitRole
from slideplan.plan.slots import loss_chunk_tokens
from slideplan.runtime.buffers import Buffers, parameter_views
from slideplan.runtime.data import MicroBatch, TokenWindows
from slideplan.runtime.units import BoundHead, BoundLayer, GradientSink, Kept, rotary_positions, skeleton


class ComputeHandlers:
    """Runs compute tasks, each on the slots in its accesses. Used by one thread: the compute lane's."""

    def __init__(
        self,
        model: ModelSpec,
        graph: TaskGraph,
        buffers: Buffers,
        device: torch.device,
        windows: TokenWindows,
        micro_batch: int,
        micro_batches: int,
        seq_len: int,
    ) -> None:
        self._model = model
        self._buffers = buffers
        self.device = device
        self._windows = windows
        self._shape = (micro_batch, seq_len, model.hidden)
        self._scale = 1.0 / (micro_batch * micro_batches * seq_len)
        self._chunk_tokens = loss_chunk_tokens(model.vocabulary)
        parts = skeleton(model)
        positions = rotary_positions(parts, seq_len, model.hidden, device)
        layer_slots = {
            task.slot(Role.WEIGHTS)
            for task in graph.tasks
            if task.has(Role.WEIGHTS) and model.role(task.unit) is UnitRole.LAYER
        }
        layout = model.parameters(UnitRole.LAYER)
        self._layers = {key: BoundLayer(parts.layer, buffers[key], layout, positions) for key in layer_slots}
        head_slot = next(task.slot(Role.WEIGHTS) for task in graph.tasks if task.kind is TaskKind.LOSS)
        self._head = BoundHead(parts.norm, buffers[head_slot], model.parameters(UnitRole.HEAD))
        self._embedding_sink = GradientSink(model.parameters(UnitRole.EMBEDDING))
        self._kept: dict[tuple[str, int], Kept] = {}
        self._inputs: dict[int, _DeviceBatch] = {}
        self.losses: dict[int, torch.Tensor] = {}
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
            self._run[self._model.role(task.unit), task.kind](task, step)

    # -- embedding -----------------------------------------------------------------------------

    def _embed(self, task: Task, step: int) -> None:
        assert task.micro is not None
        batch = _DeviceBatch.upload(self._windows.micro_batch(step, task.micro, self._shape[0]), self.device)
        self._inputs[task.micro] = batch
        table = parameter_views(self._weights(task), self._model.parameters(UnitRole.EMBEDDING))
        left = self._boundary(task, Role.OUTPUT).view(-1, self._model.hidden)
        torch.index_select(table["model.embed_tokens.weight"], 0, batch.inputs, out=left)

    def _embed_backward(self, task: Task, step: int) -> None:
        """Sum the rows of equal tokens first, then add each distinct token's row to the dense gradient.

        The sum is torch's own embedding backward over the distinct tokens only, which keeps it
        deterministic and its result as small as the batch, not as the vocabulary.
        """
        assert task.micro is not None
        batch = self._inputs.pop(task.micro)
        gradient = self._boundary(task, Role.BOUNDARY_GRADIENT).view(-1, self._model.hidden)
        rows = torch.ops.aten.embedding_dense_backward(gradient, batch.positions_in_distinct, batch.distinct.numel(), -1, False)
        accumulate = self._accumulates(task, Role.GRADIENT)
        flat = self._buffers[task.slot(Role.GRADIENT)]
        table = self._embedding_sink.aim(flat, accumulate)["model.embed_tokens.weight"]
        if not accumulate:
            table.zero_()
        table.index_add_(0, batch.distinct, rows.to(table.dtype))

    # -- layers --------------------------------------------------------------------------------

    def _forward(self, task: Task, step: int) -> None:
        left = self._layer(task).forward(self._boundary(task, Role.INPUT))
        self._boundary(task, Role.OUTPUT).copy_(left)

    def _forward_keep(self, task: Task, step: int) -> None:
        kept = self._layer(task).forward_keep(self._boundary(task, Role.INPUT))
        self._boundary(task, Role.OUTPUT).copy_(kept.left.detach())
        # Backward starts from the graph behind `left`, not from its values: the boundary slot has those.
        kept.left.untyped_storage().resize_(0)
        self._kept[task.slot(Role.INNER)] = kept

    def _backward(self, task: Task, step: int) -> None:
        kept = self._kept.pop(task.slot(Role.INNER))
        gradient = self._boundary(task, Role.BOUNDARY_GRADIENT)
        self._aim(kept.layer.sink, task)
        gradient.copy_(kept.layer.backward(kept, self._weights(task), gradient))

    def _backward_recompute(self, task: Task, step: int) -> None:
        layer = self._layer(task)
        gradient = self._boundary(task, Role.BOUNDARY_GRADIENT)
        self._aim(layer.sink, task)
        with torch.enable_grad():
            entered = self._boundary(task, Role.INPUT).detach().requires_grad_()
            left = layer.forward(entered)
        torch.autograd.backward(left, gradient)
        assert entered.grad is not None
        gradient.copy_(entered.grad)

    # -- head ----------------------------------------------------------------------------------

    def _loss(self, task: Task, step: int) -> None:
        assert task.micro is not None
        own = self._aim(self._head.sink, task)
        if task.has(Role.TIED_WEIGHTS):
            table = self._model.parameters(UnitRole.EMBEDDING)
            projection = parameter_views(self._buffers[task.slot(Role.TIED_WEIGHTS)], table)["model.embed_tokens.weight"]
            accumulate = self._accumulates(task, Role.TIED_GRADIENT)
            tied = self._embedding_sink.aim(self._buffers[task.slot(Role.TIED_GRADIENT)], accumulate)
            projection_gradient = tied["model.embed_tokens.weight"]
        else:
            projection = self._head.views["lm_head.weight"]
            accumulate = self._accumulates(task, Role.GRADIENT)
            projection_gradient = own["lm_head.weight"]
        loss, gradient = self._head.loss(
            self._boundary(task, Role.INPUT).view(-1, self._model.hidden),
            self._inputs[task.micro].labels,
            projection,
            projection_gradient,
            accumulate,
            self._scale,
            self._chunk_tokens,
        )
        self._boundary(task, Role.BOUNDARY_GRADIENT).copy_(gradient.view(self._shape))
        self.losses[step] = self.losses[step] + loss if step in self.losses else loss

    # -- slots ---------------------------------------------------------------------------------

    def _weights(self, task: Task) -> torch.Tensor:
        return self._buffers[task.slot(Role.WEIGHTS)]

    def _layer(self, task: Task) -> BoundLayer:
        return self._layers[task.slot(Role.WEIGHTS)]

    def _boundary(self, task: Task, role: Role) -> torch.Tensor:
        return self._buffers[task.slot(role)].view(self._shape)

    def _aim(self, sink: GradientSink, task: Task) -> dict[str, torch.Tensor]:
        return sink.aim(self._buffers[task.slot(Role.GRADIENT)], self._accumulates(task, Role.GRADIENT))

    @staticmethod
    def _accumulates(task: Task, role: Role) -> bool:
        return any(access.role is role and access.mode == "rw" for access in task.accesses)


class _DeviceBatch(MicroBatch):
    """A micro-batch on the device."""

    @classmethod
    def upload(cls, batch: MicroBatch, device: torch.device) -> _DeviceBatch:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cpu":
                return tensor
            # torch's own pinned cache keeps the source alive until the copy is over.
            return tensor.pin_memory().to(device, non_blocking=True)

        return cls(move(batch.inputs), move(batch.labels), move(batch.distinct), move(batch.positions_in_distinct))
