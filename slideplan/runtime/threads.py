"""How the cores are divided between lanes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slideplan.runtime.backend import Backend
from slideplan.runtime.machine import usable_cores


@dataclass(frozen=True)
class ThreadBudget:
    """Threads of the host's optimizer and of torch's own operators."""

    optimizer: int
    torch: int

    @classmethod
    def of(cls, backend: Backend) -> ThreadBudget:
        """The division for a backend on this machine.

        With a GPU nearly all cores belong to the optimizer: one is left for the threads that feed the
        streams. Without one, compute and optimizer share them half and half, so that neither lane
        starves the other.
        """
        cores = usable_cores()
        if backend.name == "cuda":
            return cls(optimizer=max(1, cores - 1), torch=cores)
        return cls(optimizer=max(1, cores // 2), torch=max(1, cores - cores // 2))

    def apply(self) -> None:
        """Set torch's part; the optimizer's is set where it runs."""
        torch.set_num_threads(self.torch)
