"""Writes the files of a checkpoint from the slots that hold the state, while training waits no longer than it must."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from runtime.checkpoints.layout import header
from runtime.checkpoints.manifest import StoredFile
from runtime.checkpoints.staging import Aborted, Staging
from runtime.lanes.backend import Backend
from runtime.lanes.clock import RunError
from runtime.lanes.helpers import ended, helpers
from runtime.memory.parts import MemoryPart, Part
from runtime.state import StoredTensor
from runtime.storage.disk import Disk
from runtime.storage.files import FileWriter
from slideplan.graph.lanes import LaneKind
from slideplan.machine.host import usable_cores
from slideplan.saving import BLOCK_BYTES, copiers

# Several files at once: one thread copies and hashes slower than a good drive writes, and a drive wants several requests.
WRITERS = 4
# Bits of a bf16 number that is not finite: all of the exponent. With the sign's bit and without, such numbers are the
# largest of all, read as integers: two passes that make nothing new find them, at the speed of memory.
NOT_FINITE, NOT_FINITE_BELOW_ZERO = 0x7F80, 0xFF80


class NotFiniteError(RunError):
    """Weights that are to be written are infinite or NaN. Names the first tensor of them that was found."""


class ShardFile(NamedTuple):
    """A safetensors file to be written: its name and its tensors, in the order in which they will lie in it."""

    name: str
    tensors: Sequence[StoredTensor]

    @property
    def size_bytes(self) -> int:
        return len(header(self.tensors)) + sum(part.nbytes for tensor in self.tensors for part in tensor.parts)


def largest_first(shards: Sequence[ShardFile]) -> list[ShardFile]:
    """The order in which threads are through with all of them soonest: one thread has a file to itself."""
    return sorted(shards, key=lambda shard: -shard.size_bytes)


@dataclass(eq=False)
class _Begun:
    """A file that is being written.

    left: how many of its blocks are to be written still, and one as long as more may follow
    entry: what it is; None until all of it is copied
    """

    writer: FileWriter
    left: int = 1
    entry: StoredFile | None = None


class FileWrites:
    """Writes shards into a folder: copied block by block into staging, hashed in order, written by other threads.

    It begins with `start`. `copied` returns as soon as no slot is read any more; the drive may be behind by what staging
    holds. The first error of any thread ends all of them, and is raised by `copied` and by `finish`.

    `copied` and `finish` wait as long as the drive takes.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        shards: Sequence[ShardFile],
        staging: Staging,
        backend: Backend,
        written: Callable[[int], None],
        copied: Callable[[StoredTensor, torch.Tensor], None],
    ) -> None:
        """By several threads are told, and may raise what ends all of them:

        written: the bytes of each block that is on its way to the drive
        copied: each piece of a tensor that lies in a block, as bytes on the host
        """
        self._disk = disk
        self._folder = folder
        self._staging = staging
        self._backend = backend
        self._written = written
        self._look = copied
        self._waiting = iter(largest_first(shards))
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._files: list[StoredFile] = []
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # for writers; None: there are no more
        self._copiers = helpers("checkpoint-copier", copiers(usable_cores()), self._copy)
        self._writers = helpers("checkpoint-writer", WRITERS, self._work)

    def start(self) -> FileWrites:
        """Begin. Whoever has kept this object before can end its threads, whenever an interrupt comes."""
        self._staging.restart()
        for thread in (*self._writers, *self._copiers):
            thread.start()
        return self

    def copied(self) -> None:
        """Wait until everything is copied out of the slots. Raises what has gone wrong so far."""
        for copier in self._copiers:
            copier.wait()
        if self._error is not None:
            self.finish()

    def finish(self) -> list[StoredFile]:
        """Wait until all files are on the drive; their sizes and hashes, by name. Raises the first error."""
        for copier in self._copiers:
            copier.wait()
        self._dismiss()
        for writer in self._writers:
            writer.wait()
        if self._error is not None:
            raise self._error
        return sorted(self._files, key=lambda file: file.name)

    def abort(self, by_ns: int) -> bool:
        """Let all threads end; what they have written is of no use. Whether they have by then: the drive may hold one up."""
        self._fail(Aborted())
        if not ended(self._copiers, by_ns):  # writers have to close the files that these have open
            return False
        self._dismiss()
        return ended(self._writers, by_ns)

    def _dismiss(self) -> None:
        for _ in self._writers:
            self._jobs.put(None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:  # protects the first error from those that follow from it
            if self._error is None:
                self._error = error
        self._staging.abort()

    def _copy(self) -> None:
        try:
            # Copies from the device run on its stream for copies out: nothing else does meanwhile.
            with self._backend.lane(LaneKind.D2H):
                while (shard := self._next()) is not None:
                    self._copy_file(shard)
        except Aborted:
            pass
        except BaseException as error:
            self._fail(error)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _next(self) -> ShardFile | None:
        with self._lock:  # protects the iterator, which several threads share
            return next(self._waiting, None) if self._error is None else None

    def _copy_file(self, shard: ShardFile) -> None:
        start = MemoryPart(torch.from_numpy(np.frombuffer(header(shard.tensors), np.uint8).copy()))
        parts: list[tuple[StoredTensor | None, Part]] = [(None, start)]
        parts += [(tensor, part) for tensor in shard.tensors for part in tensor.parts]
        file = _Begun(self._disk.create(self._folder / shard.name, sum(part.nbytes for _, part in parts)))
        found, offset = xxhash.xxh3_128(), 0
        try:
            for block, size in self._filled(parts):
                content = block.numpy().data[:size]
                found.update(content)
                with self._lock:  # protects the count, which the writers lower
                    file.left += 1
                self._jobs.put(partial(self._write, file, block, content, offset))
                offset += size
            file.entry = StoredFile(name=shard.name, size_bytes=offset, xxh128=found.hexdigest())
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._jobs.put(partial(self._part_over, file))

    def _filled(self, parts: Sequence[tuple[StoredTensor | None, Part]]) -> Iterator[tuple[torch.Tensor, int]]:
        """Blocks with the bytes of all parts one after the other, all of them full but the last, each with its size.

        A part goes with the tensor that it is of; None: it is no tensor's.
        """
        block, filled = self._staging.take(), 0
        for tensor, part in parts:
            done = 0
            while done < part.nbytes:
                if filled == BLOCK_BYTES:
                    yield block, filled
                    block, filled = self._staging.take(), 0
                size = min(part.nbytes - done, BLOCK_BYTES - filled)
                piece = block[filled : filled + size]
                part.read(done, piece)
                if tensor is not None:
                    self._look(tensor, piece)
                done, filled = done + size, filled + size
        yield block, filled

    def _write(self, file: _Begun, block: torch.Tensor, content: memoryview, offset: int) -> None:
        try:
            if self._error is None:
                file.writer.write(content, offset)
                self._written(len(content))
        except BaseException as error:
            self._fail(error)
        finally:
            self._staging.give(block)
            self._part_over(file)

    def _part_over(self, file: _Begun) -> None:
        """Nothing is to be done any more for one of those that `left` counts. After the last one the file is made safe."""
        with self._lock:  # protects the count, so that one thread alone finds it at zero
            file.left -= 1
            if file.left:
                return
        try:
            if self._error is None and file.entry is not None:
                file.writer.finish()
                with self._lock:  # protects the list, which several threads share
                    self._files.append(file.entry)
        except BaseException as error:
            self._fail(error)
        finally:
            file.writer.abandon()


def require_finite(tensor: StoredTensor, piece: torch.Tensor) -> None:
    """Raise NotFiniteError where a piece of a tensor, as bytes on the host, holds weights in bf16 that are not finite."""
    if tensor.dtype == "BF16" and not _finite(piece):
        raise NotFiniteError(f"weights of {tensor.name} are not finite")


def _finite(weights: torch.Tensor) -> bool:
    """Whether bf16 numbers, given as bytes on the host, are all finite."""
    bits = weights.numpy()
    return bool(bits.view(np.int16).max() < NOT_FINITE and bits.view(np.uint16).max() < NOT_FINITE_BELOW_ZERO)
