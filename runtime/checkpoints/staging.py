"""Blocks of host memory between slots and files: a ring, reserved once."""

from __future__ import annotations

import threading

import torch

from runtime.lanes.backend import Backend
from slideplan.placement import Tier
from slideplan.saving import BLOCK_BYTES, LEAST_STAGING_BYTES


class Aborted(Exception):  # noqa: N818 - control flow, not an error
    """Whoever waits for a block must end: something else has failed."""


class Staging:
    """Page-aligned blocks of BLOCK_BYTES; `page_locked` where the device copies into them."""

    def __init__(self, backend: Backend, size_bytes: int, page_locked: bool) -> None:
        self.blocks = max(LEAST_STAGING_BYTES, size_bytes) // BLOCK_BYTES
        arena = backend.allocate(Tier.HOST, self.size_bytes, page_locked)
        self._all = list(arena.view(self.blocks, BLOCK_BYTES))
        self._free = list(self._all)
        self._changed = threading.Condition()
        self._aborted = False

    @property
    def size_bytes(self) -> int:
        return self.blocks * BLOCK_BYTES

    def take(self) -> torch.Tensor:
        """A free block, uint8 [BLOCK_BYTES], as soon as there is one. Raises Aborted."""
        with self._changed:  # protects the list of free blocks
            self._changed.wait_for(lambda: self._free or self._aborted)
            if self._aborted:
                raise Aborted
            return self._free.pop()

    def give(self, block: torch.Tensor) -> None:
        """Put a block back."""
        with self._changed:
            self._free.append(block)
            self._changed.notify()

    def abort(self) -> None:
        """Nobody gets a block until `restart`; who waits for one is woken."""
        with self._changed:
            self._aborted = True
            self._changed.notify_all()

    def restart(self) -> None:
        """All blocks are free again. Whoever had some must have ended."""
        with self._changed:
            self._free = list(self._all)
            self._aborted = False
