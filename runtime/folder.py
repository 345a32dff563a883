"""The folder of a run: made before anything else, for one run and no other, and gone again if the run never began."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import NoReturn

from runtime.checkpoints.layout import CHECKPOINTS, WEIGHTS
from runtime.checkpoints.manifest import RunDocument, RunRecord
from runtime.metrics import Metrics
from runtime.storage.disk import Disk
from runtime.storage.locks import HeldError, exclusive, shared
from slideplan.codec import encoded, unwritable
from slideplan.plan import Plan
from slideplan.progress import Progress, Show

RUNS = Path("runs")
PLAN, RUN, METRICS, LOCK = "plan.json", "run.json", "metrics.jsonl", ".lock"
# What is made of a run once all of its steps are done.
RESULTS = ("measurement.json", "comparison.json", "comparison.txt", "trace.json", "lanes.png")
# Of one run and no other, as patterns. Saves may be unfinished, damaged or left.
OUTPUTS = (PLAN, RUN, METRICS, "measurement.json", "comparison.json", f"{CHECKPOINTS}/*step-*", f"{WEIGHTS}/*step-*")
LONGEST_NAME = 100  # characters of a model's name that a folder's name takes over


@contextlib.contextmanager
def claimed(out: Path | None, plan: Plan) -> Iterator[Path]:
    """A folder that no other run has or gets, with the plan in it: `out`, or by default one of this second in runs/.

    Where the run ends before it has written its first metrics, what was made is removed again. Of two runs that ask for the
    same folder one gets it. Raises ValueError for a folder of an earlier run, or one that cannot be written, OSError where
    the disk is full.
    """
    with new_folders() as made:
        folder = _made(RUNS / _name(plan), made) if out is None else out
        if out is not None:
            make_folders(out, made)
        # The lock comes before the plan: nobody else takes the folder, or goes on in it, while it is taken or given back.
        with _locked(folder, "name another folder with -o", "; name another with -o"):
            _take(folder, plan)
            try:
                yield folder
            except BaseException as error:
                if not _begun(folder):
                    with contextlib.suppress(OSError):
                        for name in (METRICS, RUN, PLAN):
                            (folder / name).unlink(missing_ok=True)
                elif isinstance(error, KeyboardInterrupt):
                    error.add_note(f"losses so far are in {folder / METRICS}")
                raise


@contextlib.contextmanager
def reopened(folder: Path) -> Iterator[None]:
    """The folder of an earlier run, for one process alone. Raises ValueError where it is none or another process has it."""
    _check_folder(folder)
    if not (folder / PLAN).is_file():
        raise ValueError(f"{folder}: holds no {PLAN}: it is no run folder; name one that `runtime execute` wrote")
    with _locked(folder, "wait for it, or stop it"):
        yield


@contextlib.contextmanager
def kept(folder: Path) -> Iterator[None]:
    """Within, no checkpoint of a run folder is removed or gets another name, though the run goes on.

    The folder may be on a drive that can only be read.
    """
    _check_folder(folder)
    with shared(folder):
        yield


@contextlib.contextmanager
def unread(folder: Path) -> Iterator[None]:
    """Within, nobody exports a run folder: its checkpoints may get other names. Raises ValueError where somebody does."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(folder))
        except HeldError:
            raise ValueError(
                f"{folder}: is being exported, and checkpoints would get other names; wait for the export"
            ) from None
        yield


def _check_folder(folder: Path) -> None:
    if not os.path.isdir(folder):  # noqa: PTH112 - `Path.is_dir` raises where a name is too long
        raise ValueError(f"{folder}: is not a folder; name the run folder that `runtime execute` wrote")


@contextlib.contextmanager
def _locked(folder: Path, if_held: str, if_unwritable: str = "") -> Iterator[None]:
    """Hold the lock of a run's folder. The system gives it back when the process ends, however it ends.

    if_held, if_unwritable: what the user can do then
    """
    path = folder / LOCK
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path, os.O_RDWR | os.O_CREAT))
        except HeldError:
            raise ValueError(f"{folder}: another process runs in it; {if_held}") from None
        except OSError as error:
            _refuse(folder, error, if_unwritable)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # only who holds it may


@contextlib.contextmanager
def new_folders() -> Iterator[list[Path]]:
    """Collects the folders that are made within, outermost first.

    If what is done within fails, they are removed again, as far as nothing lies in them.
    """
    made: list[Path] = []
    try:
        yield made
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def make_folders(folder: Path, made: list[Path], may_exist: bool = True) -> None:
    """Make a folder and those above it, and add them to `made`.

    Raises FileExistsError where it is there and must not be, ValueError where it cannot be made, OSError where the disk is
    full.
    """
    # `Path.exists` raises where a name is too long; making the folder says that in words.
    missing = [folder, *(parent for parent in folder.parents if not os.path.exists(parent))]  # noqa: PTH110
    for each in reversed(missing):
        try:
            each.mkdir()
            made.append(each)
            Disk().sync_folder(each.parent)
        except FileExistsError:
            if each == folder and not may_exist:
                raise
            if not each.is_dir():
                raise ValueError(f"{folder}: cannot be written ({each} is no folder); name another with -o") from None
        except OSError as error:
            _refuse(folder, error, "; name another with -o")


def begin_part(folder: Path, plan: Plan, run: RunRecord | None, disk: Disk) -> None:
    """Make a run's folder that of the steps which begin now, by this plan. Everything is on the drive on return.

    run: what the next `runtime resume` takes as asked for; None: what stands there
    """
    # First: they are of the steps before. With another plan beside them they would be wrong, without them nothing is.
    for name in RESULTS:
        if (folder / name).exists():
            disk.remove_file(folder / name)
    disk.sync_folder(folder)
    disk.replace(folder / PLAN, encoded(plan))
    if run is not None:
        disk.replace(folder / RUN, encoded(RunDocument(run=run)))


def open_metrics(folder: Path, first_step: int, disk: Disk, show: Show) -> Metrics:
    """The metrics of a run that goes on with this step. What stands behind the step before is cut off: it is made again.

    Where lines of the steps before are missing, that is said.
    """
    path = folder / METRICS
    end = read = 0
    missing = set(range(first_step))
    if first_step:
        with contextlib.suppress(FileNotFoundError):
            for line in disk.read(path).splitlines(keepends=True):
                read += len(line)
                # A line among the others that somebody has spoiled is no reason to lose those behind it.
                if line.endswith(b"\n") and (step := _step(line)) in range(first_step):
                    end = read
                    missing.discard(step)
    if missing:
        gap = f"has no line of {len(missing)} of the {first_step} steps that are done, the first is step {min(missing)}"
        show(Progress("metrics", note=f"warning: {path}: {gap}; their losses are lost, and the run goes on"))
    log = disk.open_log(path, end)
    try:
        disk.sync_folder(folder)
    except BaseException:
        log.close()
        raise
    return Metrics(log)


def _begun(folder: Path) -> bool:
    """Whether a run has written its first metrics."""
    try:
        return (folder / METRICS).stat().st_size > 0
    except FileNotFoundError:
        return False


def _step(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return None


def _name(plan: Plan) -> str:
    """MODEL-DATE, whatever stands in the model's name."""
    model = re.sub(r"[^\w.-]+", "-", plan.model.name).strip("-.")[:LONGEST_NAME] or "model"
    return f"{model}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def _made(wanted: Path, made: list[Path]) -> Path:
    """A new folder of this name, or with a number behind it where others have come first."""
    for number in count(1):
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        with contextlib.suppress(FileExistsError):
            make_folders(folder, made, may_exist=False)
            return folder
    raise AssertionError("numbers do not end")


def _take(folder: Path, plan: Plan) -> None:
    """Put the plan into a folder that no run has taken. Only for who holds its lock."""
    earlier = [path for pattern in OUTPUTS for path in folder.glob(pattern)]
    if earlier:
        raise ValueError(f"{folder}: holds {earlier[0].relative_to(folder)} of an earlier run; name another folder with -o")
    try:
        (folder / PLAN).write_bytes(encoded(plan))
    except BaseException as error:
        (folder / PLAN).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(folder / PLAN, error) from None
        raise


def _refuse(folder: Path, error: OSError, remedy: str) -> NoReturn:
    refused = unwritable(folder, error)
    raise ValueError(f"{refused}{remedy}") from None if isinstance(refused, ValueError) else refused
