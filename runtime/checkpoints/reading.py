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
from runtime.state import CODES, MOMENTS, REMAINDER, SCALES, StoredTensor
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
    """Fill the tensors of these shards from a checkpoint's files; how many units' state had to change its format.

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
        self.changed = 0  # units whose state had another format
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
        """Fill the tensors of one file; whether its state had another format. Raises DamagedError and OSError."""
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
        if REMAINDER in other:  # of lean state: its weights are all there is
            _clear(other[REMAINDER])
        for moment, name in enumerate(MOMENTS):
            if name in other:
                _convert(_Moment(path, described, moment), other[name])
            elif name + CODES in other:
                _compress(_Moment(path, described, moment), moment, other[name + CODES], other[name + SCALES])
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
    """Where a file's bytes go, by place in the file; and tensors that the file has in another format, by name.

    Raises ValueError where tensors are missing or have another shape.
    """
    targets: list[Target] = []
    other: dict[str, StoredTensor] = {}
    for tensor in wanted:
        entry = described.get(tensor.name)
        same = entry is not None and (entry.dtype, entry.shape) == (tensor.dtype, tensor.shape)
        if not same and _has_other(described, tensor):
            other[tensor.name] = tensor
            continue
        if entry is None or not same:
            raise ValueError(f"holds no tensor {tensor.name} of {tensor.dtype} {list(tensor.shape)}")
        first = entry.first_byte
        for part in tensor.parts:
            targets.append(Target(first, first + part.nbytes, part))
            first += part.nbytes
    return sorted(targets, key=lambda target: target.first_byte), other


def _has_other(described: dict[str, Entry], tensor: StoredTensor) -> bool:
    """Whether a file has what this tensor holds in another format, whole: a moment; or of lean state nothing of a remainder."""
    name, codes = tensor.name.split(".")[0], [described.get(moment + CODES) for moment in MOMENTS]
    if name == REMAINDER:
        return REMAINDER not in described and all(each is not None and each.shape == tensor.shape for each in codes)
    if name not in MOMENTS:
        return False
    entry = described.get(name)
    if entry is not None:  # of scales, the number is that of blocks
        blocks = tuple(-(-size // MOMENT_BLOCK) for size in entry.shape)
        return entry.dtype in ("F32", "BF16") and tensor.shape in (entry.shape, blocks)
    return {name + CODES, name + SCALES} <= described.keys() and described[name + CODES].shape == tensor.shape


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
    return torch.from_numpy(content).view(_TORCH[entry.dtype])


_TORCH = {"U8": torch.uint8, "BF16": torch.bfloat16, "F32": torch.float32}


class _Moment:
    """A moment of a file, in whatever format it has there, by elements."""

    def __init__(self, path: Path, described: dict[str, Entry], moment: int) -> None:
        name = MOMENTS[moment]
        self._moment = moment
        self._codes = name not in described
        names = (name + CODES, name + SCALES) if self._codes else (name,)
        self._tensors = [_mapped(path, described[each]) for each in names]

    def values(self, first: int, end: int) -> torch.Tensor:
        """fp32, of these elements."""
        if not self._codes:
            return self._tensors[0][first:end].float()
        codes, scales = self._tensors
        block = first // MOMENT_BLOCK  # in which the piece begins
        found = expand(codes[block * MOMENT_BLOCK : end], scales[block : -(-end // MOMENT_BLOCK)], self._moment)
        return found[first - block * MOMENT_BLOCK :]


def _convert(source: _Moment, target: StoredTensor) -> None:
    """Write a moment as fp32 or bf16, rounded to the nearest."""
    dtype, done = _TORCH[target.dtype], 0
    for part in target.parts:
        start, last = done, done + part.nbytes // dtype.itemsize
        while done < last:
            end = min(done + PIECE_ELEMENTS, last)
            part.write(dtype.itemsize * (done - start), source.values(done, end).to(dtype).view(torch.uint8))
            done = end


def _compress(source: _Moment, moment: int, codes: StoredTensor, scales: StoredTensor) -> None:
    """Write a moment in 8 bits, each rounded to the nearest."""
    done = 0
    for into, their in zip(codes.parts, scales.parts, strict=True):
        for first in range(0, into.nbytes, PIECE_ELEMENTS):
            found = compress(source.values(done, done + min(PIECE_ELEMENTS, into.nbytes - first)), moment)
            into.write(first, found[0])
            their.write(first // MOMENT_BLOCK * 4, found[1].view(torch.uint8))
            done += len(found[0])


def _clear(target: StoredTensor) -> None:
    """Write zeros, a piece at a time."""
    zeros = torch.zeros(PIECE_ELEMENTS, dtype=torch.uint8)
    for part in target.parts:
        for first in range(0, part.nbytes, PIECE_ELEMENTS):
            part.write(first, zeros[: min(PIECE_ELEMENTS, part.nbytes - first)])
