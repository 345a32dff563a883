"""Turns a checkpoint into a Hugging Face directory of the weights alone, rounded as anybody would round them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from runtime.checkpoints.contents import names_at, with_dtype
from runtime.checkpoints.keeper import SPARE_BYTES, counted, require_room
from runtime.checkpoints.layout import CONFIG, UNFINISHED, index, optimizer_file, weights_file
from runtime.checkpoints.manifest import DamagedError
from runtime.checkpoints.reading import read_shards, read_small_files
from runtime.checkpoints.resuming import Candidate
from runtime.checkpoints.staging import Staging
from runtime.checkpoints.writing import FileWrites, ShardFile
from runtime.folder import make_folders, new_folders
from runtime.inputs.checkpoint import INDEX
from runtime.inputs.weights import PIECE_ELEMENTS
from runtime.lanes.backend import CpuBackend
from runtime.lanes.helpers import grace_ends_ns
from runtime.memory.parts import MemoryPart
from runtime.optimizer.split_master import join
from runtime.state import StoredTensor
from runtime.storage.disk import Disk
from runtime.storage.locks import HeldError, exclusive
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
    checkpoint is whole, OSError where the drive is full or fails: nothing is left then. Only within `folder.kept`: else the
    run may remove what is read.
    """
    if os.path.lexists(out):
        raise ValueError(_there(out))
    with _full_drive_named(), new_folders() as made:
        make_folders(out.parent, made)
        with _unfinished(out, disk) as unfinished:
            taken = _write_newest(found, unfinished, dtype, disk, show)
            try:
                disk.rename(unfinished, out)
            except FileExistsError:  # it was made meanwhile
                raise ValueError(_there(out)) from None
        disk.sync_folder(out.parent)
    return taken


def _there(out: Path) -> str:
    return f"{out}: exists already; name a new folder with -o"


@contextlib.contextmanager
def _full_drive_named() -> Iterator[None]:
    """Whoever exports to a drive that is full is told what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note("name a folder on another drive with -o")
        raise


@contextlib.contextmanager
def _unfinished(out: Path, disk: Disk) -> Iterator[Path]:
    """A hidden folder beside `out`, empty, for one export alone. It is removed if what is done within fails."""
    folder = out.with_name(UNFINISHED + out.name)
    with contextlib.ExitStack() as stack:
        try:
            with contextlib.suppress(FileExistsError):  # of an export that was killed, or still writes
                disk.make_folder(folder)
            stack.enter_context(exclusive(folder))
        except HeldError:
            raise ValueError(f"{out}: another export writes it; wait for it, or name another folder with -o") from None
        except OSError as error:
            raise unwritable(out, error) from None
        try:
            disk.empty_folder(folder)
            yield folder
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # it had its name already
                disk.remove_folder(folder)
            raise


def _write_newest(found: Sequence[Candidate], folder: Path, dtype: Dtype, disk: Disk, show: Show) -> Candidate:
    """Fill an empty folder from the newest of these that is whole; which it was."""
    problems = []
    for number, candidate in enumerate(found, 1):
        try:
            _write(candidate, folder, dtype, disk, show)
            return candidate
        except DamagedError as damage:
            problems.append(str(damage))
            disk.empty_folder(folder)
            if number < len(found):
                run, before = candidate.folder.parent.parent, found[number].manifest.step
                again = f"`runtime resume {run} --step {before}` makes the steps since again"
                show(Progress(PHASE, note=f"warning: {damage}; the checkpoint before is taken; {again}"))
    raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}")


def _write(candidate: Candidate, folder: Path, dtype: Dtype, disk: Disk, show: Show) -> None:
    source, manifest, _ = candidate  # of older ones not all files are held
    files = read_small_files(disk, source, manifest)
    model = model_from_config(source)
    names = names_at(model, source, files)
    element_bytes = WEIGHT_BYTES if dtype == "bf16" else 4
    need = element_bytes * model.parameter_count + sum(map(len, files.values())) + SPARE_BYTES
    require_room(disk, folder.parent, need)
    backend = CpuBackend()
    read, write = (Staging(backend, LEAST_STAGING_BYTES, page_locked=False) for _ in range(2))
    total = sum(file.size_bytes for file in manifest.files if file.name not in files)
    done = counted(PHASE, total, show)
    written: dict[str, Sequence[StoredTensor]] = {}
    not_finite: list[str] = []
    for units in _groups(model):
        halves = [_unit(model, unit) for unit in units]
        shards = [shard for unit in halves for shard in _halves(model, names, unit)]
        read_shards(disk, source, manifest, shards, read, backend, done)
        exported = [_exported(model, names, unit, dtype, not_finite) for unit in halves]
        writes = FileWrites(disk, folder, exported, write, backend, lambda size: None, lambda tensor, piece: None)
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
    if not_finite:
        first = not_finite[0] + (f" and {len(not_finite) - 1} more" if len(not_finite) > 1 else "")
        show(Progress(PHASE, note=f"warning: {source}: weights are not finite: {first}; export an earlier one with --step"))


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
    remainder = StoredTensor("remainder", "I16", (len(unit.remainder),), [MemoryPart(unit.remainder)])
    return [
        ShardFile(weights_file(unit.number, model.units), weights),
        ShardFile(optimizer_file(unit.number, model.units), [remainder]),
    ]


def _exported(model: ModelSpec, names: Mapping[str, str], unit: _Unit, dtype: Dtype, not_finite: list[str]) -> ShardFile:
    """A unit's weights in their new dtype; those in bf16 lie where the halves were. Names of what is not finite are added."""
    tensors = []
    for each in unit.layout:
        high, low = _part(unit.weights, each), _part(unit.remainder, each)
        into = high if dtype == "bf16" else torch.empty(each.elements)
        for place in zip(into.split(PIECE_ELEMENTS), high.split(PIECE_ELEMENTS), low.split(PIECE_ELEMENTS), strict=True):
            place[0].copy_(join(place[1], place[2]))  # torch rounds to nearest even
        tensors.append(_stored(model, names, unit, each, "BF16" if dtype == "bf16" else "F32", into))
        # Smallest and largest are NaN where any is: one pass, and nothing as large as the tensor beside it.
        if not all(bool(end.isfinite()) for end in torch.aminmax(into)):
            not_finite.append(tensors[-1].name)
    return ShardFile(weights_file(unit.number, model.units), tensors)


def _part(flat: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    return flat[parameter.offset : parameter.offset + parameter.elements]


def _stored(
    model: ModelSpec, names: Mapping[str, str], unit: _Unit, parameter: Parameter, dtype: str, part: torch.Tensor
) -> StoredTensor:
    name = model.unit_prefix(unit.number) + parameter.name
    return StoredTensor(names.get(name, name), dtype, parameter.shape, [MemoryPart(part)])
