"""JSON files of a Hugging Face directory, and typed access to the fields of a `config.json`."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

# A config takes kilobytes, the index of a few hundred thousand tensors some megabytes: what is larger is another file.
MAX_JSON_BYTES = 16 << 20
# No published shape comes near; beyond it, bytes of a plan would leave 64 bits.
MAX_INTEGER = (1 << 31) - 1
_LFS_START = b"version https://git-lfs.github.com/spec/"
_SHOWN_CHARACTERS = 120


def shown(value: object) -> str:
    """A value as it stands in a message: one line, and never a long one."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


def refuse_lfs_pointer(file: Path, start: bytes) -> None:
    """Raise ValueError where a file, of which `start` are the first bytes, only says where Git LFS keeps the real one."""
    if start.startswith(_LFS_START):
        raise ValueError(
            f"{file}: is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`, or download it again"
        )


def read_json_object(file: Path, remedy: str) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises ValueError that names the file and what to do."""
    try:
        # Opening a pipe would wait for a writer; what is not there is for `open` to report.
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: is not a file; {remedy}")
        with file.open("rb") as opened:
            content = opened.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read: {error.strerror}; {remedy}") from None
    return json_object(file, content, remedy)


def json_object(file: Path, content: bytes, remedy: str) -> dict[str, Any]:
    """The JSON object that a file holds, which was read. Raises ValueError as above."""
    refuse_lfs_pointer(file, content)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"{file}: is larger than {MAX_JSON_BYTES >> 20} MiB, which no such file is; {remedy}")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and endless nesting
        raise ValueError(f"{file}: not valid JSON: {error}; fetch the file again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: holds a JSON {type(value).__name__}, must be an object; fetch the file again")
    return value


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number; true and false are none, though Python counts them."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -inf < value < inf


class Fields:
    """Typed access to a config's fields; null counts as absent, as it does in transformers.

    All readers raise ValueError that names file, field, value and remedy.
    """

    def __init__(self, where: Path, values: dict[str, Any]) -> None:
        self.where = where
        self.values = values

    def error(self, field: str, problem: str) -> ValueError:
        return ValueError(f"{self.where}: field `{field}` {problem}")

    def has(self, field: str) -> bool:
        return self.values.get(field) is not None

    def _read(self, field: str, kind: str, types: tuple[type, ...], default: Any) -> Any:
        if not self.has(field):
            if default is None:
                raise self.error(field, f"is missing; add it ({kind})")
            return default
        value = self.values[field]
        # bool is a subclass of int: "true" heads are a mistake, not one head.
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise self.error(field, f"is {shown(value)}, must be {kind}; correct it")
        return value

    def integer(self, field: str, default: int | None = None, most: int = MAX_INTEGER) -> int:
        """A whole number in 1..most."""
        value: int = self._read(field, "a positive whole number", (int,), default)
        if value < 1:
            raise self.error(field, f"is {shown(value)}, must be a positive whole number; correct it")
        if value > most:
            raise self.error(field, f"is {shown(value)}, more than {most}; correct it")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._read(field, "a positive number", (int, float), default)
        try:
            number = float(value)
        except OverflowError:
            number = inf
        if not 0 < number < inf:
            raise self.error(field, f"is {shown(number)}, must be a positive number; correct it")
        return number

    def boolean(self, field: str) -> bool:
        """True or false; false where the field is absent."""
        value: bool = self._read(field, "true or false", (bool,), False)
        return value
