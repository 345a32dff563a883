"""One handler per operation: compute, copies and updates. Nothing here decides when anything runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from msgspec import UNSET

from runtime.compute.handlers import ComputeHandlers
from runtime.memory.buffers import Buffers, state_elements
from runtime.memory.drive import Drive
from runtime.memory.volume import Move
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.optimizer.moments8 import update_8bit
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import COPIED_AS, Role, Task
from slideplan.lowering.sizes import moment_bytes
from slideplan.placement import Tier
from slideplan.policy import MOMENT_BLOCK, Moments

Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AdamW, int], None]


class Handlers:
    """Runs any task of a graph on its slots, on the lane that calls."""

    def __init__(self, buffers: Buffers, compute: ComputeHandlers, settings: AdamW, host_update: HostUpdate) -> None:
        self._buffers = buffers
        self._compute = compute
        self._settings = settings
        self._update: dict[Tier, Update] = {Tier.HOST: host_update, Tier.GPU: gpu_update(compute.device, host_update)}

    def __call__(self, task: Task, step: int) -> None:
        """Issue one task, and wait for the drive where that does it."""
        move = self.issue(task, step)
        if move is not None:
            move.wait()

    def issue(self, task: Task, step: int) -> Move | None:
        """Issue one task; what goes on where the drive does it."""
        match task.kind:
            case TaskKind.COPY:
                return self._copy(task)
            case TaskKind.UPDATE:
                self.update(task, step, self._settings)
            case _:
                self._compute(task, step)
        return None

    def _copy(self, task: Task) -> Move | None:
        operation, buffers = task.operation, self._buffers
        roles = [COPIED_AS[tensor] for tensor in operation.tensors]
        copies = [(task.slot(role, operation.source), task.slot(role, operation.target)) for role in roles]
        if operation.source is Tier.SSD:
            return self._drive.begin("read", [(source, buffers[target]) for source, target in copies])
        if operation.target is Tier.SSD:
            return self._drive.begin("write", [(target, buffers[source]) for source, target in copies])
        for source, target in copies:
            buffers[target].copy_(buffers[source], non_blocking=True)
        return None

    @property
    def _drive(self) -> Drive:
        assert self._buffers.drive is not None, "a graph with copies from and to the SSD has slots there"
        return self._buffers.drive

    def update(self, task: Task, step: int, settings: AdamW) -> None:
        """Issue an update with these settings."""
        tier = task.operation.target
        weights, remainder, moments, gradient = (
            self._buffers[task.slot(role, tier)] for role in (Role.WEIGHTS, Role.REMAINDER, Role.MOMENTS, Role.GRADIENT)
        )
        if task.chunk is not UNSET:
            each = state_elements(self._buffers.pool(task.slot(Role.MOMENTS, tier)))
            weights, remainder, moments, gradient = _chunk(task.chunk, each, weights, remainder, moments, gradient)
        self._update[tier](weights, remainder, moments, gradient, settings, step)


def _chunk(
    number: int, each: int, weights: torch.Tensor, remainder: torch.Tensor, moments: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A chunk of `each` elements of a unit's weights and gradient, and of its moments what the chunk has: the last one fills
    less than its slot.

    The remainder lies in the chunk's slot too, or stays where it is, whole.
    """
    here = slice(number * each, min((number + 1) * each, weights.numel()))
    n = here.stop - here.start
    remainder = remainder[here] if remainder.numel() == weights.numel() else remainder[:n]
    eight_bit = moments.dtype is torch.uint8
    moments = moments[: moment_bytes(n, "8bit")] if eight_bit else moments.view(-1)[: 2 * n].view(2, n)
    return weights[here], remainder, moments, gradient[here]


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
