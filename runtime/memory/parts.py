"""Pieces of a unit's state by their bytes, wherever they lie."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch


class Part(Protocol):
    """Some bytes of state."""

    nbytes: int

    def read(self, first: int, into: torch.Tensor) -> None:
        """Copy bytes from the one at `first` on into host memory, uint8, as many as it has."""

    def write(self, first: int, values: torch.Tensor) -> None:
        """Replace bytes from the one at `first` on by these, uint8, wherever they lie."""


class MemoryPart:
    """A tensor in one piece, on the host or the device."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.nbytes = tensor.nbytes
        self._bytes = tensor.view(-1).view(torch.uint8)

    def read(self, first: int, into: torch.Tensor) -> None:
        here = self._bytes[first : first + len(into)]
        if here.device.type == "cpu":
            # By this thread alone: torch would start threads for each thread that copies.
            np.copyto(into.numpy(), here.numpy())
        else:
            into.copy_(here)

    def write(self, first: int, values: torch.Tensor) -> None:
        self._bytes[first : first + len(values)].copy_(values)
