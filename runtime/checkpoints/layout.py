"""Files of a checkpoint: their names, and safetensors headers."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from math import prod
from typing import Annotated, NamedTuple

import msgspec

from runtime.inputs.checkpoint import INDEX
from runtime.state import StoredTensor

MANIFEST = "manifest.json"
CONFIG = "config.json"
# What lies in a run folder.
CHECKPOINTS, WEIGHTS = "checkpoints", "weights"
# Folders that are being written or removed; whoever holds the lock of the run folder may remove them.
UNFINISHED, REMOVED = ".unfinished-", ".removed-"
# The data begin on a page, so that what maps the file finds every tensor aligned.
ALIGN_BYTES = 4096
MAX_HEADER_BYTES = 16 << 20
DTYPE_BYTES = {"BF16": 2, "I16": 2, "F32": 4, "U8": 1}

_STEP = re.compile(r"step-(\d{8,18})")


class Entry(NamedTuple):
    """A tensor in a safetensors file; `first_byte` counts from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    first_byte: int

    @property
    def size_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * prod(self.shape)


class _Described(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the words of a header. Where it lies is counted from the header's end, first byte and last exclusive."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


def step_name(step: int) -> str:
    """Folder of the state after this many steps."""
    return f"step-{step:08}"


def step_of(name: str) -> int | None:
    """Steps done by a folder's name; None for other folders."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def weights_file(unit: int, units: int) -> str:
    """Shard of a unit's weights, in the manner of Hugging Face."""
    return f"model-{unit + 1:05}-of-{units:05}.safetensors"


def optimizer_file(unit: int, units: int) -> str:
    """Shard of a unit's remainder and moments. Loaders of models look for other names."""
    return f"optimizer-{unit + 1:05}-of-{units:05}.safetensors"


def header(tensors: Sequence[StoredTensor]) -> bytes:
    """What a safetensors file of these tensors starts with: length, JSON, and spaces up to a whole page."""
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in tensors:
        start, end = end, end + DTYPE_BYTES[each.dtype] * prod(each.shape)
        described[each.name] = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    return struct.pack("<Q", len(text)) + text


def header_bytes(first: bytes) -> int:
    """Length of the header of a file that starts with these eight bytes or more. Raises ValueError."""
    if len(first) < 8 or not 2 <= (length := struct.unpack("<Q", first[:8])[0]) <= MAX_HEADER_BYTES:
        raise ValueError("does not start with the header of a safetensors file")
    return 8 + int(length)


def entries(content: bytes, file_bytes: int) -> dict[str, Entry]:
    """Tensors by name of a file of this size that starts with this header. They fill the file, one after the other.

    Any bit of the header may be wrong: nobody has compared it with anything. Raises ValueError where it is not as `header`
    writes it.
    """
    try:
        described = msgspec.json.decode(content[8:], type=dict[str, msgspec.Raw])
        described.pop("__metadata__", None)
        tensors = {name: msgspec.json.decode(each, type=_Described) for name, each in described.items()}
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("has a header that describes no tensors") from None
    found, end = {}, 0
    for name, each in tensors.items():
        if each.dtype not in DTYPE_BYTES:
            raise ValueError(f"has a header that describes a tensor of dtype {each.dtype!r}")
        found[name] = Entry(each.dtype, each.shape, len(content) + end)
        start, end = end, end + found[name].size_bytes
        if each.data_offsets != (start, end):
            raise ValueError("has a header whose offsets do not fit its tensors")
    if len(content) + end != file_bytes:
        raise ValueError(f"has a header of tensors of {end} bytes, {file_bytes - len(content)} follow")
    return found


def index(files: Mapping[str, Sequence[StoredTensor]]) -> tuple[str, bytes]:
    """Name and content of the index of weights in these files."""
    placed = {each.name: file for file, tensors in files.items() for each in tensors}
    total = sum(DTYPE_BYTES[each.dtype] * prod(each.shape) for tensors in files.values() for each in tensors)
    document = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    return INDEX, json.dumps(document, indent=2).encode() + b"\n"
