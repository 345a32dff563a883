"""Micro-batches on the device before the step that reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from runtime.inputs.data import MicroBatch, TokenWindows


class _Sent(NamedTuple):
    step: int
    batch: MicroBatch
    arrived: torch.cuda.Event | None  # None where there was nothing to copy


class TokenUploads:
    """Micro-batches of `size` sequences on their way to a device, on a stream of their own.

    A copy engine serves its queue in order: sent when they are needed, tokens would wait behind all weights that
    are being loaded ahead, and compute with them. So they are sent while the step before still computes.
    """

    def __init__(self, windows: TokenWindows, size: int, device: torch.device) -> None:
        self._windows, self._size, self._device = windows, size, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._sent: dict[int, _Sent] = {}  # by number in the step

    def send(self, step: int, micro: int) -> None:
        """Send a micro-batch on its way; the one of the same number that was sent before is taken already."""
        batch = self._windows.micro_batch(step, micro, self._size)
        if self._stream is None:
            self._sent[micro] = _Sent(step, batch, None)
            return
        with torch.cuda.stream(self._stream):
            # torch's own pinned cache keeps the source alive until the copy is over.
            moved = MicroBatch(*(tensor.pin_memory().to(self._device, non_blocking=True) for tensor in batch))
            self._sent[micro] = _Sent(step, moved, self._stream.record_event())

    def take(self, step: int, micro: int) -> MicroBatch:
        """A micro-batch for what is issued on the current stream from now on. The first step's are sent only now."""
        if micro not in self._sent or self._sent[micro].step != step:
            self.send(step, micro)
        _, batch, arrived = self._sent.pop(micro)
        if arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrived)  # the tokens are there before anything reads them
            for tensor in batch:
                tensor.record_stream(current)  # their memory serves nobody else until it has been read
        return batch
