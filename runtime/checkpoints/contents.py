"""What a checkpoint holds beside the state: configuration, tokenizer and whatever else lay with the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoints.layout import CONFIG, MANIFEST
from runtime.inputs.checkpoint import INDEX, holds_weights
from runtime.inputs.tensor_names import match
from slideplan.hf_config import config_of
from slideplan.hf_fields import json_object, read_json_object
from slideplan.model import ModelSpec
from slideplan.quantities import format_bytes

# Tokenizers, the largest of what is carried along, have up to 40 MB. All of it is held in memory.
LARGEST_BYTES = 64 << 20


class Contents(NamedTuple):
    """names: stored name by parameter, where it is another one. files: by name, without weights and index."""

    names: Mapping[str, str]
    files: Mapping[str, bytes]

    @property
    def size_bytes(self) -> int:
        """What the files take on a drive, about."""
        return sum(map(len, self.files.values()))


def contents_of(model: ModelSpec) -> Contents:
    """For a model with random weights: its configuration."""
    return Contents({}, {CONFIG: with_dtype(config_of(model), "bfloat16")})


def carried(folder: Path, names: Mapping[str, str]) -> tuple[Contents, list[str]]:
    """All files beside the weights of a Hugging Face directory; and what else is there that is not carried, in words.

    Hidden files, a checkpoint's manifest, and weights and optimizers of any format are neither. The configuration's dtype
    becomes that of the stored weights. Raises ValueError where a file cannot be read.
    """
    files: dict[str, bytes] = {}
    left_out = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == MANIFEST or holds_weights(path):
            continue
        if not path.is_file():
            left_out.append(f"{path.name} ({'a folder' if path.is_dir() else 'no file'})")
            continue
        if (size := path.stat().st_size) > LARGEST_BYTES:
            left_out.append(f"{path.name} ({format_bytes(size)})")
            continue
        files[path.name] = _content(path)
    files[CONFIG] = with_dtype(read_json_object(folder / CONFIG, "download it again"), "bfloat16")
    return Contents(names, files), left_out


def contents_at(model: ModelSpec, folder: Path, files: Mapping[str, bytes]) -> Contents:
    """What lies beside the state in a checkpoint: what its manifest names, and nothing that somebody has added since.

    files: all small ones. Raises ValueError for an index that is none.
    """
    beside = {name: content for name, content in files.items() if not holds_weights(folder / name)}
    return Contents(names_at(model, folder, files), beside)


def names_at(model: ModelSpec, folder: Path, files: Mapping[str, bytes]) -> Mapping[str, str]:
    """Stored name by parameter in a checkpoint. files: its index at least. Raises ValueError where that is none."""
    placed = json_object(folder / INDEX, files[INDEX], "take another checkpoint").get("weight_map")
    present = placed if isinstance(placed, dict) else {}
    return match(model.shapes, present, model.tied_embeddings).stored


def with_dtype(config: Mapping[str, object], dtype: str) -> bytes:
    """A configuration as a file, for weights of this dtype."""
    # The older name of the field is read by every version of its readers.
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
    return _json(dict(config) | dict.fromkeys(names, dtype))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None


def _json(content: Mapping[str, object]) -> bytes:
    return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
