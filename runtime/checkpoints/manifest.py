"""The manifest of a checkpoint: what it holds, what it was made by, and how to go on from it."""

from __future__ import annotations

from pathlib import Path

import msgspec
import xxhash

from runtime.checkpoints.layout import MANIFEST
from runtime.optimizer.adamw import AdamW
from slideplan.codec import Document, Spec, digest, load


class Saving(Spec, frozen=True):
    """When a run saves. Zero: never, of `every` and `weights_every` alike; the state after the last step is always saved.

    keep: checkpoints that stay; of weights alone all do
    """

    every: int = 0
    weights_every: int = 0
    keep: int = 2

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("weights_every", 0), ("keep", 1)):
            if getattr(self, name) < least:
                option = {"every": "--save-every", "weights_every": "--save-weights-every", "keep": "--keep"}[name]
                raise ValueError(f"{option} is {getattr(self, name)}, must be at least {least}")


class RunRecord(Spec, frozen=True):
    """What a run was asked to do: with a checkpoint and a plan enough to go on.

    data:   absolute path; None: the default text
    """

    steps: int
    data: str | None
    byte_tokens: bool
    document_end: str
    seed: int
    settings: AdamW
    saving: Saving


class StoredFile(Spec, frozen=True):
    """A file of a checkpoint, with the hash of its content (XXH3, 128 bits, in hex: `xxh128sum`)."""

    name: str
    size_bytes: int
    xxh128: str


class Manifest(Document, frozen=True, tag="checkpoint"):
    """What is written last into a checkpoint.

    step:       steps done
    sequences:  taken from the data so far
    optimizer:  whether remainder and moments are there
    files:      all others
    own_digest: of all other fields
    """

    version: str
    step: int
    sequences: int
    seq_len: int
    optimizer: bool
    run: RunRecord
    model_name: str
    model_digest: str
    plan_digest: str
    data_digest: str
    date: str
    versions: dict[str, str]
    files: tuple[StoredFile, ...]
    own_digest: str = ""

    def __post_init__(self) -> None:
        for name in ("step", "sequences", "seq_len"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be zero or more")
        for file in self.files:
            if Path(file.name).name != file.name or file.name in (".", ".."):
                raise ValueError(f"files: {file.name!r} is no file of this folder")

    def sealed(self) -> Manifest:
        """The same with its digest."""
        return msgspec.structs.replace(self, own_digest=self._digest())

    @property
    def whole(self) -> bool:
        """Whether it is as it was sealed."""
        return self.own_digest == self._digest()

    def _digest(self) -> str:
        return digest(msgspec.structs.replace(self, own_digest=""))


class DamagedError(Exception):
    """A checkpoint that cannot be used: which file of it, and why."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint whose files are all there in their sizes. Raises DamagedError."""
    path = folder / MANIFEST
    if not path.is_file():
        raise DamagedError(f"{folder}: has no {MANIFEST}: it was not written to its end")
    try:
        found = load(path, Manifest)
    except ValueError as error:
        raise DamagedError(str(error)) from None
    if not found.whole:
        raise DamagedError(f"{path}: was changed since it was written")
    for file in found.files:
        try:
            size = (folder / file.name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{folder / file.name}: {error.strerror}") from None
        if size != file.size_bytes:
            raise DamagedError(f"{folder / file.name}: has {size} bytes, {file.size_bytes} were written")
    return found


def content_hash(content: bytes) -> str:
    """As in `StoredFile`."""
    return xxhash.xxh3_128_hexdigest(content)
