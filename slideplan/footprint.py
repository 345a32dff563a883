"""What kernels take of the GPU beside slots."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from slideplan.codec import Spec
from slideplan.graph.operations import TaskKind
from slideplan.model import UnitRole


class Footprint(Spec, frozen=True):
    """GPU bytes that depend on kernels, not on the schedule: from the machine profile or estimated.

    inner_bytes:     inner activations that one layer keeps for one micro-batch
    workspace_bytes: taken beside slots, whatever runs
    transient_bytes: taken beside that while a task of this role and kind runs, by `transient_key`
    """

    inner_bytes: int
    workspace_bytes: int
    transient_bytes: dict[str, int] = msgspec.field(default_factory=dict)

    def workspace_beside(self, kept_bytes: Sequence[int]) -> int:
        """What tasks need on the GPU beyond the slots of all inner activations, which not all hold something at once.

        kept_bytes: of each layer, what it keeps of its inner activations, in all micro-batches together; zero
        where it recomputes them. Before a layer's forward and after its backward what it will keep or has
        kept is free for other tasks to work in.
        """
        layer = {
            kind: self.transient_bytes.get(transient_key(UnitRole.LAYER, kind), 0)
            for kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP, TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE)
        }
        embedding = [
            self.transient_bytes.get(transient_key(UnitRole.EMBEDDING, kind), 0)
            for kind in (TaskKind.FORWARD, TaskKind.BACKWARD)
        ]
        held, peak = 0, max(embedding)
        for kept in kept_bytes:
            held += kept
            peak = max(peak, held + layer[TaskKind.FORWARD_KEEP if kept else TaskKind.FORWARD])
        peak = max(peak, held + self.transient_bytes.get(transient_key(UnitRole.HEAD, TaskKind.LOSS), 0))
        total = held
        for kept in reversed(kept_bytes):
            peak = max(peak, held + layer[TaskKind.BACKWARD if kept else TaskKind.BACKWARD_RECOMPUTE])
            held -= kept
        return self.workspace_bytes + peak - total


def transient_key(role: UnitRole, kind: TaskKind) -> str:
    """Name of a role and kind of task in `Footprint.transient_bytes`."""
    return f"{role}/{kind}"
