"""Begins a run where an earlier one has left a checkpoint; where that is damaged, where the one before was left."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from pathlib import Path
from typing import NamedTuple

from runtime.checkpoints.contents import Contents, names_at
from runtime.checkpoints.keeper import Stored, checkpoints, counted, leftovers
from runtime.checkpoints.layout import CHECKPOINTS, UNFINISHED, WEIGHTS
from runtime.checkpoints.manifest import DamagedError, Manifest, RunDocument, RunRecord, read_manifest
from runtime.checkpoints.reading import read_shards, read_small_files
from runtime.checkpoints.staging import Staging
from runtime.folder import METRICS, RUN, unread
from runtime.inputs.checkpoint import INDEX
from runtime.inputs.data import Position
from runtime.lanes.backend import Backend
from runtime.state import UnitState
from runtime.storage.disk import Disk
from slideplan.codec import parsed
from slideplan.entry import in_words
from slideplan.model import ModelSpec
from slideplan.progress import Progress, Show

PHASE = "reading checkpoint"
# What names of folders begin with that are checkpoints no more: they differ from what was written; or they are whole, and the
# run went on from an earlier one.
DAMAGED, LEFT = "damaged-", "left-"


class Candidate(NamedTuple):
    """A checkpoint whose files are all there in their sizes, those that hold no tensors with their content.

    files: content by name of those; of all but the newest checkpoint the index alone
    """

    folder: Path
    manifest: Manifest
    files: Mapping[str, bytes]


def candidates(run: Path, show: Show, step: int | None = None, disk: Disk | None = None) -> list[Candidate]:
    """Checkpoints of a run folder to go on from, the newest first. What cannot be one is said.

    step: take the one after so many steps, and no other
    Configuration and tokenizer of the first decide what is run, before its tensors are read. Raises ValueError where there
    is none. Raises ValueError or OSError where the newest may be whole, but this version cannot read it, or nobody can now:
    whether an older one is taken instead is the user's to say.
    """
    disk = disk or Disk()
    stored = checkpoints(run / CHECKPOINTS)
    if step is not None:
        stored = _at_step(run, stored, step)
    found: list[Candidate] = []
    problems = []
    for _, folder in reversed(stored):
        try:
            candidate = _candidate(folder, disk)
            # Tokenizers have megabytes, and many checkpoints may be kept.
            found.append(candidate._replace(files={INDEX: candidate.files[INDEX]}) if found else candidate)
        except DamagedError as damage:
            problems.append(str(damage))
        except (OSError, ValueError) as error:
            if not found:
                _offer_others(error, folder)
                raise
            problems.append(in_words(error) if isinstance(error, OSError) else str(error))
    if not found:
        nothing = ValueError(f"{run}: {_nothing(run, problems)}")
        if step is not None:
            _offer_others(nothing, stored[0][1])
        raise nothing
    for problem in problems:
        show(Progress(PHASE, note=f"warning: {problem}; it is left out"))
    return found


def _candidate(folder: Path, disk: Disk) -> Candidate:
    """Raises DamagedError; ValueError and OSError where the checkpoint may be whole, and cannot be used."""
    manifest = read_manifest(folder, disk)
    files = read_small_files(disk, folder, manifest)
    if not manifest.optimizer:
        raise ValueError(f"{folder}: holds the weights alone, from which no run goes on; move it to another folder")
    if INDEX not in files:
        raise DamagedError(f"{folder}: its manifest names no {INDEX}")
    return Candidate(folder, manifest, files)


def _at_step(run: Path, stored: Sequence[tuple[int, Path]], step: int) -> list[tuple[int, Path]]:
    chosen = [each for each in stored if each[0] == step]
    if not chosen:
        steps = ", ".join(str(each) for each, _ in stored)
        raise ValueError(f"{run}: has no checkpoint after step {step}; there are {f'some after {steps}' if steps else 'none'}")
    return chosen


def _offer_others(error: Exception, folder: Path) -> None:
    """Add to an error how to go on without this checkpoint."""
    if isinstance(error, OSError):
        error.add_note("try again")
    if others := [str(step) for step, each in checkpoints(folder.parent) if each != folder]:
        error.add_note(f"--step takes another checkpoint: there are some after {', '.join(others)}")


def asked(run: Path, found: Sequence[Candidate]) -> RunRecord:
    """What was asked of a run the last time, also by a command that has saved nothing.

    Folders of older versions do not say that: there the newest checkpoint does.
    """
    path = run / RUN
    try:
        return parsed(path.read_bytes(), path, RunDocument).run
    except FileNotFoundError:
        return found[0].manifest.run
    except OSError as error:
        problem = f"{path}: cannot be read: {error.strerror}"
    except ValueError as error:
        problem = str(error)
    raise ValueError(f"{problem}; without it the options of {found[0].folder} hold: move it away")


def _nothing(run: Path, problems: Sequence[str]) -> str:
    if problems:
        return f"holds no checkpoint that is whole: {'; '.join(problems)}"
    if os.path.lexists(run / CHECKPOINTS) and not (run / CHECKPOINTS).is_dir():
        return (
            f"its {CHECKPOINTS} is no folder, and holds nothing; remove the run folder, and start the run again with "
            "`runtime execute`"
        )
    if any(run.glob(f"{CHECKPOINTS}/{UNFINISHED}*")):
        return (
            "its first checkpoint was not written to its end; remove the folder, and start the run again with `runtime execute`"
        )
    if (run / METRICS).exists():
        return "its run has saved nothing; remove the folder, and start the run again with `runtime execute`"
    return "holds no checkpoint; name a run folder of `runtime execute` that has saved"


def clear(run: Path, found: Sequence[Candidate], disk: Disk, show: Show) -> None:
    """Remove what an interrupted run has left half-written or half-removed, and set aside what is damaged.

    Else it would count among the checkpoints to be kept. Only for who holds the run's lock. Raises ValueError, and changes
    nothing, where the run is exported and a checkpoint is damaged, or newer than the first that was found.
    """
    usable = {candidate.folder for candidate in found}
    damaged = [folder for _, folder in checkpoints(run / CHECKPOINTS) if folder not in usable and _damaged(folder, disk)]
    with _renaming(run, [*damaged, *_newer(run, CHECKPOINTS, found[0].manifest.step)]):
        for folder in leftovers(run):
            disk.remove_folder(folder)
        for folder in damaged:
            show(Progress(PHASE, note=f"{folder} is damaged: it is called {set_aside(folder, DAMAGED, disk).name} now"))


def _damaged(folder: Path, disk: Disk) -> bool:
    try:
        _candidate(folder, disk)
    except DamagedError:
        return True
    except (OSError, ValueError):  # it may be whole
        pass
    return False


def _newer(run: Path, parent: str, step: int) -> list[Path]:
    """What a run has saved after a step, the newest first."""
    return [folder for each, folder in reversed(checkpoints(run / parent)) if each > step]


def _renaming(run: Path, folders: Sequence[Path]) -> AbstractContextManager[None]:
    """Within, these checkpoints may get other names. Raises ValueError where there are some, and the run is exported."""
    return unread(run) if folders else nullcontext()


def leave_newer(run: Path, step: int, disk: Disk, show: Show) -> None:
    """Set aside what a run has saved after the step from which it goes on: its newest checkpoint is that of this step again.

    Weights alone are set aside too, whether there are newer checkpoints or not: the steps that are made again may be others.
    Raises ValueError, and changes nothing, where the run is exported and a checkpoint is newer.
    """
    newer = _newer(run, CHECKPOINTS, step)
    with _renaming(run, newer):
        # Weights first: as long as there is a newer checkpoint, a run that was stopped in between may go on from there. The
        # newest first: stopped in between, the run is one that has not come as far.
        for folder in (*_newer(run, WEIGHTS, step), *newer):
            aside = set_aside(folder, LEFT, disk)
            show(Progress(PHASE, note=f"{folder} is called {aside.name} now: the run goes on from step {step}"))


def set_aside(folder: Path, why: str, disk: Disk) -> Path:
    """Give a save another name, by which it is none any more: which. why: what the name begins with."""
    names = (f"{why}{folder.name}{f'-{number}' if number > 1 else ''}" for number in count(1))
    aside = next(path for path in map(folder.with_name, names) if not os.path.lexists(path))
    disk.rename(folder, aside)
    disk.sync_folder(folder.parent)
    return aside


class Resume:
    """The start of a run that goes on from the newest of these checkpoints that is whole."""

    def __init__(
        self,
        found: Sequence[Candidate],
        check: Callable[[Manifest], None],
        model: ModelSpec,
        disk: Disk,
        staging: Staging,
        backend: Backend,
    ) -> None:
        """check: raises ValueError where the run must not go on from a checkpoint, whole as it may be."""
        self._found = found
        self._check = check
        self._model = model
        self._disk = disk
        self._staging = staging
        self._backend = backend

    def fill(self, states: Sequence[UnitState], show: Show) -> Position:
        """Write weights, remainders and moments of all units.

        Raises ValueError where no checkpoint is whole, or the run must not go on from the one before; OSError where one that
        may be whole cannot be read now.
        """
        problems = []
        for candidate in self._found:
            self._check(candidate.manifest)
            try:
                self._read(candidate, states, show)
            except DamagedError as damage:
                problems.append(str(damage))
                instead = "" if candidate is self._found[-1] else ", and the one before is taken"
                aside = self._set_aside(candidate.folder, damage)
                show(Progress(PHASE, note=f"warning: {damage}; it is called {aside.name} now{instead}"))
                continue
            except OSError as error:
                _offer_others(error, candidate.folder)
                raise
            return Position(candidate.manifest.step, candidate.manifest.sequences)
        last = self._found[-1].folder
        again = "" if checkpoints(last.parent) else "; start the run again with `runtime execute`"
        nothing = ValueError(f"no checkpoint is whole: {'; '.join(problems)}{again}")
        _offer_others(nothing, last)
        raise nothing

    def _set_aside(self, folder: Path, damage: DamagedError) -> Path:
        try:
            with unread(folder.parent.parent):
                return set_aside(folder, DAMAGED, self._disk)
        except ValueError as exported:
            raise ValueError(f"{damage}; {exported}") from None

    def _read(self, candidate: Candidate, states: Sequence[UnitState], show: Show) -> None:
        folder, manifest, files = candidate
        names = names_at(self._model, folder, files)
        shards = Stored(self._model, states, Contents(names, {})).shards(optimizer=True)
        sizes = {file.name: file.size_bytes for file in manifest.files}
        total = sum(sizes.get(shard.name, 0) for shard in shards)
        changed = read_shards(self._disk, folder, manifest, shards, self._staging, self._backend, counted(PHASE, total, show))
        show(Progress(PHASE, total, total, note=f"goes on from {folder}: {manifest.step} steps done"))
        if changed:
            note = f"state of {changed} units is kept in another format by this plan than in the checkpoint"
            show(Progress(PHASE, total, total, note=note))
