"""One handler per operation: compute, copies and updates. Nothing here decides when anything runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from msgspec import UNSET

from runtime.compute.handlers import ComputeHandlers
from runtime.memory.buffers import Buffers
from runtime.memory.drive import Drive
from runtime.memory.volume import Move
from runtime.optimizer.adamw import ALONE_ELEMENTS, AdamW, HostUpdate
from runtime.optimizer.host_lossy import LossyHostUpdate, blank_state
from runtime.optimizer.rounding import Draws
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import COPIED_AS, Role, Task
from slideplan.lowering.sizes import moment_bytes
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.policy import MOMENT_BLOCK, StateFormat, passage

ExactUpdate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, AdamW, int], None]
# Of weights, remainder (of lean state: None), moments and gradient, with settings, step and where random bits come from.
Update = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, AdamW, int, Draws], None]


class Handlers:
    """Runs any task of a graph on its slots, on the lane that calls."""

    def __init__(
        self,
        plan: Plan,
        buffers: Buffers,
        compute: ComputeHandlers,
        settings: AdamW,
        host_update: HostUpdate,
        seed: int,
    ) -> None:
        """seed: of random rounding, where the plan's state is lossy."""
        self._buffers = buffers
        self._compute = compute
        self._settings = settings
        self._seed = seed
        self._update = updates_of(plan.policy.state, compute.device, host_update)
        self._chunk_elements = {tier: passage(plan.policy, tier).chunk_elements(plan.model) for tier in (Tier.GPU, Tier.HOST)}

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
            _copy_common(buffers[source], buffers[target])
        return None

    @property
    def _drive(self) -> Drive:
        assert self._buffers.drive is not None, "a graph with copies from and to the SSD has slots there"
        return self._buffers.drive

    def update(self, task: Task, step: int, settings: AdamW) -> None:
        """Issue an update with these settings."""
        tier = task.operation.target
        weights, moments, gradient = (
            self._buffers[task.slot(role, tier)] for role in (Role.WEIGHTS, Role.MOMENTS, Role.GRADIENT)
        )
        remainder = self._buffers[task.slot(Role.REMAINDER, tier)] if task.has(Role.REMAINDER) else None
        first = 0
        weights = weights[: gradient.numel()]  # a slot of whole pages ends with some that are none
        if task.chunk is not UNSET:
            first = task.chunk * self._chunk_elements[tier]
            weights, remainder, moments, gradient = _chunk(
                first, self._chunk_elements[tier], weights, remainder, moments, gradient
            )
        draws = Draws.of(self._seed, step, task.unit, first)
        self._update[tier](weights, remainder, moments, gradient, settings, step, draws)


def _copy_common(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy a slot. Where one of the two is of whole pages for the drive's sake, the other is as large as what they hold."""
    n = min(source.numel(), target.numel())
    target.view(-1)[:n].copy_(source.view(-1)[:n], non_blocking=True)


def _chunk(
    first: int, each: int, weights: torch.Tensor, remainder: torch.Tensor | None, moments: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """A chunk of `each` elements of a unit's weights and gradient, or of what is left of them, and of its moments what the
    chunk has: the last one fills less than its slot.

    The remainder lies in the chunk's slot too, or stays where it is, whole.
    """
    here = slice(first, min(first + each, weights.numel()))
    n = here.stop - here.start
    if remainder is not None:
        remainder = remainder[here] if remainder.numel() == weights.numel() else remainder[:n]
    eight_bit = moments.dtype is torch.uint8
    moments = moments[: moment_bytes(n, "8bit")] if eight_bit else moments.view(-1)[: 2 * n].view(2, n)
    return weights[here], remainder, moments, gradient[here]


def _exact(update: ExactUpdate) -> Update:
    """An update that draws nothing."""

    def exact(
        weights: torch.Tensor, remainder: torch.Tensor | None, moments: torch.Tensor, gradient: torch.Tensor,
        settings: AdamW, step: int, draws: Draws,
    ) -> None:  # fmt: skip
        assert remainder is not None, "exact state has one"
        update(weights, remainder, moments, gradient, settings, step)

    return exact


def updates_of(state: StateFormat, device: torch.device, host_update: HostUpdate) -> dict[Tier, Update]:
    """The updates of state in this format, by the tier whose processor makes them."""
    on_host: Update = _exact(host_update) if state == "exact" else LossyHostUpdate(host_update)
    on_gpu = on_host
    if device.type != "cpu" and state == "exact":
        from runtime.kernels.adamw import update_gpu

        on_gpu = _exact(update_gpu)
    elif device.type != "cpu":
        from runtime.kernels.adamw_lossy import update_gpu_lossy

        on_gpu = update_gpu_lossy
    return {Tier.HOST: on_host, Tier.GPU: on_gpu}


def compile_update(update: Update, device: torch.device, state: StateFormat) -> None:
    """Compile an update for both gradient dtypes now, so that no measured task pays for it."""
    for dtype in (torch.bfloat16, torch.float32):
        for n in (MOMENT_BLOCK, MOMENT_BLOCK + ALONE_ELEMENTS):
            update(*blank_state(n, state, device), torch.zeros(n, dtype=dtype, device=device), AdamW(), 0, Draws(0))
