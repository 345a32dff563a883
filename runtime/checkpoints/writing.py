"""Writes the files of a checkpoint from the slots that hold the state, while training waits no longer than it must."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from runtime.checkpoints.layout import header
from runtime.checkpoints.manifest import StoredFile
from runtime.checkpoints.staging import Aborted, Staging
from runtime.lanes.backend import Backend
from runtime.state import StoredTensor
from runtime.storage.disk import Disk
from runtime.storage.files import FileWriter
from slideplan.graph.lanes import LaneKind
from slideplan.machine.host import usable_cores
from slideplan.saving import BLOCK_BYTES, copiers

# Several files at once: one thread copies and hashes slower than a good drive writes, and a drive wants several requests.
WRITERS = 4


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


class FileWrites:
    """Writes shards into a folder: copied block by block into staging, hashed in order, written by other threads.

    It begins with `start`. `copied` returns as soon as no slot is read any more; the drive may be behind by what staging
    holds. The first error of any thread ends all of them, and is raised by `copied` and by `finish`.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Path,
        shards: Sequence[ShardFile],
        staging: Staging,
        backend: Backend,
        written: Callable[[int], None],
    ) -> None:
        """written: told the bytes of each block that is on its way to the drive, by several threads."""
        self._disk = disk
        self._folder = folder
        self._staging = staging
        self._backend = backend
        self._written = written
        self._waiting = iter(largest_first(shards))
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._files: list[StoredFile] = []
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="checkpoint-writer")
        self._copiers: list[threading.Thread] = []

    def start(self) -> FileWrites:
        """Begin. Whoever has kept this object before can end its threads, whenever an interrupt comes."""
        self._staging.restart()
        for n in range(copiers(usable_cores())):
            copier = threading.Thread(target=self._copy, name=f"checkpoint-copier-{n}", daemon=True)
            copier.start()
            self._copiers.append(copier)
        return self

    def copied(self) -> None:
        """Wait until everything is copied out of the slots. Raises what has gone wrong so far."""
        for copier in self._copiers:
            copier.join()
        if self._error is not None:
            self.finish()

    def finish(self) -> list[StoredFile]:
        """Wait until all files are on the drive; their sizes and hashes, by name. Raises the first error."""
        for copier in self._copiers:
            copier.join()
        self._pool.shutdown()
        if self._error is not None:
            raise self._error
        return sorted(self._files, key=lambda file: file.name)

    def abort(self) -> None:
        """End all threads as soon as may be; what they have written is of no use."""
        self._fail(Aborted())
        for copier in self._copiers:
            copier.join()
        self._pool.shutdown()

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

    def _next(self) -> ShardFile | None:
        with self._lock:  # protects the iterator, which several threads share
            return next(self._waiting, None) if self._error is None else None

    def _copy_file(self, shard: ShardFile) -> None:
        start = header(shard.tensors)
        parts = [torch.from_numpy(np.frombuffer(start, np.uint8).copy())]
        parts += [part.view(torch.uint8) for tensor in shard.tensors for part in tensor.parts]
        file = self._disk.create(self._folder / shard.name, sum(map(len, parts)))
        found, offset, writes = xxhash.xxh3_128(), 0, []
        try:
            for block, size in self._filled(parts):
                content = block.numpy().data[:size]
                found.update(content)
                writes.append(self._pool.submit(self._write, file, block, content, offset))
                offset += size
        except BaseException as error:
            # Before the file is closed: blocks of it that still wait to be written would fail by that.
            self._fail(error)
            file.abandon()
            raise
        self._pool.submit(self._close, file, writes, StoredFile(name=shard.name, size_bytes=offset, xxh128=found.hexdigest()))

    def _filled(self, parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, int]]:
        """Blocks with the bytes of all parts one after the other, all of them full but the last, each with its size."""
        block, filled = self._staging.take(), 0
        for part in parts:
            done = 0
            while done < len(part):
                if filled == BLOCK_BYTES:
                    yield block, filled
                    block, filled = self._staging.take(), 0
                size = min(len(part) - done, BLOCK_BYTES - filled)
                _copy(part[done : done + size], block[filled : filled + size])
                done, filled = done + size, filled + size
        yield block, filled

    def _write(self, file: FileWriter, block: torch.Tensor, content: memoryview, offset: int) -> None:
        try:
            if self._error is None:
                file.write(content, offset)
                self._written(len(content))
        except BaseException as error:
            self._fail(error)
        finally:
            self._staging.give(block)

    def _close(self, file: FileWriter, writes: Sequence[Future[None]], entry: StoredFile) -> None:
        """Make a file safe after its last block. Its writes were submitted before, so this waits for no thread of its own."""
        try:
            for each in writes:
                each.result()
            if self._error is None:
                file.finish()
                with self._lock:  # protects the list, which several threads share
                    self._files.append(entry)
        except BaseException as error:
            self._fail(error)
        finally:
            file.abandon()


def _copy(part: torch.Tensor, into: torch.Tensor) -> None:
    if part.device.type == "cpu":
        # By this thread alone: torch would start threads for each thread that copies.
        np.copyto(into.numpy(), part.numpy())
    else:
        into.copy_(part)
