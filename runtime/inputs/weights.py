"""Initial weights: a Hugging Face directory in safetensors, or a seeded random initialisation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from runtime.inputs.checkpoint import Checkpoint
from runtime.inputs.data import Position
from runtime.inputs.tensor_names import Matching, grouped, match, misnamed
from slideplan.model import ModelSpec
from slideplan.progress import Progress, Show

INITIALIZER_STD = 0.02  # `initializer_range` of all supported families
# Weights are placed while the slots of a full plan are reserved already; a vocabulary matrix in one piece
# would need gigabytes beside them.
PIECE_ELEMENTS = 1 << 22


class Piece(NamedTuple):
    """Some rows of a parameter: its name within the unit, where they lie, their values in any floating dtype, on any device."""

    name: str
    rows: slice
    values: torch.Tensor


class Places(Protocol):
    """Where the master weights of a unit go."""

    def place(self, piece: Piece) -> None:
        """Write some rows of a parameter."""


class WeightSource(ABC):
    """Where a run begins that has weights and no optimizer state yet."""

    @abstractmethod
    def pieces(self, unit: int) -> Iterator[Piece]:
        """All parameters of a unit, one after the other."""

    def fill(self, states: Sequence[Places], show: Show) -> Position:
        """Write the master weights of all units; moments are zero already."""
        for unit, state in enumerate(states):
            for piece in self.pieces(unit):
                state.place(piece)
            show(Progress("placing weights", unit + 1, len(states)))
        return Position(0, 0)


class RandomWeights(WeightSource):
    """Hugging Face's initialisation: normal(0, 0.02) matrices, norms one, biases zero; seeded per unit."""

    def __init__(self, model: ModelSpec, seed: int, device: torch.device) -> None:
        self._model = model
        self._seed = seed
        self._device = device

    def pieces(self, unit: int) -> Iterator[Piece]:
        generator = torch.Generator(device=self._device).manual_seed(self._seed * 100_003 + unit)
        for parameter in self._model.parameters(self._model.role(unit)):
            for rows in _rows(parameter.shape):
                values = torch.empty((rows.stop - rows.start, *parameter.shape[1:]), device=self._device)
                if parameter.name.endswith(".bias"):
                    values.zero_()
                elif len(parameter.shape) == 1:
                    values.fill_(1.0)
                else:
                    values.normal_(0.0, INITIALIZER_STD, generator=generator)
                yield Piece(parameter.name, rows, values)


class SafetensorsWeights(WeightSource):
    """A Hugging Face directory: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Names and shapes of all parameters are checked when it is opened, before anything is allocated. What transformers
    reads is read: names of a base model, without `model.`, and tied embeddings under the name of either end.
    Raises ValueError naming file and tensor.

    notes: what was not used, one line each. names: the stored name of each parameter.
    """

    def __init__(self, model: ModelSpec, folder: Path) -> None:
        self._model = model
        self._checkpoint = Checkpoint(folder)
        self._expected = model.shapes
        self._names = match(self._expected, self._checkpoint.tensors, model.tied_embeddings)
        problems = list(self._problems(self._names))
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ValueError(f"--weights {folder}: does not hold {model.name}: " + "; ".join(problems[:3]) + more)
        for kept, copy in self._names.copies:
            self._check_equal(kept, copy)
        self.names: Mapping[str, str] = self._names.stored
        self.notes = list(self._unused())

    def pieces(self, unit: int) -> Iterator[Piece]:
        prefix = self._model.unit_prefix(unit)
        for parameter in self._model.parameters(self._model.role(unit)):
            for rows, values in self._rows_of(self._names.stored[prefix + parameter.name]):
                yield Piece(parameter.name, rows, values)

    def _rows_of(self, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        stored = self._checkpoint.tensors[name]
        with self._checkpoint.opened(stored.file) as file:
            tensor = file.get_slice(name)
            for rows in _rows(stored.shape):
                yield rows, tensor[rows]

    def _problems(self, names: Matching) -> Iterator[str]:
        tensors = self._checkpoint.tensors
        missing = [name for name in self._expected if name not in names.stored]
        explanation = misnamed(self._expected, missing, tensors)
        if explanation:
            yield explanation
            return
        for name in missing:
            placed = self._checkpoint.placed.get(name)
            yield f"tensor {name} is " + (
                f"not in {placed}, where the index places it" if placed else f"missing{_remedy(name)}"
            )
        for name, found in names.stored.items():
            wanted, stored = self._expected[name], tensors[found]
            if stored.shape != wanted:
                hint = ""
                if name in ("model.embed_tokens.weight", "lm_head.weight") and stored.shape[1:] == wanted[1:]:
                    hint = f": the vocabulary was padded or extended; if so, set vocab_size to {stored.shape[0]} in config.json"
                yield f"tensor {found} in {stored.file} has shape {list(stored.shape)}, expected {list(wanted)}{hint}"
            elif stored.dtype not in ("BF16", "F16", "F32"):
                yield f"tensor {found} in {stored.file} has dtype {stored.dtype}, expected BF16, F16 or F32"

    def _check_equal(self, kept: str, copy: str) -> None:
        """Raise ValueError where two stored tensors, of which one stands for both, have different values."""
        tensors, folder = self._checkpoint.tensors, self._checkpoint.folder
        # NaN is no reason to call a copy another one.
        same = tensors[kept].shape == tensors[copy].shape and all(
            torch.equal(left.float().nan_to_num(), right.float().nan_to_num())
            for (_, left), (_, right) in zip(self._rows_of(kept), self._rows_of(copy), strict=True)
        )
        if not same and "lm_head" in copy:
            raise ValueError(
                f"--weights {folder}: {copy} differs from {kept}, though config.json says tie_word_embeddings: true; set it "
                "to false to train with both, and plan again, or remove the tensor that is wrong"
            )
        if not same:
            raise ValueError(
                f"--weights {folder}: {copy} differs from {kept}, and nothing says which is right; remove one of them"
            )

    def _unused(self) -> Iterator[str]:
        used = {*self._names.stored.values(), *(copy for _, copy in self._names.copies)}
        unused = [name for name in self._checkpoint.tensors if name not in used]
        if unused:
            yield (
                f"weights: {len(used)} tensors used, {len(unused)} not, because config.json describes a "
                f"{self._model.architecture} without them: {grouped(unused)}"
            )
        if self._checkpoint.left_out:
            yield f"weights: read {', '.join(_brief(self._checkpoint.files))}; left out: {', '.join(self._checkpoint.left_out)}"


def _brief(files: list[str]) -> list[str]:
    return files if len(files) <= 2 else [files[0], "...", files[-1]]


def _remedy(name: str) -> str:
    if name != "lm_head.weight":
        return ""
    return (
        ": the folder holds a model without output projection, such as one that makes embeddings; set tie_word_embeddings "
        "to true in config.json to let the embedding matrix take its place, and plan again"
    )


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """A tensor's rows in pieces of at most PIECE_ELEMENTS, or one row."""
    rows = max(1, PIECE_ELEMENTS // prod(shape[1:]))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))
