"""Keeps what a run has learned: saves its state, whole or not at all, and removes old checkpoints after."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.checkpoints.contents import Contents
from runtime.checkpoints.layout import (
    CHECKPOINTS,
    MANIFEST,
    REMOVED,
    UNFINISHED,
    WEIGHTS,
    index,
    optimizer_file,
    step_name,
    step_of,
    weights_file,
)
from runtime.checkpoints.manifest import Manifest, Saving, StoredFile, content_hash
from runtime.checkpoints.staging import Staging
from runtime.checkpoints.writing import FileWrites, NotFiniteError, ShardFile, require_finite
from runtime.lanes.backend import Backend
from runtime.lanes.clock import RunError
from runtime.lanes.helpers import Helper, ended, grace_ends_ns
from runtime.lanes.patience import Patience
from runtime.metrics import Metrics
from runtime.state import StoredTensor, UnitState
from runtime.storage.disk import Disk
from runtime.storage.locks import HeldError, exclusive
from slideplan.codec import encoded
from slideplan.entry import in_words
from slideplan.measurement import SaveRecord
from slideplan.model import ModelSpec
from slideplan.plan import Plan
from slideplan.progress import Progress, Show
from slideplan.quantities import format_bytes, format_ns
from slideplan.saving import SaveCost, checkpoint_bytes, weights_bytes

PHASE = "saving"
STAT_BLOCK_BYTES = 512  # in which systems count what a file takes
# For folders, the manifest and what the filesystem needs of its own.
SPARE_BYTES = 16 << 20

# What the manifest of a save says, but for its files: told the steps done, and whether the optimizer's part is saved.
Describe = Callable[[int, bool, tuple[StoredFile, ...]], Manifest]


@dataclass(frozen=True)
class Stored:
    """State of a run as files: of each unit those of its weights and of its optimizer, and what lies beside."""

    model: ModelSpec
    states: Sequence[UnitState]
    contents: Contents

    def shards(self, optimizer: bool) -> list[ShardFile]:
        """Files of all units."""
        units = range(self.model.units)
        weights = [ShardFile(weights_file(unit, len(units)), self.weights_of(unit)) for unit in units]
        if not optimizer:
            return weights
        return [ShardFile(optimizer_file(unit, len(units)), self.states[unit].optimizer()) for unit in units] + weights

    def weights_of(self, unit: int) -> list[StoredTensor]:
        """Weights of a unit under the names by which they are stored."""
        prefix, names = self.model.unit_prefix(unit), self.contents.names
        found = [each._replace(name=prefix + each.name) for each in self.states[unit].weights()]
        return [each._replace(name=names.get(each.name, each.name)) for each in found]


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of all saves in a folder of them, oldest first, whole or not."""
    if not folder.is_dir():
        return []
    found = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None and path.is_dir()]
    return sorted(found)


def leftovers(run: Path) -> list[Path]:
    """Folders that an interrupted run has left half-written or half-removed in its own."""
    parents = (run / CHECKPOINTS, run / WEIGHTS)
    return sorted(folder for parent in parents for name in (UNFINISHED, REMOVED) for folder in parent.glob(f"{name}*"))


def check_room(
    disk: Disk,
    run: Path,
    plan: Plan,
    saving: Saving,
    contents: Contents,
    done: int,
    steps: int,
    kept: int,
    taken_bytes: int = 0,
) -> None:
    """Raise ValueError where the drive of a run folder has no room for what a run will save.

    contents: of each save, beside the state
    done, steps: steps of earlier runs, and of all
    kept: checkpoints that are there; what an interrupted run has left beside them makes room
    taken_bytes: of that drive, which the run takes for other things
    """
    saves = -(-steps // saving.every) - done // saving.every if saving.every else 1
    # A new checkpoint is whole before an old one is removed.
    more = max(1, min(saving.keep + 1, kept + saves) - kept)
    beside = contents.size_bytes + SPARE_BYTES
    need = more * (checkpoint_bytes(plan.model, plan.policy) + beside)
    count = f"{more} checkpoints" if more > 1 else "a checkpoint"
    if saving.weights_every and (alone := steps // saving.weights_every - done // saving.weights_every):
        need += alone * (weights_bytes(plan.model) + beside)
        count += f" and {alone} saves of weights"
    left = [path.lstat() for folder in leftovers(run) for path in folder.rglob("*")]
    free = max(0, disk.free_bytes(run) + sum(STAT_BLOCK_BYTES * each.st_blocks for each in left) - taken_bytes)
    if need > free:
        raise ValueError(
            f"{run}: {count} need {format_bytes(need)}, {format_bytes(free)} are free; name a folder on another drive with -o, "
            "save less often or keep fewer (--keep), or train without keeping anything (--no-save)"
        )


def require_room(disk: Disk, folder: Path, need_bytes: int) -> None:
    """Raise OSError (ENOSPC) where the drive of a folder has no room for so much, before any of it is written."""
    free = disk.free_bytes(folder)
    if need_bytes > free:
        raise OSError(errno.ENOSPC, f"{format_bytes(need_bytes)} are needed, {format_bytes(free)} are free", str(folder))


def said_of_saves(plan: Plan, saving: Saving) -> str:
    """What saves add to a run, as planned, in one line; empty where it only saves at its end, or no drive was measured."""
    cost, step_ns = plan.prediction.save, plan.prediction.record.step_ns
    if cost is None:
        return ""
    sizes = {
        "a checkpoint": (saving.every, cost.checkpoint_bytes),
        "a save of the weights": (saving.weights_every, cost.weights_bytes),
    }
    parts = []
    for what, (every, size_bytes) in sizes.items():
        added = cost.added(size_bytes, every, step_ns) if every else None
        if added is not None:
            parts.append(f"{what} of {format_bytes(size_bytes)} every {every} steps adds {added:.1%} to the run")
    return f"as planned {', '.join(parts)}" if parts else ""


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run folder that was written to its end."""
    found = [path for _, path in checkpoints(run / CHECKPOINTS) if (path / MANIFEST).exists()]
    return found[-1] if found else None


class Keeper:
    """Saves the state of one run into its folder, one save at a time. All calls come from the thread that trains.

    Another thread asks the drive for everything: the one that trains only waits for it, and heeds signals meanwhile. All waits
    raise Hung where the drive takes nothing for too long.
    """

    def __init__(
        self,
        folder: Path,
        disk: Disk,
        stored: Stored,
        staging: Staging,
        backend: Backend,
        describe: Describe,
        keep: int,
        cost: SaveCost | None,
        show: Show,
        drive: Patience | None = None,
    ) -> None:
        """keep: checkpoints that stay; of weights alone all do. cost: as planned. drive: from which state is copied, too."""
        self.folder = folder
        self.records: list[SaveRecord] = []
        self.staging = staging
        self._patience = Patience(str(folder), drive)
        self._disk = self._patience.watched(disk)
        self._stored = stored
        self._backend = backend
        self._describe = describe
        self._keep = keep
        self._cost = cost
        self._show = show
        self._saving: tuple[Helper, FileWrites] | None = None
        self._newest = newest(folder)
        self._lost: OSError | None = None  # why the newest checkpoint was not saved
        self._broken: RunError | None = None

    def save(self, step: int, optimizer: bool, metrics: Metrics, drained_ns: int = 0) -> None:
        """Save the state after this many steps, and return once it is copied: training may go on. No lane may be running.

        Waits for the save before. Where the drive is full or fails the user is told, and the run goes on; `finish` raises
        if that was the last checkpoint. Raises RunError for other failures, and where weights are not finite.

        metrics: of the steps before, on the drive before any checkpoint that counts them as done
        drained_ns: what emptying the lanes has cost before
        """
        started_ns = time.perf_counter_ns()
        self._settle()
        shards = self._stored.shards(optimizer)
        size_bytes = sum(shard.size_bytes for shard in shards)
        target = self.folder / (CHECKPOINTS if optimizer else WEIGHTS) / step_name(step)
        unfinished = target.with_name(UNFINISHED + target.name)
        progress = counted(PHASE, size_bytes, self._show)
        writes = FileWrites(self._disk, unfinished, shards, self.staging, self._backend, progress, require_finite)
        copied = threading.Event()

        def run() -> None:
            try:
                try:
                    with self._patience.asked(metrics.path):
                        metrics.sync()
                    self._prepare(unfinished, size_bytes)
                    writes.start().copied()
                    paused_ns = time.perf_counter_ns() - started_ns
                    copied.set()
                    self._end(step, optimizer, unfinished, target, writes)
                except OSError as error:
                    self._fail(step, optimizer, unfinished, error)
                else:
                    took_ns = time.perf_counter_ns() - started_ns
                    self._done(SaveRecord(step, optimizer, size_bytes, drained_ns, paused_ns, took_ns), target)
            except BaseException as error:  # of the device whose memory is copied, say
                self._broken = self._failure(step, error)
            finally:
                copied.set()  # training stands until then
            if self._diverged:
                self._discard(unfinished)

        thread = Helper("checkpoint-save", run)
        self._saving = thread, writes
        thread.start()
        self._patience.wait(copied.wait)
        self._raise_broken()

    def finish(self) -> Path | None:
        """Wait for the last save; the newest checkpoint. Raises RunError where the last checkpoint was not saved."""
        self._settle()
        if self._lost is not None:
            raise RunError(f"the last state was not saved: {in_words(self._lost)}")
        return newest(self.folder)

    def wait(self) -> None:
        """Wait for the save that is being written, whatever comes of it. It is a copy: nothing else has to be in order."""
        if self._saving is not None:
            self._patience.wait(self._saving[0].wait)

    def close(self) -> bool:
        """End what is still being written, in the midst of it: the memory that it reads is given back next.

        Whether it has ended. It has not where the drive holds it up, which is waited for no more than a moment.
        """
        if self._saving is None:
            return True
        thread, writes = self._saving
        by_ns = grace_ends_ns()
        over = writes.abort(by_ns)
        return ended([thread], by_ns) and over

    def remedy(self) -> list[str]:
        """How to go on after a failure, in one line; none where nothing was saved. Not while a save may end.

        The drive is not asked: it may be what has failed.
        """
        if self._newest is None:
            return []
        # The same again would end the same.
        other = (" --lr X", ", with a smaller rate,") if self._diverged else ("", "")
        return [f"`runtime resume {self.folder}{other[0]}`{other[1]} goes on from {self._newest.name}"]

    @property
    def _diverged(self) -> bool:
        """Whether a save has failed for weights that are not finite."""
        return self._broken is not None and isinstance(self._broken.__cause__, NotFiniteError)

    def _settle(self) -> None:
        """Wait for the save that is being written. Raises RunError where something has failed that is not the drive."""
        self.wait()
        self._saving = None
        self._raise_broken()

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise self._broken from self._broken.__cause__

    def _prepare(self, unfinished: Path, size_bytes: int) -> None:
        parent = unfinished.parent
        if not parent.is_dir():
            self._disk.make_folder(parent)
            self._disk.sync_folder(self.folder)
        if unfinished.exists():
            self._disk.remove_folder(unfinished)
        # What an export has held back would take the new one's room. What is held back still is said after the save.
        self._remove_old()
        need = size_bytes + self._stored.contents.size_bytes + SPARE_BYTES
        require_room(self._disk, parent, need)
        self._disk.make_folder(unfinished)

    def _end(self, step: int, optimizer: bool, unfinished: Path, target: Path, writes: FileWrites) -> None:
        """Wait for the state's files, write the others, the manifest last, and give the folder its name."""
        files = writes.finish()
        stored = self._stored
        weights = {weights_file(unit, stored.model.units): stored.weights_of(unit) for unit in range(stored.model.units)}
        for name, content in [*stored.contents.files.items(), index(weights)]:
            self._disk.write(unfinished / name, content)
            files.append(StoredFile(name=name, size_bytes=len(content), xxh128=content_hash(content)))
        manifest = self._describe(step, optimizer, tuple(files)).sealed()
        # All other names are on the drive before the manifest is: with it the folder counts as whole.
        self._disk.sync_folder(unfinished)
        self._disk.write(unfinished / MANIFEST, encoded(manifest))
        self._disk.sync_folder(unfinished)
        self._disk.rename(unfinished, target)
        self._disk.sync_folder(target.parent)

    def _done(self, record: SaveRecord, target: Path) -> None:
        self.records.append(record)
        if record.optimizer:
            self._lost, self._newest = None, target
        planned = None if self._cost is None else self._cost.pause_ns(record.size_bytes)
        rate = record.size_bytes * 1_000_000_000 // max(1, record.took_ns)
        note = (
            f"saved {target}: {format_bytes(record.size_bytes)} in {format_ns(record.took_ns)} ({format_bytes(rate)}/s); "
            f"training paused for {format_ns(record.drained_ns + record.paused_ns)}"
            + ("" if planned is None else f", planned {format_ns(planned)}")
        )
        self._show(Progress(PHASE, record.size_bytes, record.size_bytes, note=note))
        if record.optimizer:
            for note in self._remove_old():
                self._show(Progress(PHASE, 1, 1, note=note))

    def _remove_old(self) -> list[str]:
        """Remove checkpoints beyond those that stay, unless an export may read them; which are left, in words."""
        left = []
        for _, old in checkpoints(self.folder / CHECKPOINTS)[: -self._keep]:
            try:
                with exclusive(self.folder):  # `folder.kept` holds it otherwise
                    self._remove(old)
            except HeldError:
                left.append(f"{old} stays until the next save: this run is being exported")
            except OSError as error:  # the new one is safe
                left.append(f"warning: {old} was not removed: {in_words(error)}")
        return left

    def _remove(self, folder: Path) -> None:
        """Remove a save so that no crash leaves a half of it under its name."""
        removed = folder.with_name(REMOVED + folder.name)
        if removed.exists():
            self._disk.remove_folder(removed)
        self._disk.rename(folder, removed)
        self._disk.sync_folder(folder.parent)
        self._disk.remove_folder(removed)

    def _fail(self, step: int, optimizer: bool, unfinished: Path, error: OSError) -> None:
        """Tell the user that a save has failed, and remove what there is of it."""
        if optimizer:
            self._lost = error
        self._discard(unfinished)
        what = "state after step {} was" if optimizer else "weights after step {} were"
        note = "; ".join([f"warning: the {what.format(step)} not saved: {in_words(error)}", *self.remedy()])
        self._show(Progress(PHASE, 1, 1, note=note))

    def _discard(self, unfinished: Path) -> None:
        """Remove what there is of a save that has failed."""
        with contextlib.suppress(OSError):  # `runtime resume` tries again
            if unfinished.exists():
                self._disk.remove_folder(unfinished)

    def _failure(self, step: int, error: BaseException) -> RunError:
        """What is raised where somebody waits for a save that such an error has ended."""
        if isinstance(error, NotFiniteError):
            # How a run goes on from the newest checkpoint is added where it ends.
            again = "; begin again with a smaller --lr" if self._newest is None else ""
            failure = RunError(f"step {step}: {error}: the state is not saved{again}")
        else:
            failure = RunError(f"the state could not be saved: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


def counted(phase: str, total: int, show: Show) -> Callable[[int], None]:
    """Shows a phase's progress; to be told sizes by several threads."""
    lock = threading.Lock()
    done = 0
    show(Progress(phase, 0, total))

    def more(size: int) -> None:
        nonlocal done
        with lock:  # protects the count, which several threads raise
            done = min(total, done + size)
            show(Progress(phase, done, total))

    return more
