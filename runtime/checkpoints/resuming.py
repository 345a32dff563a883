"""Begins a run where an earlier one has left a checkpoint; where that is damaged, where the one before was left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoints.contents import Contents, names_at
from runtime.checkpoints.keeper import Stored, checkpoints, counted, leftovers
from runtime.checkpoints.layout import CHECKPOINTS, UNFINISHED
from runtime.checkpoints.manifest import DamagedError, Manifest, read_manifest
from runtime.checkpoints.reading import read_shards, read_small_files
from runtime.checkpoints.staging import Staging
from runtime.folder import METRICS
from runtime.inputs.data import Position
from runtime.lanes.backend import Backend
from runtime.state import UnitState
from runtime.storage.disk import Disk
from slideplan.model import ModelSpec
from slideplan.progress import Progress, Show

PHASE = "reading checkpoint"
DAMAGED = "damaged-"


class Candidate(NamedTuple):
    """A checkpoint whose files are all there in their sizes, those that hold no tensors with their content."""

    folder: Path
    manifest: Manifest


def candidates(run: Path, show: Show, disk: Disk | None = None) -> list[Candidate]:
    """Checkpoints of a run folder to go on from, the newest first. What cannot be one is said.

    Configuration and tokenizer of the first decide what is run, before its tensors are read. Raises ValueError where there
    is none.
    """
    disk = disk or Disk()
    found = []
    problems = []
    for _, folder in reversed(checkpoints(run / CHECKPOINTS)):
        try:
            manifest = read_manifest(folder)
            read_small_files(disk, folder, manifest)
            if manifest.optimizer:
                found.append(Candidate(folder, manifest))
        except DamagedError as damage:
            problems.append(str(damage))
    if not found:
        raise ValueError(f"{run}: {_nothing(run, problems)}")
    for problem in problems:
        show(Progress(PHASE, note=f"warning: {problem}; it is left out"))
    return found


def at_step(run: Path, found: Sequence[Candidate], step: int) -> list[Candidate]:
    """The one after this many steps. Raises ValueError where there is none."""
    chosen = [each for each in found if each.manifest.step == step]
    if not chosen:
        steps = ", ".join(str(each.manifest.step) for each in reversed(found))
        raise ValueError(f"{run}: has no checkpoint after step {step}; there are some after {steps}")
    return chosen


def _nothing(run: Path, problems: Sequence[str]) -> str:
    if problems:
        return f"holds no checkpoint that is whole: {'; '.join(problems)}"
    if any(run.glob(f"{CHECKPOINTS}/{UNFINISHED}*")):
        return (
            "its first checkpoint was not written to its end; remove the folder, and start the run again with `runtime execute`"
        )
    if (run / METRICS).exists():
        return "its run has saved nothing; remove the folder, and start the run again with `runtime execute`"
    return "holds no checkpoint; name a run folder of `runtime execute` that has saved"


def clear(run: Path, found: Sequence[Candidate], disk: Disk) -> None:
    """Remove what an interrupted run has left half-written or half-removed, and set aside what is no candidate.

    Else it would count among the checkpoints to be kept. Only for who holds the run's lock.
    """
    for folder in leftovers(run):
        disk.remove_folder(folder)
    usable = {candidate.folder for candidate in found}
    for _, folder in checkpoints(run / CHECKPOINTS):
        if folder not in usable:
            set_aside(folder, disk)


def set_aside(folder: Path, disk: Disk) -> Path:
    """Give a damaged checkpoint another name: which."""
    names = (f"{DAMAGED}{folder.name}{f'-{number}' if number > 1 else ''}" for number in count(1))
    aside = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    disk.rename(folder, aside)
    disk.sync_folder(folder.parent)
    return aside


class Resume:
    """The start of a run that goes on from the newest of these checkpoints that is whole."""

    def __init__(self, found: Sequence[Candidate], model: ModelSpec, disk: Disk, staging: Staging, backend: Backend) -> None:
        self._found = found
        self._model = model
        self._disk = disk
        self._staging = staging
        self._backend = backend

    def fill(self, states: Sequence[UnitState], show: Show) -> Position:
        """Write weights, remainders and moments of all units. Raises ValueError where no checkpoint is whole."""
        problems = []
        for candidate in self._found:
            try:
                self._read(candidate, states, show)
            except DamagedError as damage:
                problems.append(str(damage))
                aside = set_aside(candidate.folder, self._disk)
                show(Progress(PHASE, note=f"warning: {damage}; it is called {aside.name} now, and the one before is taken"))
                continue
            return Position(candidate.manifest.step, candidate.manifest.sequences)
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}; start the run again with `runtime execute`")

    def _read(self, candidate: Candidate, states: Sequence[UnitState], show: Show) -> None:
        folder, manifest = candidate
        read_small_files(self._disk, folder, manifest)
        contents = Contents(names_at(self._model, folder), {})
        shards = Stored(self._model, states, contents).shards(optimizer=True)
        sizes = {file.name: file.size_bytes for file in manifest.files}
        total = sum(sizes.get(shard.name, 0) for shard in shards)
        changed = read_shards(self._disk, folder, manifest, shards, self._staging, self._backend, counted(PHASE, total, show))
        show(Progress(PHASE, total, total, note=f"goes on from {folder}: {manifest.step} steps done"))
        if changed:
            note = f"moments of {changed} units are kept in another precision by this plan than in the checkpoint"
            show(Progress(PHASE, total, total, note=note))
