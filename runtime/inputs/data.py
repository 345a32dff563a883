"""Tokens as windows: what a step gets."""

from __future__ import annotations

import mmap
from typing import NamedTuple

import numpy as np
import torch


class MicroBatch(NamedTuple):
    """One micro-batch of a step. All int64, flattened to [micro_batch x seq_len].

    inputs and labels are shifted by one token; `distinct` are the token numbers that occur and
    `positions_in_distinct` says for each input which of them it is.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    distinct: torch.Tensor
    positions_in_distinct: torch.Tensor


class Position(NamedTuple):
    """How far a run has come: steps done, and sequences taken from the data."""

    step: int
    sequences: int


class TokenWindows:
    """A token sequence cut into windows of seq_len + 1, dealt out in a new random order each epoch.

    Which windows a step gets depends on the seed and the number of sequences before it alone. Of tokens that are mapped
    from a file only the windows being read lie in this process's memory.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, global_batch: int, seed: int = 0) -> None:
        self._tokens = tokens
        owner = tokens.base.obj if isinstance(tokens.base, memoryview) else None
        self._mapping = owner if isinstance(owner, mmap.mmap) else None
        self._seq_len = seq_len
        self._global_batch = global_batch
        self._seed = seed
        self.windows = (len(tokens) - 1) // seq_len
        if self.windows < 1:
            raise ValueError(f"the data holds {len(tokens)} tokens, one sequence needs {seq_len + 1}; give more text")
        self._begun = Position(0, 0)
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def begin(self, position: Position) -> None:
        """Go on from here: a run may have taken its sequences in steps of another size until now."""
        self._begun = position

    def sequences(self, step: int) -> int:
        """Sequences taken before a step."""
        return self._begun.sequences + (step - self._begun.step) * self._global_batch

    def micro_batch(self, step: int, micro: int, size: int) -> MicroBatch:
        """Micro-batch `micro` of `size` sequences of a step."""
        first = self.sequences(step) + micro * size
        rows = [self._window(first + index) for index in range(size)]
        block = np.stack(rows).astype(np.int64)
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)  # else pages read once would count as memory of the run
        inputs = np.ascontiguousarray(block[:, :-1]).reshape(-1)
        distinct, inverse = np.unique(inputs, return_inverse=True)
        return MicroBatch(
            inputs=torch.from_numpy(inputs),
            labels=torch.from_numpy(np.ascontiguousarray(block[:, 1:]).reshape(-1)),
            distinct=torch.from_numpy(distinct),
            positions_in_distinct=torch.from_numpy(inverse.reshape(-1)),
        )

    def _window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng((self._seed, epoch)).permutation(self.windows)
        start = int(self._order[place]) * self._seq_len
        return self._tokens[start : start + self._seq_len + 1]
