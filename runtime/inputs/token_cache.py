"""Prepared tokens on disk: one NumPy file for each content, tokenizer and set of options, and a record beside it."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from slideplan.codec import Document, load, save
from slideplan.progress import Progress, Show

BLOCK_BYTES = 8 << 20


class TokenRecord(Document, frozen=True, tag="tokens"):
    """What lies in a file of tokens.

    digest:    SHA-256 of the tokens as they lie there, in hex
    documents: with any text; empty: without
    rough:     cuts inside documents where tokens may differ from those of the whole document
    largest:   the largest token
    opening, closing: tokens around each document, by name; separated: two line feeds end it instead of a token
    ignored:   what is saved in tokenizer.json and not applied
    """

    tokens: int
    dtype: str
    digest: str
    documents: int
    empty: int = 0
    rough: int = 0
    largest: int = 0
    opening: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    separated: bool = False
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenFile:
    """Tokens of a record, mapped from a file: they take page cache, which the system takes back, and no memory of the run."""

    record: TokenRecord
    tokens: np.ndarray


def default_folder() -> Path:
    """Where tokens are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    return (Path(base) if base.startswith("/") else Path("~/.cache").expanduser()) / "slideplan" / "tokens"


class TokenCache:
    """A folder of prepared tokens. `kept`: they outlive this run; where the default folder cannot be written, they do not.

    Raises ValueError where a folder that was asked for cannot be written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.kept = True
        self._temporary: Path | None = None
        self.folder = default_folder() if folder is None else folder.expanduser()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            if folder is not None:
                raise ValueError(f"--token-cache {folder}: cannot be written: {error.strerror}") from None
            self.kept = False
            self.folder = self._temporary = Path(tempfile.mkdtemp(prefix="slideplan-tokens-"))
        self._remove_abandoned()

    def close(self) -> None:
        """Remove what is not kept. Tokens that are mapped stay readable until they are let go."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def get(self, key: str, show: Show) -> TokenFile | None:
        """Tokens kept under a key; None where there are none, or where they are not what was written."""
        record_path, path = self.folder / f"{key}.json", self.folder / f"{key}.npy"
        try:
            record = load(record_path, TokenRecord)
            with path.open("rb") as file:
                found = hashlib.sha256()
                size = record.tokens * np.dtype(record.dtype).itemsize
                _skip_header(file, record)
                done = 0
                while block := file.read(BLOCK_BYTES):
                    found.update(block)
                    done += len(block)
                    show(Progress("checking tokens", done, size))
            if found.hexdigest() != record.digest:
                return None
            return TokenFile(record, _mapped(path, record))
        except (ValueError, TypeError, OSError):
            return None

    def put(self, key: str, dtype: str, parts: Iterable[np.ndarray], record: Callable[[int, str], TokenRecord]) -> TokenFile:
        """Write tokens part by part, and then the record made of their number and digest. All of it or nothing is kept.

        Raises OSError naming the file where the disk is full.
        """
        path = self.folder / f"{key}.npy"
        file, partial = self._partial(key, path)
        try:
            with file:
                count, found = 0, hashlib.sha256()
                with _naming(path):
                    header = _write_header(file, dtype, 0)
                for part in parts:
                    raw = np.ascontiguousarray(part, dtype=dtype).tobytes()
                    found.update(raw)
                    count += len(part)
                    with _naming(path):
                        _write(file, raw)
                made = record(count, found.hexdigest())
                with _naming(path):
                    file.seek(0)
                    if _write_header(file, dtype, count) != header:
                        raise OSError(0, "the header of a NumPy file does not have the size that it had")
                    partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        save(self.folder / f"{key}.json", made)
        return TokenFile(made, _mapped(path, made))

    def _partial(self, key: str, path: Path) -> tuple[io.FileIO, Path]:
        """A new file that others see is being written: it is locked."""
        while True:
            with _naming(path):
                descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=f"{key}.", suffix=".partial")
            file = io.FileIO(descriptor, "wb")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return file, Path(name)
            file.close()  # before it was locked, another run took it for one that nobody writes any more

    def _remove_abandoned(self) -> None:
        """Remove what runs that were killed have left half-written."""
        for partial in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError), partial.open("rb") as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                partial.unlink()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file and what to do where it cannot be written: the disk is full, say."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror}; make room, or name another folder with --token-cache"
        raise OSError(error.errno, what, str(path)) from None


def _write(file: io.FileIO, raw: bytes) -> None:
    """All of it: a write may take less than it is given."""
    view = memoryview(raw)
    while view:
        view = view[file.write(view) :]


def _write_header(file: io.FileIO, dtype: str, count: int) -> int:
    """Write the header of a NumPy file; returns its size, which leaves room for any count."""
    described = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": (count,)}
    header = io.BytesIO()
    npy.write_array_header_1_0(header, described)
    _write(file, header.getvalue())
    return file.tell()


def _skip_header(file: BinaryIO, record: TokenRecord) -> None:
    """Raises ValueError where the file is not as its record says."""
    if npy.read_magic(file) != (1, 0):
        raise ValueError("another version of the NumPy format")
    shape, _, dtype = npy.read_array_header_1_0(file)
    if shape != (record.tokens,) or dtype != np.dtype(record.dtype):
        raise ValueError("another shape or dtype than the record has")


def _mapped(path: Path, record: TokenRecord) -> np.ndarray:
    with path.open("rb") as file:
        _skip_header(file, record)
        offset = file.tell()
        if record.tokens == 0:
            return np.empty(0, record.dtype)
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapping.madvise(mmap.MADV_RANDOM)  # windows come in random order: pages between them are not read ahead
    return np.frombuffer(mapping, dtype=record.dtype, offset=offset, count=record.tokens)
