"""Turns a checkpoint into a Hugging Face directory of the weights alone, rounded as anybody would round them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from runtime.checkpoints.contents import names_at, with_dtype
from runtime.checkpoints.helpers import grace_ends_ns
from runtime.checkpoints.keeper import SPARE_BYTES, counted, require_room
from runtime.checkpoints.layout import CONFIG, UNFINISHED, index, optimizer_file, weights_file
from runtime.checkpoints.manifest import DamagedError
from runtime.checkpoints.reading import read_shards, read_small_files
from runtime.checkpoints.resuming import Candidate
from runtime.checkpoints.staging import Staging
from runtime.checkpoints.writing import FileWrites, ShardFile
from runtime.inputs.checkpoint import INDEX
from runtime.inputs.weights import PIECE_ELEMENTS
from runtime.lanes.backend import CpuBackend
from runtime.optimizer.split_master import join
from runtime.state import StoredTensor
from runtime.storage.disk import Disk
from slideplan.codec import unwritable
from slideplan.hf_config import model_from_config
from slideplan.hf_fields import read_json_object
from slideplan.lowering.sizes import WEIGHT_BYTES
from slideplan.model import ModelSpec, Parameter
from slideplan.progress import Progress, Show
from slideplan.saving import LEAST_STAGING_BYTES

PHASE = "exporting"
Dtype = Literal["bf16", "fp32"]
# Units whose weights are held at once: several files are read and written together, and an embedding has gigabytes.
GROUP_BYTES = 2 << 30
_CONFIG_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


class _Unit(NamedTuple):
    """A unit's halves in memory, flat, and where its parameters lie in them."""

    number: int
    layout: Sequence[Parameter]
    weights: torch.Tensor
    remainder: torch.Tensor


def export(found: Sequence[Candidate], out: Path, dtype: Dtype, disk: Disk, show: Show) -> Candidate:
    """Write the weights of the newest of these checkpoints that is whole into a new folder; which it was.

    bf16: the fp32 master, rounded to nearest even. fp32: the master itself. Raises ValueError where the folder exists or no
    checkpoint is whole, OSError where the drive is full or fails: nothing is left then.
    """
    if out.exists() or out.is_symlink():
        raise ValueError(f"{out}: exists already; name a new folder with -o")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(out, error) from None
    problems = []
    for number, candidate in enumerate(found, 1):
        unfinished = out.with_name(UNFINISHED + out.name)
        try:
            _write(candidate, unfinished, dtype, disk, show)
            disk.rename(unfinished, out)
            disk.sync_folder(out.parent)
            return candidate
        except DamagedError as damage:
            problems.append(str(damage))
            if number < len(found):
                show(Progress(PHASE, note=f"warning: {damage}; the checkpoint before is taken"))
        finally:
            if unfinished.exists():
                disk.remove_folder(unfinished)
    raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")


def _write(candidate: Candidate, folder: Path, dtype: Dtype, disk: Disk, show: Show) -> None:
    source, manifest = candidate
    files = read_small_files(disk, source, manifest)
    model = model_from_config(source)
    names = names_at(model, source)
    element_bytes = WEIGHT_BYTES if dtype == "bf16" else 4
    need = element_bytes * model.parameter_count + sum(map(len, files.values())) + SPARE_BYTES
    require_room(disk, folder.parent, need)
    if folder.exists():  # of an export that was killed
        disk.remove_folder(folder)
    try:
        disk.make_folder(folder)
    except OSError as error:
        raise unwritable(folder.parent, error) from None
    backend = CpuBackend()
    read, write = (Staging(backend, LEAST_STAGING_BYTES, page_locked=False) for _ in range(2))
    total = sum(file.size_bytes for file in manifest.files if file.name not in files)
    done = counted(PHASE, total, show)
    written: dict[str, Sequence[StoredTensor]] = {}
    for units in _groups(model):
        halves = [_unit(model, unit) for unit in units]
        shards = [shard for unit in halves for shard in _halves(model, names, unit)]
        read_shards(disk, source, manifest, shards, read, backend, done)
        exported = [_exported(model, names, unit, dtype) for unit in halves]
        writes = FileWrites(disk, folder, exported, write, backend, lambda size: None)
        try:
            writes.start().finish()
        except BaseException:  # nobody may write into a folder that is removed next, but for whom the drive holds up
            writes.abort(grace_ends_ns())
            raise
        written |= {shard.name: shard.tensors for shard in exported}
    files[CONFIG] = with_dtype(read_json_object(source / CONFIG, "take another checkpoint"), _CONFIG_DTYPES[dtype])
    files[INDEX] = index(written)[1]
    for name, content in files.items():
        disk.write(folder / name, content)
    disk.sync_folder(folder)


def _groups(model: ModelSpec) -> Iterator[list[int]]:
    """Units in order, as many together as stay within GROUP_BYTES, at least one."""
    group: list[int] = []
    held = 0
    for unit in range(model.units):
        size = 2 * WEIGHT_BYTES * model.flat_elements(model.role(unit))
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(unit)
        held += size
    yield group


def _unit(model: ModelSpec, number: int) -> _Unit:
    role = model.role(number)
    n = model.flat_elements(role)
    return _Unit(number, model.parameters(role), torch.empty(n, dtype=torch.bfloat16), torch.empty(n, dtype=torch.int16))


def _halves(model: ModelSpec, names: Mapping[str, str], unit: _Unit) -> list[ShardFile]:
    """What of a checkpoint fills a unit."""
    weights = [_stored(model, names, unit, each, "BF16", _part(unit.weights, each)) for each in unit.layout]
    remainder = StoredTensor("remainder", "I16", (len(unit.remainder),), [unit.remainder])
    return [
        ShardFile(weights_file(unit.number, model.units), weights),
        ShardFile(optimizer_file(unit.number, model.units), [remainder]),
    ]


def _exported(model: ModelSpec, names: Mapping[str, str], unit: _Unit, dtype: Dtype) -> ShardFile:
    """A unit's weights in their new dtype; those in bf16 lie where the halves were."""
    tensors = []
    for each in unit.layout:
        high, low = _part(unit.weights, each), _part(unit.remainder, each)
        into = high if dtype == "bf16" else torch.empty(each.elements)
        for place in zip(into.split(PIECE_ELEMENTS), high.split(PIECE_ELEMENTS), low.split(PIECE_ELEMENTS), strict=True):
            place[0].copy_(join(place[1], place[2]))  # torch rounds to nearest even
        tensors.append(_stored(model, names, unit, each, "BF16" if dtype == "bf16" else "F32", into))
    return ShardFile(weights_file(unit.number, model.units), tensors)


def _part(flat: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    return flat[parameter.offset : parameter.offset + parameter.elements]


def _stored(
    model: ModelSpec, names: Mapping[str, str], unit: _Unit, parameter: Parameter, dtype: str, part: torch.Tensor
) -> StoredTensor:
    name = model.unit_prefix(unit.number) + parameter.name
    return StoredTensor(names.get(name, name), dtype, parameter.shape, [part])
