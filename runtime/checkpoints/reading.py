"""Reads a checkpoint into the slots of a plan, and finds out on the way whether it is whole."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from runtime.checkpoints.layout import Entry, entries, header_bytes
from runtime.checkpoints.manifest import DamagedError, Manifest, StoredFile, content_hash, read_error
from runtime.checkpoints.staging import Aborted, Staging
from runtime.checkpoints.writing import ShardFile
from runtime.lanes.backend import Backend
from runtime.lanes.helpers import ended, grace_ends_ns, helpers
from runtime.memory.parts import Part
from runtime.optimizer.moments8 import compress, expand
from runtime.state import CODES, MOMENTS, SCALES, StoredTensor
from runtime.storage.disk import Disk
from runtime.storage.files import FileReader
from slideplan.graph.lanes import LaneKind
from slideplan.policy import MOMENT_BLOCK
from slideplan.saving import BLOCK_BYTES

READERS = 4
PIECE_ELEMENTS = 1024 * MOMENT_BLOCK  # of moments that change their format


class Target(NamedTuple):
    """Bytes of a file, from the first up to the last exclusive, and where they go."""

    first_byte: int
    last_byte: int
    into: Part


def read_shards(
    disk: Disk,
    folder: Path,
    manifest: Manifest,
    shards: Sequence[ShardFile],
    staging: Staging,
    backend: Backend,
    done: Callable[[int], None],
) -> int:
    """Fill the tensors of these shards from a checkpoint's files; how many units' moments had to change their format.

    Whole files have been compared with the manifest's hashes when this returns, whatever of them is wanted. Raises
    DamagedError naming the file, or OSError where one cannot be read now; tensors may have been filled with anything then.
    """
    staging.restart()
    reader = _Reader(disk, folder, {file.name: file for file in manifest.files}, shards, staging, backend, done)
    threads = helpers("checkpoint-reader", READERS, reader.run)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.wait()
    except BaseException:  # an interrupt
        reader.stop()
        ended(threads, grace_ends_ns())
        raise
    if reader.error is not None:
        raise reader.error
    return reader.changed


def read_small_files(disk: Disk, folder: Path, manifest: Manifest) -> dict[str, bytes]:
    """Content by name of all files but those of tensors.

    Raises DamagedError where one is not as the manifest says, OSError where it cannot be read now.
    """
    found = {}
    for file in manifest.files:
        path = folder / file.name
        if path.suffix == ".safetensors":
            continue
        try:
            found[file.name] = disk.read(path)
        except OSError as error:
            raise read_error(path, error) from None
        if content_hash(found[file.name]) != file.xxh128:
            raise DamagedError(f"{path}: was changed since it was written")
    return found


class _Reader:
    def __init__(
        self,
        disk: Disk,
        folder: Path,
        stored: dict[str, StoredFile],
        shards: Sequence[ShardFile],
        staging: Staging,
        backend: Backend,
        done: Callable[[int], None],
    ) -> None:
        self.error: BaseException | None = None  # the first one
        self.changed = 0  # units whose moments had another format
        self._disk = disk
        self._folder = folder
        self._stored = stored
        self._staging = staging
        self._backend = backend
        self._done = done
        self._waiting = iter(shards)
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def stop(self) -> None:
        """All threads end at their next block."""
        self._failed.set()

    def run(self) -> None:
        """Fill the tensors of one file after the other, beside other threads that do so, until there is none left."""
        try:
            while (shard := self._next()) is not None:
                changed = self._read(shard)
                with self._lock:  # protects the count, which several threads raise
                    self.changed += changed
        except Aborted:  # what another thread has met says why
            pass
        except BaseException as error:
            with self._lock:  # protects the first error from those that follow from it
                self.error = self.error or error
            self.stop()

    def _next(self) -> ShardFile | None:
        with self._lock:  # protects the iterator, which several threads share
            return None if self._failed.is_set() else next(self._waiting, None)

    def _read(self, shard: ShardFile) -> bool:
        """Fill the tensors of one file; whether its moments had another format. Raises DamagedError and OSError."""
        path = self._folder / shard.name
        if shard.name not in self._stored:
            raise DamagedError(f"{path}: is not in the manifest")
        try:
            with self._backend.lane(LaneKind.H2D), self._disk.open(path) as file:
                return self._read_file(file, path, shard)
        except OSError as error:
            raise read_error(path, error) from None
        except ValueError as error:
            raise DamagedError(f"{path}: {error}") from None

    def _read_file(self, file: FileReader, path: Path, shard: ShardFile) -> bool:
        found = xxhash.xxh3_128()
        targets: list[Target] | None = None
        other: dict[str, StoredTensor] = {}
        described: dict[str, Entry] = {}
        for offset, block in self._blocks(file):
            content = block.numpy().data
            found.update(content)
            if targets is None:  # the first block holds the header, whole
                first = bytes(content[: header_bytes(bytes(content[:8]))])
                described = entries(first, file.size_bytes)
                targets, other = _targets(described, shard.tensors)
            _spread(block, offset, targets)
            self._done(len(block))
        if found.hexdigest() != self._stored[shard.name].xxh128:
            raise DamagedError(f"{path}: its content is not what was written (XXH3 differs)")
        for moment, name in enumerate(MOMENTS):
            if name in other:
                _expand(path, described, name, moment, other[name])
            elif name + CODES in other:
                _compress(path, described[name], moment, other[name + CODES], other[name + SCALES])
        return bool(other)

    def _blocks(self, file: FileReader) -> Iterator[tuple[int, torch.Tensor]]:
        """All blocks of a file in order, each with its offset; valid until the next is asked for."""
        block = self._staging.take()
        try:
            for offset in range(0, file.size_bytes, BLOCK_BYTES):
                if self._failed.is_set():
                    raise Aborted
                part = block[: min(BLOCK_BYTES, file.size_bytes - offset)]
                file.read(part.numpy().data, offset)
                yield offset, part
        finally:
            self._staging.give(block)


def _targets(described: dict[str, Entry], wanted: Sequence[StoredTensor]) -> tuple[list[Target], dict[str, StoredTensor]]:
    """Where a file's bytes go, by place in the file; and tensors of moments that the file has in another format, by name.

    Raises ValueError where tensors are missing or have another shape.
    """
    targets: list[Target] = []
    other: dict[str, StoredTensor] = {}
    for tensor in wanted:
        entry = described.get(tensor.name)
        if entry is None and _has_moment(described, tensor.name.split(".")[0]):
            other[tensor.name] = tensor
            continue
        if entry is None or (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise ValueError(f"holds no tensor {tensor.name} of {tensor.dtype} {list(tensor.shape)}")
        first = entry.first_byte
        for part in tensor.parts:
            targets.append(Target(first, first + part.nbytes, part))
            first += part.nbytes
    return sorted(targets, key=lambda target: target.first_byte), other


def _has_moment(described: dict[str, Entry], moment: str) -> bool:
    """Whether a moment is there in one format or the other, whole."""
    return moment in MOMENTS and (moment in described or {moment + CODES, moment + SCALES} <= described.keys())


def _spread(block: torch.Tensor, offset: int, targets: Sequence[Target]) -> None:
    """Copy what a block of a file holds of each target."""
    end = offset + len(block)
    for target in targets:
        first, last = max(offset, target.first_byte), min(end, target.last_byte)
        if first < last:
            target.into.write(first - target.first_byte, block[first - offset : last - offset])


def _mapped(path: Path, entry: Entry) -> torch.Tensor:
    """A tensor of a file, flat, mapped from there: a unit's moments in one piece would need gigabytes beside the slots."""
    content = np.memmap(path, np.uint8, "c", entry.first_byte, entry.size_bytes)
    return torch.from_numpy(content).view(torch.uint8 if entry.dtype == "U8" else torch.float32)


def _expand(path: Path, described: dict[str, Entry], name: str, moment: int, target: StoredTensor) -> None:
    """Moments of 8 bits as fp32."""
    codes, scales = _mapped(path, described[name + CODES]), _mapped(path, described[name + SCALES])
    done = 0
    for part in target.parts:
        start, last = done, done + part.nbytes // 4
        while done < last:
            # From the block on in which the piece begins.
            block, end = done // MOMENT_BLOCK, min(done + PIECE_ELEMENTS, last)
            first = block * MOMENT_BLOCK
            values = expand(codes[first:end], scales[block : -(-end // MOMENT_BLOCK)], moment)
            part.write(4 * (done - start), values[done - first :].view(torch.uint8))
            done = end


def _compress(path: Path, entry: Entry, moment: int, codes: StoredTensor, scales: StoredTensor) -> None:
    """fp32 moments in 8 bits, each rounded to the nearest."""
    values, done = _mapped(path, entry), 0
    for into, their in zip(codes.parts, scales.parts, strict=True):
        for first in range(0, into.nbytes, PIECE_ELEMENTS):
            found = compress(values[done : done + min(PIECE_ELEMENTS, into.nbytes - first)], moment)
            into.write(first, found[0])
            their.write(first // MOMENT_BLOCK * 4, found[1].view(torch.uint8))
            done += len(found[0])
