"""What a file is by its content: text, JSON lines with texts, or something else, by its name."""

from __future__ import annotations

import codecs
import json
import re
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec

from runtime.inputs.text_encoder import LFS_POINTER

HEAD_BYTES = 64 << 10  # what is looked at to tell what a file is


class Kind(StrEnum):
    """How a file's content is read."""

    TEXT = "text"
    JSON_LINES = "JSON lines"


class Other(NamedTuple):
    """Why a file is not read: what it is, what would help, and what of it is this file's own."""

    what: str
    advice: str = ""
    detail: str = ""


CONVERT = "write its texts as JSON lines with a field `text`; other data sets are not read yet"
UNPACK = "unpack it"

# Formats by the bytes at an offset.
MAGICS: tuple[tuple[int, bytes, Other], ...] = (
    (0, LFS_POINTER, Other("a Git LFS pointer", "the file itself was not downloaded: run `git lfs pull`")),
    (0, b"PAR1", Other("Parquet", CONVERT)),
    (0, b"ARROW1", Other("Arrow", CONVERT)),
    (0, b"\xff\xff\xff\xff", Other("Arrow", CONVERT)),  # a stream, as `save_to_disk` writes it
    (0, b"Obj\x01", Other("Avro", CONVERT)),
    (0, b"ORC", Other("ORC", CONVERT)),
    (0, b"\x1f\x8b", Other("gzip-compressed", UNPACK)),
    (0, b"\x28\xb5\x2f\xfd", Other("zstd-compressed", UNPACK)),
    (0, b"\xfd7zXZ\x00", Other("xz-compressed", UNPACK)),
    (0, b"BZh", Other("bzip2-compressed", UNPACK)),
    (0, b"\x04\x22\x4d\x18", Other("lz4-compressed", UNPACK)),
    (0, b"7z\xbc\xaf\x27\x1c", Other("a 7z archive", UNPACK)),
    (0, b"PK\x03\x04", Other("a zip archive or a document in one", UNPACK)),
    (257, b"ustar", Other("a tar archive", UNPACK)),
    (0, b"%PDF-", Other("PDF", "write its text into a file")),
    (0, b"{\\rtf", Other("RTF", "write its text into a file")),
    (0, b"SQLite format 3\x00", Other("an SQLite database", CONVERT)),
    (0, b"\x89HDF", Other("HDF5", CONVERT)),
    (0, b"\x93NUMPY", Other("a NumPy array", CONVERT)),
    (0, b"GGUF", Other("GGUF weights")),
    (0, b"\x7fELF", Other("a program")),
    (0, b"\x89PNG", Other("a picture")),
    (0, b"\xff\xd8\xff", Other("a picture")),
    (0, b"GIF8", Other("a picture")),
    (0, b"\x00\x00\xfe\xff", Other("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8")),
    (0, b"\xff\xfe\x00\x00", Other("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8")),
    (0, b"\xff\xfe", Other("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8")),
    (0, b"\xfe\xff", Other("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8")),
)
JSON_SUFFIXES = {".json", ".jsonl", ".ndjson", ".ipynb"}
BINARY = Other("binary")
EMPTY = Other("empty")
JSON_ADVICE = "only JSON lines with a field `text` are read; chat data is not read yet"

SHORT_LINE_BYTES = 1 << 20
_PYTHON_ONLY = (b"NaN", b"Infinity", b"\\u")  # what Python reads and a stricter reader may not
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
_ARRAY = re.compile(rb'\[\s*(\{\s*"|"[^"\n]*"\s*,\s*["\n])')
# Bytes that no text has, whatever its encoding, but now and then.
_CONTROL = bytes({*range(32), 127} - {*b"\t\n\r\f\b\x1b"})
_MOST_CONTROL = 0.02


def sniff(head: bytes, complete: bool, suffix: str, any_encoding: bool) -> Kind | Other:  # noqa: PLR0911 - a list of cases
    """What a file is that begins with `head`, and whose name ends in `suffix` (lower case).

    complete: the head is all of it; any_encoding: bytes are tokens, so that text need not be UTF-8.
    """
    if not head:
        return EMPTY
    for offset, magic, other in MAGICS:
        if head.startswith(magic, offset) and not (magic.isalnum() and _is_plain(head, complete)):
            return other
    if b"\0" in head:
        return _with_zeros(head)
    if any_encoding and sum(map(head.count, (bytes([byte]) for byte in _CONTROL))) > _MOST_CONTROL * len(head):
        return BINARY
    body = head.removeprefix(_BOM).lstrip(_SPACE)
    like_json = suffix in JSON_SUFFIXES or _FIRST_KEY.match(body) is not None
    wrong = _first_wrong_byte(head, complete)
    if wrong is not None and (like_json or not any_encoding):
        return not_utf8(wrong)
    if not body:
        return Other("blank")
    return _json(body, complete, suffix) if like_json or body[:1] in b"{[" else Kind.TEXT


def _is_plain(head: bytes, complete: bool) -> bool:
    """Whether a head is text beyond doubt: some formats begin with letters, with which a text may begin too."""
    return _first_wrong_byte(head, complete) is None and head.translate(None, _CONTROL) == head


def _first_wrong_byte(head: bytes, complete: bool) -> int | None:
    """Where a text stops being UTF-8; its head may end inside a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=complete)
    except UnicodeDecodeError as error:
        return error.start
    return None


def not_utf8(at: int) -> Other:
    """Text in another encoding, or none: the first byte that is not UTF-8 is at `at`."""
    return Other("not UTF-8 text", "convert it: iconv -t UTF-8 -f ITS-ENCODING", f"at byte {at}")


def _with_zeros(head: bytes) -> Other:
    """UTF-16 without its mark has a zero in every second place, where its letters are Latin."""
    pairs = head[: len(head) // 2 * 2]
    for name, high, low in (("UTF-16LE", pairs[1::2], pairs[::2]), ("UTF-16BE", pairs[::2], pairs[1::2])):
        if high and high.count(0) > 0.7 * len(high) and low.count(0) < 0.02 * len(low):
            return Other("UTF-16 text", f"convert it: iconv -f {name} -t UTF-8")
    if re.match(rb"[\x00-\xff]{8}\{\s*\"", head):
        return Other("safetensors weights")
    return BINARY


def _json(body: bytes, complete: bool, suffix: str) -> Kind | Other:  # noqa: PLR0911 - a list of cases
    """JSON lines with texts, other JSON by its fields, or text that only begins like it."""
    line, newline, rest = body.partition(b"\n")
    first = _parsed(line) if newline or complete else None
    if isinstance(first, dict):
        if "text" in first:
            return Kind.JSON_LINES
        return _fields("JSON lines" if rest.strip(_SPACE) else "JSON", list(first))
    whole = _parsed(body) if complete else None
    if isinstance(whole, dict):
        return _fields("JSON over several lines", list(whole))
    if isinstance(whole, list) and whole and isinstance(whole[0], dict):
        return _fields("a JSON array of records", list(whole[0]))
    if isinstance(whole, list) or _ARRAY.match(body):
        return Other("a JSON array", JSON_ADVICE)
    if (key := _FIRST_KEY.match(body)) is not None:
        if not newline and b'"text"' in line:  # a record longer than the head
            return Kind.JSON_LINES
        return _fields("JSON", [key.group(1).decode(errors="replace")])
    if suffix in JSON_SUFFIXES:
        return Other(f"named {suffix}, but its first line is no JSON object", JSON_ADVICE)
    return Kind.TEXT


def _parsed(text: bytes) -> object | None:
    try:
        return record_of(text)
    except (ValueError, RecursionError):
        return None


def record_of(line: bytes) -> Any:
    """The value of a line of JSON. Of a long object's fields all but `text` stay unread, as `msgspec.Raw`.

    Read, they may take thirty times the memory of their text. Raises ValueError or RecursionError where it is no JSON.
    """
    if len(line) <= SHORT_LINE_BYTES or not line.lstrip(_SPACE).startswith(b"{"):
        return json.loads(line)
    try:
        record: dict[str, Any] = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        if not any(word in line for word in _PYTHON_ONLY):
            raise
        return json.loads(line)
    return record | ({"text": json.loads(bytes(record["text"]))} if "text" in record else {})


def _fields(what: str, names: list[str]) -> Other:
    shown = ", ".join(repr(name[:40]) for name in names[:6]) + (", ..." if len(names) > 6 else "")
    return Other(what, JSON_ADVICE, f"with {'the field' if len(names) == 1 else 'fields'} {shown}" if names else "")
