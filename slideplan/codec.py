"""Reading and writing the project's JSON documents: strict, versioned, atomic."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

from slideplan import __version__

FORMAT_VERSION = 1
# Beyond any document of ours: what is larger was named by mistake, and must not fill the memory.
LARGEST_BYTES = 1 << 29

# Counts are exact in Python whatever their size, but not what is computed of them.
_MANY_DIGITS = re.compile(rb"[0-9]{19}")

# The device's fault, and nothing that another path of the user's would mend.
_DEVICE_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every described thing: immutable, unknown fields refused."""


class Document(Spec, frozen=True, kw_only=True, tag_field="document"):
    """A specification that lies in a file of its own. The tag of its class heads it as `document`."""

    format_version: int = FORMAT_VERSION


class _Provenance(msgspec.Struct, frozen=True):
    versions: dict[str, str] = {}


class _Header(msgspec.Struct):
    document: str = ""
    format_version: int = 0
    version: str = ""  # of the package that made it, where the document says; a profile says it in its provenance
    provenance: _Provenance = _Provenance()

    @property
    def made_by(self) -> str:
        return self.version or self.provenance.versions.get("slideplan", "")


D = TypeVar("D", bound=Document)


def digest(spec: msgspec.Struct) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON encoding."""
    return hashlib.sha256(msgspec.json.encode(spec, order="deterministic")).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """`digest` of the document as it was written, whatever fields later versions have added to its kind."""
    return hashlib.sha256(msgspec.json.format(path.read_bytes(), indent=-1)).hexdigest()[:16]


def load(path: str | Path, kind: type[D]) -> D:
    """Read a document of this kind.

    Raises ValueError naming the file, the field and what to do when the file is missing, is not
    JSON, is another document, has another version, or has an unknown, missing or mistyped field.
    """
    path = Path(path)
    tag = str(kind.__struct_config__.tag)
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_BYTES + 1)
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder; name the {tag} file in it") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > LARGEST_BYTES:
        raise ValueError(f"{path}: is larger than {LARGEST_BYTES >> 20} MiB, which no {tag} is; name another file")
    return parsed(raw, path, kind)


def parsed(raw: bytes, path: Path, kind: type[D]) -> D:
    """A document of this kind from the content of its file. Raises ValueError as `load` does."""
    tag = str(kind.__struct_config__.tag)
    header: _Header | None = None
    try:
        header = msgspec.json.decode(raw, type=_Header)
        if header.document != tag:
            raise ValueError(f"{path}: expected a {tag!r} document, field `document` says {header.document!r}")
        if header.format_version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: field `format_version` is {header.format_version}, this version reads "
                f"{FORMAT_VERSION}; make the {tag} anew"
            )
        found = msgspec.json.decode(raw, type=kind)
        if _MANY_DIGITS.search(raw) and (field := _beyond_64_bits(msgspec.json.decode(raw))):
            raise ValueError(f"{path}: not a valid {tag}: `{field}` does not fit into 64 bits")
        return found
    except msgspec.ValidationError as error:
        made_by = header.made_by if header else ""
        made = (
            f"; it was made by slideplan {made_by}, this is {__version__}: if it was not edited, make it anew"
            if made_by not in ("", __version__)
            else ""
        )
        raise ValueError(f"{path}: not a valid {tag}: {error}{made}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: not a valid {tag}: its values are nested too deep") from None


def _beyond_64_bits(value: object, at: str = "$") -> str:
    """Where the first integer stands that is larger than any count of ours; "" where there is none."""
    if isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else ((f"[{place}]", each) for place, each in enumerate(value))
        found = (_beyond_64_bits(each, f"{at}{key}" if isinstance(value, list) else f"{at}.{key}") for key, each in inside)
        return next(filter(None, found), "")
    return at if isinstance(value, int) and abs(value) >= 1 << 63 else ""


def save(path: str | Path, document: msgspec.Struct) -> None:
    """Write whole or not at all: a temporary file beside the target, then a rename."""
    write_atomic(Path(path), encoded(document))


def encoded(document: msgspec.Struct) -> bytes:
    """A document as it is written: canonical, indented JSON."""
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=1) + b"\n"


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; a crash leaves the old file or the new one, never half of one.

    A link is followed. Raises ValueError where the path cannot be written or is not a regular file, OSError naming it where
    the disk is full or broken.
    """
    path = path.resolve()
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is not a regular file; name another")
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes it private; a plan is an ordinary file
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def unwritable(path: Path, error: OSError) -> Exception:
    """What to raise where a path cannot be written: ValueError, or OSError naming it where the disk is full or broken."""
    if error.errno in _DEVICE_FAULTS:
        return OSError(error.errno, error.strerror, str(path))
    return ValueError(f"{path}: cannot be written: {error.strerror}")
