"""One handler per task kind: compute, copies and updates. Nothing here decides when anything runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from msgspec import UNSET

from runtime.compute.handlers import ComputeHandlers
from runtime.memory.buffers import Buffers
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.optimizer.moments8 import update_8bit
from slideplan.graph.tasks import Role, Task, TaskKind
from slideplan.lowering.pools import moment_bytes
from slideplan.policy import MOMENT_BLOCK, Moments

Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AdamW, int], None]

# Sources and destinations of each copy.
COPIES = {
    TaskKind.LOAD_WEIGHTS: [(Role.HOST_WEIGHTS, Role.WEIGHTS)],
    TaskKind.OFFLOAD_GRADIENT: [(Role.GRADIENT, Role.HOST_GRADIENT)],
    TaskKind.OFFLOAD_BOUNDARY: [(Role.INPUT, Role.HOST_BOUNDARY)],
    TaskKind.FETCH_BOUNDARY: [(Role.HOST_BOUNDARY, Role.INPUT)],
    TaskKind.OFFLOAD_INNER: [(Role.FEED_FORWARD, Role.HOST_FEED_FORWARD)],
    TaskKind.FETCH_INNER: [(Role.HOST_FEED_FORWARD, Role.FEED_FORWARD)],
    TaskKind.LOAD_STATE: [(Role.HOST_REMAINDER, Role.REMAINDER), (Role.HOST_MOMENTS, Role.MOMENTS)],
    TaskKind.OFFLOAD_STATE: [(Role.REMAINDER, Role.HOST_REMAINDER), (Role.MOMENTS, Role.HOST_MOMENTS)],
}
# Gradient and bf16 weights of each update.
UPDATES = {
    TaskKind.UPDATE_HOST: (Role.HOST_GRADIENT, Role.HOST_WEIGHTS),
    TaskKind.UPDATE_GPU: (Role.GRADIENT, Role.WEIGHTS),
    TaskKind.UPDATE_PASSING: (Role.GRADIENT, Role.WEIGHTS),
}


class Handlers:
    """Runs any task of a graph on its slots, on the lane that calls."""

    def __init__(self, buffers: Buffers, compute: ComputeHandlers, settings: AdamW, host_update: HostUpdate) -> None:
        self._buffers = buffers
        self._compute = compute
        self._settings = settings
        on_gpu = gpu_update(compute.device, host_update)
        self._update: dict[TaskKind, Update] = {
            TaskKind.UPDATE_HOST: host_update,
            TaskKind.UPDATE_GPU: on_gpu,
            TaskKind.UPDATE_PASSING: on_gpu,
        }

    def __call__(self, task: Task, step: int) -> None:
        """Issue one task."""
        if task.kind in UPDATES:
            self.update(task, step, self._settings)
        elif task.kind in COPIES:
            for source, destination in COPIES[task.kind]:
                self._buffers[task.slot(destination)].copy_(self._buffers[task.slot(source)], non_blocking=True)
        else:
            self._compute(task, step)

    def update(self, task: Task, step: int, settings: AdamW) -> None:
        """Issue an update with these settings."""
        gradient, weights = (self._buffers[task.slot(role)] for role in UPDATES[task.kind])
        remainder, moments = (self._buffers[task.slot(role)] for role in (Role.REMAINDER, Role.MOMENTS))
        if task.chunk is not UNSET:
            gradient, weights, remainder, moments = _chunk(task.chunk, gradient, weights, remainder, moments)
        self._update[task.kind](weights, remainder, moments, gradient, settings, step)


def _chunk(
    number: int, gradient: torch.Tensor, weights: torch.Tensor, remainder: torch.Tensor, moments: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk of a unit's gradient and weights, and of its state what the chunk has: the last one fills less than its slot."""
    first = number * remainder.numel()
    gradient, weights = (whole[first : first + remainder.numel()] for whole in (gradient, weights))
    n = weights.numel()
    if moments.dtype is torch.uint8:
        return gradient, weights, remainder[:n], moments[: moment_bytes(n, "8bit")]
    return gradient, weights, remainder[:n], moments.view(-1)[: 2 * n].view(2, n)


def gpu_update(device: torch.device, host_update: HostUpdate) -> Update:
    """The update of units whose state is on the device, by how it keeps moments: Triton kernels, none on a CPU device."""
    exact: Update = host_update
    lossy: Update = update_8bit
    if device.type != "cpu":
        from runtime.kernels.adamw import update_gpu
        from runtime.kernels.adamw8 import update_gpu_8bit

        exact, lossy = update_gpu, update_gpu_8bit

    def update(
        weights: torch.Tensor, remainder: torch.Tensor, moments: torch.Tensor, gradient: torch.Tensor, how: AdamW, step: int
    ) -> None:
        (lossy if moments.dtype is torch.uint8 else exact)(weights, remainder, moments, gradient, how, step)

    return update


def compile_gpu_update(update: Update, device: torch.device, moments: Moments) -> None:
    """Compile the device's update for both gradient dtypes now, so that no measured task pays for it."""
    n = MOMENT_BLOCK
    weights, remainder = (torch.zeros(n, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.int16))
    state = torch.zeros(moment_bytes(n, moments), dtype=torch.uint8, device=device)
    if moments == "fp32":
        state = state.view(torch.float32).view(2, n)
    for dtype in (torch.bfloat16, torch.float32):
        update(weights, remainder, state, torch.zeros(n, dtype=dtype, device=device), AdamW(), 0)
