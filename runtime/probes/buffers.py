"""Memory that the probes of copies and updates work in, and the actions on it that they time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch

from runtime.handlers import updates_of
from runtime.lanes.backend import Backend
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.optimizer.rounding import Draws
from runtime.probes.timing import Effort, Work, rate_spread, timed
from slideplan.graph.lanes import LaneKind
from slideplan.lowering.sizes import MOMENT_BYTES, UPDATE_STATE_TRAFFIC_BYTES, moment_bytes, update_bytes
from slideplan.machine.host import available_host_bytes
from slideplan.machine.profile import Spread
from slideplan.placement import Tier
from slideplan.policy import GRADIENT_BYTES, MOMENTS_OF, StateFormat

# Of one update, in the effort's elements: from a head that is a norm alone to a vocabulary.
UPDATE_SIZES = (1 / 4096, 1 / 256, 1 / 32, 0.25, 0.5, 1, 2)
BF16_UPDATE_BYTES = UPDATE_STATE_TRAFFIC_BYTES + GRADIENT_BYTES["bf16"]  # per element
State = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]  # weights, remainder, moments, gradient


class MemoryBuffers:
    """Blocks of both memories as the executor's slots have them, and copies and updates on them."""

    def __init__(self, backend: Backend, effort: Effort) -> None:
        self._backend = backend
        self._effort = effort
        size = effort.largest_copy_bytes
        self._host = {lane: backend.allocate(Tier.HOST, size, copied=True) for lane in (LaneKind.H2D, LaneKind.D2H)}
        self._gpu = {lane: backend.allocate(Tier.GPU, size, copied=True) for lane in (LaneKind.H2D, LaneKind.D2H)}
        # Host memory is not equally fast everywhere, and runs fill most of it.
        elements = round(effort.optimizer_elements * UPDATE_SIZES[-1])
        free = int(effort.host_share * available_host_bytes())
        self._host_states = [self._state(Tier.HOST, elements)]
        more = free // sum(tensor.nbytes for tensor in self._host_states[0] if tensor is not None) - 1
        self._host_states += [self._state(Tier.HOST, elements) for _ in range(more)]

    def _state(self, tier: Tier, elements: int) -> State:
        weights, gradient = (self._backend.allocate(tier, 2 * elements, copied=False).view(torch.bfloat16) for _ in range(2))
        remainder = self._backend.allocate(tier, 2 * elements, copied=False).view(torch.int16)
        moments = self._backend.allocate(tier, MOMENT_BYTES * elements, copied=False).view(torch.float32).view(2, elements)
        return weights, remainder, moments, gradient

    def copy(self, lane: LaneKind, size: int) -> Work:
        """A copy of this many bytes on a copy lane."""
        source, destination = (self._host, self._gpu) if lane is LaneKind.H2D else (self._gpu, self._host)
        # On a CPU backend a copy returns when it is done; on streams it is queued like the executor's.
        return size, lambda: destination[lane][:size].copy_(source[lane][:size], non_blocking=True)

    def host_update(self, threads: int, elements: int) -> Work:
        """An exact update of this many elements by this many threads: of every block in turn."""
        return self._work(Tier.HOST, "exact", threads, self._host_states, elements)

    def device_update(self, threads: int) -> Work:
        """An exact update of the effort's elements on the device; where that is a CPU, by this many threads."""
        return self.update(Tier.GPU, "exact", threads)

    def update(self, tier: Tier, state: StateFormat, threads: int) -> Work:
        """An update of the effort's elements by the processor of a tier."""
        elements = self._effort.optimizer_elements
        states = self._host_states if tier is Tier.HOST else [self._state(Tier.GPU, elements)]
        return self._work(tier, state, threads, states, elements)

    def _work(self, tier: Tier, state: StateFormat, threads: int, states: list[State], elements: int) -> Work:
        update = updates_of(state, self._backend.device, HostUpdate(threads))[tier]
        kept = [_as(state, each, elements) for each in states]
        return update_bytes(elements, "split", state, "bf16"), self._update(update, kept, elements)

    @staticmethod
    def _update(update: Callable[..., None], states: list[State], elements: int) -> Callable[[], object]:
        turns = cycle(states)

        def act() -> None:
            weights, remainder, moments, gradient = next(turns)
            low = None if remainder is None else remainder[:elements]
            update(weights[:elements], low, moments, gradient[:elements], AdamW(), 0, Draws(0))

        return act

    def copies(self) -> dict[LaneKind, Work]:
        """Copies of the largest size, both ways."""
        return {lane: self.copy(lane, self._effort.largest_copy_bytes) for lane in (LaneKind.H2D, LaneKind.D2H)}

    def work(self, threads: int) -> dict[LaneKind, Work]:
        """Copies of the largest size and updates of the effort's elements, as `together` takes them."""
        return self.copies() | {
            LaneKind.HOST_UPDATE: self.host_update(threads, self._effort.optimizer_elements),
            LaneKind.GPU_UPDATE: self.device_update(threads),
        }

    def device_bytes_per_s(self) -> Spread:
        """Copy within device memory, read + write."""
        source, destination = self._gpu[LaneKind.H2D], self._gpu[LaneKind.D2H]
        durations = timed(self._backend, LaneKind.COMPUTE, lambda: destination.copy_(source), self._effort.repeats)
        return rate_spread(2 * source.nbytes, durations)


def _as(state: StateFormat, exact: State, elements: int) -> State:
    """So many elements of a format, in the memory of exact state."""
    weights, remainder, moments, gradient = exact
    content = moments.view(-1).view(torch.uint8)[: moment_bytes(elements, MOMENTS_OF[state])]
    if state == "lean":
        return weights, None, content, gradient
    dtype = torch.float32 if state == "exact" else torch.bfloat16
    return weights, remainder, content.view(dtype).view(2, elements), gradient
