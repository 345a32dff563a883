"""How the cores are divided between lanes."""

from __future__ import annotations

import torch

from runtime.lanes.backend import Backend
from slideplan.machine.host import usable_cores


def optimizer_share(cores: int) -> int:
    """Threads of the host's optimizer where compute runs on the same cores: half of them, so that neither starves the other."""
    return max(1, cores // 2)


def set_compute_threads(backend: Backend) -> None:
    """Give torch's own operators their cores: all where a GPU computes, or else those that the optimizer leaves."""
    cores = usable_cores()
    torch.set_num_threads(cores if backend.name == "cuda" else max(1, cores - optimizer_share(cores)))
