"""Begins a run where an earlier one has left a checkpoint; where that is damaged, where the one before was left."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoints.contents import contents_at
from runtime.checkpoints.keeper import Stored, checkpoints, counted
from runtime.checkpoints.layout import CHECKPOINTS, REMOVED, UNFINISHED, WEIGHTS
from runtime.checkpoints.manifest import DamagedError, Manifest, read_manifest
from runtime.checkpoints.reading import read_shards, read_small_files
from runtime.checkpoints.staging import Staging
from runtime.inputs.data import Position
from runtime.lanes.backend import Backend
from runtime.state import UnitState
from runtime.storage.disk import Disk
from slideplan.model import ModelSpec
from slideplan.progress import Progress, Show

PHASE = "reading checkpoint"
DAMAGED = "damaged-"


class Candidate(NamedTuple):
    """A checkpoint whose files are all there in their sizes."""

    folder: Path
    manifest: Manifest


def candidates(run: Path, show: Show) -> list[Candidate]:
    """Checkpoints of a run folder to go on from, the newest first. What cannot be one is said.

    Raises ValueError where there is none.
    """
    found = []
    problems = []
    for _, folder in reversed(checkpoints(run / CHECKPOINTS)):
        try:
            manifest = read_manifest(folder)
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
        return "its first checkpoint was not written to its end; start the run again with `runtime execute`"
    return "holds no checkpoint; name a run folder of `runtime execute` that has saved"


def clear(run: Path, disk: Disk) -> None:
    """Remove what an interrupted run has left half-written or half-removed. Only for who holds the run's lock."""
    for parent in (run / CHECKPOINTS, run / WEIGHTS):
        for name in (UNFINISHED, REMOVED):
            for folder in parent.glob(f"{name}*"):
                disk.remove_folder(folder)


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
                aside = candidate.folder.with_name(DAMAGED + candidate.folder.name)
                self._disk.rename(candidate.folder, aside)
                show(Progress(PHASE, note=f"warning: {damage}; it is called {aside.name} now, and the one before is taken"))
                continue
            return Position(candidate.manifest.step, candidate.manifest.sequences)
        raise ValueError(f"no checkpoint is whole: {'; '.join(problems)}; start the run again with `runtime execute`")

    def _read(self, candidate: Candidate, states: Sequence[UnitState], show: Show) -> None:
        folder, manifest = candidate
        read_small_files(self._disk, folder, manifest)
        contents = contents_at(self._model, folder)
        shards = Stored(self._model, states, contents).shards(optimizer=True)
        sizes = {file.name: file.size_bytes for file in manifest.files}
        total = sum(sizes.get(shard.name, 0) for shard in shards)
        changed = read_shards(self._disk, folder, manifest, shards, self._staging, self._backend, counted(PHASE, total, show))
        show(Progress(PHASE, total, total, note=f"goes on from {folder}: {manifest.step} steps done"))
        if changed:
            note = f"moments of {changed} units are kept in another precision by this plan than in the checkpoint"
            show(Progress(PHASE, total, total, note=note))
