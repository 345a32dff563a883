"""What a Hugging Face checkpoint folder holds: which files are the checkpoint, and the header of every tensor in them."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from runtime.inputs.tensor_names import readable
from slideplan.hf_fields import read_json_object, refuse_lfs_pointer, shown

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A header takes about a hundred bytes a tensor; the library would read up to 100 MB of one into objects.
MAX_HEADER_BYTES = 16 << 20
# Files that hold weights, in a form that is not read here, and how to come to one that is.
_CONVERT = "load it with transformers and write it again with save_pretrained, which writes safetensors"
_OTHER_FORMATS = {
    ".bin": f"a pickle, which can run code of its own; {_CONVERT}",
    ".pt": f"a pickle, which can run code of its own; {_CONVERT}",
    ".pth": f"a pickle, which can run code of its own; {_CONVERT}",
    ".gguf": "a quantized format; take the weights that it was made from",
    ".h5": f"weights of TensorFlow; {_CONVERT}",
    ".msgpack": f"weights of Flax; {_CONVERT}",
    ".safetensors": f"not what the layout of Hugging Face calls the model ({SINGLE}, or shards and {INDEX})",
}
# Pickles that come beside weights and are none.
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "random_states")


class Stored(NamedTuple):
    """A tensor as its file describes it. dtype: in safetensors' words, such as BF16."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint:
    """Tensors of a folder by their stored names, from `model.safetensors` or the shards of its index.

    left_out: files with weights that are not part of it. placed: the file that the index, if there is one, names for a
    tensor. Raises ValueError naming the file where there is no
    checkpoint, more than one, or one that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise ValueError(f"--weights {folder}: is not a folder; name a Hugging Face model directory")
        self.placed: dict[str, str] = {}
        self.files = self._locate()
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            self._read_header(file)
        self.left_out = sorted(path.name for path in _weight_files(folder) if path.name not in self.files)

    def opened(self, file: str) -> Any:
        """A safetensors file of the checkpoint, as a context manager."""
        return _opened(self.folder / file)

    def _locate(self) -> list[str]:
        single, index = self.folder / SINGLE, self.folder / INDEX
        if not index.exists():
            if single.is_file():
                return [SINGLE]
            raise ValueError(f"--weights {self.folder}: {self._nothing()}")
        listed = self._shards(index)
        if not single.is_file() or listed == [SINGLE]:
            return listed
        here = [name for name in listed if (self.folder / name).exists()]
        if here:
            raise ValueError(
                f"--weights {self.folder}: holds two checkpoints, {SINGLE} and the {len(listed)} shards of {INDEX} "
                f"({here[0]}, ...), and nothing says which is newer; move one of them away"
            )
        self.placed = {}  # an index whose shards are gone
        return [SINGLE]

    def _shards(self, index: Path) -> list[str]:
        located = read_json_object(index, "download it again").get("weight_map")
        if not isinstance(located, dict) or not located:
            raise ValueError(f"{index}: not a safetensors index (no readable `weight_map`); download it again")
        for name, file in located.items():
            if not isinstance(file, str) or file in (".", "..") or Path(file).name != file or "\0" in file:
                raise ValueError(
                    f"{index}: `weight_map` places {shown(name)} in {shown(file)}, which is no file of this folder"
                )
        self.placed = located
        return sorted(set(located.values()))

    def _nothing(self) -> str:
        """Why there is no checkpoint: what is there instead, and what to do."""
        others = list(_weight_files(self.folder))
        shards = [path.name for path in others if path.name.startswith("model-") and path.suffix == ".safetensors"]
        if shards:
            return f"holds {shards[0]} but no {INDEX}; download the index"
        adapters = [path.name for path in others if path.name.startswith("adapter_")]
        if adapters:
            return f"holds {adapters[0]}, an adapter and no whole model; merge it into its base model and save that"
        for path in others:
            return f"holds neither {SINGLE} nor {INDEX}, but {path.name}: {_OTHER_FORMATS[path.suffix]}"
        return f"holds neither {SINGLE} nor {INDEX}; name a Hugging Face model directory"

    def _read_header(self, file: str) -> None:
        for name, stored in _header(self.folder / file, file):
            earlier = self.tensors.setdefault(name, stored)
            if earlier is not stored:
                raise ValueError(
                    f"--weights {self.folder}: tensor {readable(name)} is in {earlier.file} and in {file}, and nothing says "
                    "which is right; download the folder again"
                )


def holds_weights(path: Path) -> bool:
    """Whether a file of a model's folder is one of weights, of any format, of an optimizer, or an index of them."""
    return path.suffix in _OTHER_FORMATS or path.name.endswith(".index.json")


def _header(path: Path, file: str) -> Iterable[tuple[str, Stored]]:
    with _opened(path) as opened:
        for name in opened.keys():  # noqa: SIM118 - no mapping
            part = opened.get_slice(name)
            yield name, Stored(file, tuple(part.get_shape()), part.get_dtype())


def _weight_files(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.iterdir()):
        if path.suffix in _OTHER_FORMATS and path.is_file() and not path.name.startswith(_NO_WEIGHTS):
            yield path


def _opened(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: is not a file; download it again")
        with path.open("rb") as start:
            head = start.read(64)
        refuse_lfs_pointer(path, head)
        if len(head) >= 8 and (length := struct.unpack("<Q", head[:8])[0]) > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: not a readable safetensors file: it says that its header has {length} bytes; download it again"
            )
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}; download it again") from None
