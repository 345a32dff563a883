"""The manifest of a checkpoint: what it holds, what it was made by, and how to go on from it."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path

import msgspec
import xxhash

from runtime.checkpoints.layout import MANIFEST
from runtime.optimizer.adamw import AdamW
from runtime.storage.disk import Disk
from slideplan import __version__
from slideplan.codec import FORMAT_VERSION, Document, Spec, parsed

# Of a file that is not there, of one that has become shorter, and of a folder in a file's place.
_LOST = (errno.ENOENT, errno.ENODATA, errno.EISDIR)


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
    ssd:    absolute paths of the folders for state on drives, one on each; none where none was named
    """

    steps: int
    data: str | None
    byte_tokens: bool
    document_end: str
    seed: int
    settings: AdamW
    saving: Saving
    ssd: tuple[str, ...] = ()


class RunDocument(Document, frozen=True, tag="run"):
    """`run.json`: what the last command asked for. A manifest says what was asked for when it was written."""

    run: RunRecord


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
        return msgspec.structs.replace(self, own_digest=_digest(msgspec.json.encode(self, order="deterministic")))


class _Writer(msgspec.Struct):
    """What manifests of all versions say of who wrote them."""

    own_digest: str
    version: str
    format_version: int


class DamagedError(Exception):
    """A checkpoint whose content is not what was written: which file of it, and how it differs."""


def read_error(path: Path, error: OSError) -> Exception:
    """What to raise where a file of a checkpoint cannot be read.

    DamagedError where a part of it is lost. ValueError where nothing of it is there any more: somebody has renamed or removed
    it since it was found. Else the error itself: it may pass, and the file may be whole.
    """
    if error.errno == errno.ENOENT and not path.parent.exists():
        return ValueError(f"{path.parent}: was renamed or removed while it was read; give the command again")
    return DamagedError(f"{path}: {error.strerror}") if error.errno in _LOST else error


def read_manifest(folder: Path, disk: Disk | None = None) -> Manifest:
    """The manifest of a checkpoint whose files are all there in their sizes.

    Raises DamagedError where that is not so; ValueError where another version wrote it, in a way that this one cannot read;
    OSError where it cannot be read now.
    """
    path = folder / MANIFEST
    try:
        content = (disk or Disk()).read(path)
    except OSError as error:
        if error.errno == errno.ENOENT and folder.exists():
            raise DamagedError(f"{folder}: has no {MANIFEST}: it was not written to its end") from None
        raise read_error(path, error) from None
    found = _manifest(content, path)
    for file in found.files:
        try:
            size = (folder / file.name).stat().st_size
        except OSError as error:
            raise read_error(folder / file.name, error) from None
        if size != file.size_bytes:
            raise DamagedError(f"{folder / file.name}: has {size} bytes, {file.size_bytes} were written")
    return found


def _manifest(content: bytes, path: Path) -> Manifest:
    # Whether it is whole comes first, and asks for no version: a damaged one may say that it is of any.
    try:
        writer = msgspec.json.decode(content, type=_Writer)
        whole = writer.own_digest == _digest(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedError(f"{path}: is no manifest: {error}") from None
    if not whole:
        raise DamagedError(f"{path}: was changed since it was written")
    try:
        return parsed(content, path, Manifest)
    except ValueError as error:
        if (writer.version, writer.format_version) == (__version__, FORMAT_VERSION):
            raise DamagedError(str(error)) from None
        raise ValueError(
            f"{path}: was written by slideplan {writer.version} (format {writer.format_version}), which this one, "
            f"{__version__} (format {FORMAT_VERSION}), cannot read; use slideplan {writer.version}"
        ) from None


def _digest(content: bytes) -> str:
    """Of all fields of a manifest but this one, in their order in the file: the same in every version."""
    fields = msgspec.json.decode(content) | {"own_digest": ""}
    return hashlib.sha256(msgspec.json.encode(fields)).hexdigest()[:16]


def content_hash(content: bytes) -> str:
    """As in `StoredFile`."""
    return xxhash.xxh3_128_hexdigest(content)
