"""Initial weights: a Hugging Face directory in safetensors, or a seeded random initialisation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from slideplan.model import ModelSpec

INITIALIZER_STD = 0.02  # `initializer_range` of all supported families
# Weights are placed while the slots of a full plan are reserved already; a vocabulary matrix in one piece
# would need gigabytes beside them.
PIECE_ELEMENTS = 1 << 22


class Piece(NamedTuple):
    """Some rows of a parameter: its name within the unit, where they lie, their values in any floating dtype, on any device."""

    name: str
    rows: slice
    values: torch.Tensor


class WeightSource(Protocol):
    """Where the fp32 master weights of a unit come from."""

    def pieces(self, unit: int) -> Iterator[Piece]:
        """All parameters of a unit, one after the other."""


class RandomWeights:
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


class SafetensorsWeights:
    """A Hugging Face directory: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Names and shapes of all parameters are checked when it is opened, before anything is allocated.
    Raises ValueError naming file and tensor.
    """

    def __init__(self, model: ModelSpec, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._file_of = self._locate()
        problems = list(self._problems())
        if problems:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise ValueError(f"--weights {folder}: does not hold {model.name}: " + "; ".join(problems[:3]) + more)

    def pieces(self, unit: int) -> Iterator[Piece]:
        prefix = self._model.unit_prefix(unit)
        for parameter in self._model.parameters(self._model.role(unit)):
            name = prefix + parameter.name
            with safe_open(self._folder / self._file_of[name], framework="pt") as file:
                tensor = file.get_slice(name)
                for rows in _rows(parameter.shape):
                    yield Piece(parameter.name, rows, tensor[rows])

    def _locate(self) -> dict[str, str]:
        index = self._folder / "model.safetensors.index.json"
        single = self._folder / "model.safetensors"
        if not self._folder.is_dir():
            raise ValueError(f"--weights {self._folder}: is not a folder; name a Hugging Face model directory")
        if index.is_file():
            try:
                located = json.loads(index.read_text())["weight_map"]
                return {str(name): str(file) for name, file in located.items()}
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{index}: not a safetensors index (no readable `weight_map`); download it again") from None
        if single.is_file():
            with _opened(single) as file:
                return dict.fromkeys(file.keys(), single.name)
        raise ValueError(f"--weights {self._folder}: holds neither model.safetensors nor model.safetensors.index.json")

    def _problems(self) -> Iterator[str]:
        expected = {
            self._model.unit_prefix(unit) + parameter.name: parameter.shape
            for unit in range(self._model.units)
            for parameter in self._model.parameters(self._model.role(unit))
        }
        by_file: dict[str, list[str]] = {}
        for name in expected:
            if name not in self._file_of:
                yield f"tensor {name} is missing"
            else:
                by_file.setdefault(self._file_of[name], []).append(name)
        for file_name, names in by_file.items():
            with _opened(self._folder / file_name) as file:
                present = set(file.keys())
                for name in names:
                    if name not in present:
                        yield f"tensor {name} is not in {file_name}, where the index places it"
                        continue
                    part = file.get_slice(name)
                    if tuple(part.get_shape()) != expected[name]:
                        yield f"tensor {name} in {file_name} has shape {part.get_shape()}, expected {list(expected[name])}"
                    elif part.get_dtype() not in ("BF16", "F16", "F32"):
                        yield f"tensor {name} in {file_name} has dtype {part.get_dtype()}, expected BF16, F16 or F32"


def _rows(shape: tuple[int, ...]) -> Iterator[slice]:
    """A tensor's rows in pieces of at most PIECE_ELEMENTS, or one row."""
    rows = max(1, PIECE_ELEMENTS // prod(shape[1:]))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


def _opened(path: Path):  # type: ignore[no-untyped-def]
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}; download it again") from None
