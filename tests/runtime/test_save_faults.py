"""Drives that are full or broken, lanes that fail, users who interrupt: what was saved stays whole, and is named."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from commands import runtime
from runtime import rehearsal, run
from runtime.checkpoints.contents import Contents
from runtime.checkpoints.keeper import SPARE_BYTES, Keeper, check_room, checkpoints, leftovers
from runtime.checkpoints.layout import MANIFEST
from runtime.checkpoints.manifest import Saving
from runtime.checkpoints.resuming import candidates, clear
from runtime.checkpoints.writing import _finite
from runtime.handlers import Handlers
from runtime.lanes import patience, watchdog
from runtime.lanes.clock import Hung, LaneError, RunError
from runtime.storage.disk import Disk
from saved_runs import PLACEMENTS, STEPS, UNTIED, Run, check_same, lose_the_loss, notes_of, planned
from slideplan.graph.tasks import Task
from slideplan.progress import Progress, silent
from slideplan.saving import checkpoint_bytes, weights_bytes
from storage import Fault, FaultyDisk, WatchedCalls, path_of, small_drive

PLAN = planned(UNTIED, **PLACEMENTS["passing"])
SIZE_BYTES = checkpoint_bytes(UNTIED, PLAN.policy)
EVERY = Saving(every=1, keep=STEPS)
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
        done = Run(tmp_path_factory.mktemp("whole") / "run", PLAN, EVERY)
        done.train()
    return done


@pytest.fixture(autouse=True)
def nothing_is_left(whole: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No thread and no descriptor, whatever has happened."""
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
    gc.collect()
    threads, before = set(threading.enumerate()), descriptors()
    yield
    gc.collect()
    assert set(threading.enumerate()) == threads
    assert descriptors() == before


def descriptors() -> list[str]:
    """What this process has open, but for fonts, which whoever draws a picture keeps."""
    links = (path.readlink().name for path in Path("/proc/self/fd").iterdir() if path.is_symlink())
    return sorted(name for name in links if not name.endswith(".ttf"))


@pytest.fixture
def cut(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", PLAN, EVERY)


def saved(run: Run) -> list[int]:
    return [step for step, _ in checkpoints(run.folder / "checkpoints")]


def check_goes_on(cut: Run, whole: Run) -> None:
    """A resume ends as the uninterrupted run, and nothing of what has failed is left."""
    cut.resume()
    check_same(whole, cut)
    assert not leftovers(cut.folder)


# Drives.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("make_folder", ".unfinished-step-00000003"),
        ("create", ".unfinished-step-00000003/*"),
        ("allocate", ".unfinished-step-00000003/optimizer-00004-*"),
        ("write", ".unfinished-step-00000003/model-00002-*"),
        ("sync", ".unfinished-step-00000003/model-00006-*"),
        ("write", f".unfinished-step-00000003/{MANIFEST}"),
        ("rename", ".unfinished-step-00000003"),
    ],
)
def test_a_save_that_fails_once_is_told_and_the_next_one_works(
    cut: Run, whole: Run, operation: str, path: str, code: int
) -> None:
    cut.train(disk=FaultyDisk(Fault(operation, code, path=path)))
    check_same(whole, cut)
    assert saved(cut) == [1, 2, 4, 5]
    assert not leftovers(cut.folder)
    words = {errno.ENOSPC: "No space left on device", errno.EIO: "Input/output error"}[code]
    assert "warning: the state after step 3 was not saved: " in cut.notes
    assert f"{words}; `runtime resume {cut.folder}` goes on from step-00000002" in cut.notes


@pytest.mark.parametrize("operation", ["allocate", "write", "sync"])
def test_a_drive_that_stays_full_ends_the_run_after_its_last_step(cut: Run, whole: Run, operation: str) -> None:
    with pytest.raises(RunError, match=r"the last state was not saved: .*No space left on device") as raised:
        path = ".unfinished-step-0000000[2-9]/*.safetensors"
        cut.train(disk=FaultyDisk(Fault(operation, errno.ENOSPC, forever=True, path=path)))
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-0000000{saved(cut)[-1]}"
    assert saved(cut) == [1]
    assert len(cut.metrics) == STEPS, "training has gone on"
    assert cut.notes.count("was not saved") == STEPS - 1
    check_goes_on(cut, whole)


def test_a_checkpoint_that_was_lost_is_not_made_good_by_weights_alone(cut: Run, whole: Run) -> None:
    last = ".unfinished-step-00000005/optimizer-*"
    with pytest.raises(RunError, match="the last state was not saved"):
        cut.train(saving=Saving(every=2, weights_every=5), disk=FaultyDisk(Fault("create", errno.ENOSPC, path=last)))
    assert [step for step, _ in checkpoints(cut.folder / "weights")] == [5]
    check_goes_on(cut, whole)


def test_weights_alone_that_were_lost_are_told_and_no_more(cut: Run, whole: Run) -> None:
    fault = Fault("create", errno.ENOSPC, path="weights/.unfinished-step-00000005/*")
    cut.train(saving=Saving(weights_every=5), disk=FaultyDisk(fault))
    assert "warning: the weights after step 5 were not saved: " in cut.notes
    check_same(whole, cut)


@pytest.mark.parametrize("forever", [False, True])
def test_metrics_wait_for_a_full_drive(cut: Run, whole: Run, forever: bool) -> None:
    disk = FaultyDisk(Fault("write", errno.ENOSPC, number=3, forever=forever, path="metrics.jsonl"))
    if forever:
        with pytest.raises(RunError, match=r"the last state was not saved: .*metrics\.jsonl: No space left"):
            cut.train(disk=disk)
        assert saved(cut) == [1, 2], "no checkpoint counts steps whose metrics are not safe"
        assert len(cut.metrics) == 2
        check_goes_on(cut, whole)
    else:
        cut.train(disk=disk)
        check_same(whole, cut)
        assert saved(cut) == list(range(1, STEPS + 1))
    assert cut.notes.count("metrics.jsonl: No space left on device: metrics wait in memory") == 1


def test_metrics_of_a_run_that_keeps_nothing_are_missed_at_its_end(cut: Run) -> None:
    with pytest.raises(OSError, match="No space left"):
        cut.train(saving=None, disk=FaultyDisk(Fault("write", errno.ENOSPC, number=3, forever=True, path="metrics.jsonl")))
    assert len(cut.metrics) == 2


@pytest.mark.parametrize("path", ["optimizer-00003-*", "model-00001-*"])
@pytest.mark.parametrize(
    ("operation", "code", "words"),
    [("read", errno.EIO, "Input/output error"), ("open", errno.EACCES, "Permission denied")],
)
def test_a_checkpoint_that_cannot_be_read_now_keeps_its_name(
    cut: Run, whole: Run, path: str, operation: str, code: int, words: str
) -> None:
    cut.train(steps=4)
    with pytest.raises(OSError, match=words) as raised:
        cut.resume(disk=FaultyDisk(Fault(operation, code, path=f"step-00000004/{path}")))
    assert notes_of(raised.value) == "try again; --step takes another checkpoint: there are some after 1, 2, 3"
    assert {path.name for path in (cut.folder / "checkpoints").iterdir()} == {f"step-{step:08}" for step in range(1, 5)}
    check_goes_on(cut, whole)
    assert f"goes on from {cut.folder / 'checkpoints' / 'step-00000004'}: 4 steps done" in cut.notes


@pytest.mark.parametrize("name", ["config.json", MANIFEST])
def test_small_files_that_cannot_be_read_now_say_nothing_of_their_checkpoint(cut: Run, whole: Run, name: str) -> None:
    """Of the newest: nothing older is taken instead. Of another one: it is left out, and stays."""
    cut.train(steps=4)
    with pytest.raises(OSError, match="Input/output error") as raised:
        candidates(cut.folder, silent, disk=FaultyDisk(Fault("read", errno.EIO, path=f"step-00000004/{name}")))
    assert notes_of(raised.value) == "try again; --step takes another checkpoint: there are some after 1, 2, 3"
    shown: list[Progress] = []
    broken = FaultyDisk(Fault("read", errno.EIO, path=f"step-00000002/{name}", forever=True))
    found = candidates(cut.folder, shown.append, disk=broken)
    assert [each.manifest.step for each in found] == [4, 3, 1]
    (warning,) = (each.note for each in shown)
    assert warning == f"warning: {cut.folder}/checkpoints/step-00000002/{name}: Input/output error; it is left out"
    clear(cut.folder, found, broken, silent)
    assert saved(cut) == [1, 2, 3, 4]
    check_goes_on(cut, whole)


def test_a_checkpoint_with_a_shard_that_is_damaged_is_set_aside_and_the_one_before_taken(cut: Run, whole: Run) -> None:
    cut.train(steps=4)
    shard = cut.folder / "checkpoints" / "step-00000004" / "optimizer-00003-of-00006.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    check_goes_on(cut, whole)
    assert "(XXH3 differs); it is called damaged-step-00000004 now, and the one before is taken" in cut.notes
    assert f"goes on from {cut.folder / 'checkpoints' / 'step-00000003'}: 3 steps done" in cut.notes
    assert saved(cut) == [1, 2, 3, 4, 5]


def test_a_step_may_be_damaged_twice(cut: Run, whole: Run) -> None:
    cut.train(steps=4)
    for _ in range(2):
        shard = cut.folder / "checkpoints" / "step-00000004" / "model-00001-of-00006.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        shutil.rmtree(cut.folder / "checkpoints" / "step-00000005", ignore_errors=True)
        cut.resume()
    check_same(whole, cut)
    names = sorted(path.name for path in (cut.folder / "checkpoints").glob("damaged*"))
    assert names == ["damaged-step-00000004", "damaged-step-00000004-2"]


def test_what_is_damaged_is_not_counted_among_those_that_stay(cut: Run, whole: Run) -> None:
    """Nor is anything of it carried on: here a configuration that is not even JSON."""
    keep = Saving(every=1, keep=1)
    cut.train(steps=3, saving=Saving(every=1, keep=2))
    config = cut.folder / "checkpoints" / "step-00000003" / "config.json"
    config.write_bytes(b"?" * len(config.read_bytes()))
    with pytest.raises(RunError, match="not saved"):
        cut.resume(saving=keep, steps=4, disk=FaultyDisk(Fault("create", errno.EIO, path=".unfinished-step-00000004/*")))
    assert "step-00000003 is damaged: it is called damaged-step-00000003 now" in cut.notes
    assert saved(cut) == [3], "done again"
    cut.resume(saving=keep)
    check_same(whole, cut)
    assert saved(cut) == [STEPS]
    last = f"checkpoints/step-{STEPS:08}/config.json"
    assert (cut.folder / last).read_bytes() == (whole.folder / last).read_bytes()


@pytest.mark.parametrize(("most_bytes", "direct"), [(4096, True), (3 * 512, True), (1000, False), (1, False)])
def test_short_writes_and_reads_are_continued(cut: Run, whole: Run, most_bytes: int, direct: bool) -> None:
    if most_bytes == 1:  # byte for byte the manifest and the metrics
        calls = _ShortCalls((".json", ".jsonl"))
        cut.train(steps=3, disk=Disk(calls))
        cut.resume(disk=Disk(calls))
    else:
        cut.train(steps=3, disk=FaultyDisk(most_bytes=most_bytes, direct=direct))
        cut.resume(disk=FaultyDisk(most_bytes=most_bytes, direct=direct))
    check_same(whole, cut)


class _ShortCalls(WatchedCalls):
    def __init__(self, suffixes: tuple[str, ...]) -> None:
        self._suffixes = suffixes

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if operation in ("write", "read") and path_of(arguments[0]).suffix in self._suffixes:
            file, block, offset = arguments
            return call(file, block[:1], offset)
        return call(*arguments)


def test_a_drive_that_is_really_full(tmp_path: Path, whole: Run) -> None:
    """Nobody has looked before how much is free."""
    (drive := tmp_path / "drive").mkdir()
    with small_drive(drive, 4 * SIZE_BYTES):
        cut = Run(drive / "run", PLAN, EVERY)
        with pytest.raises(RunError, match=r"the last state was not saved: .*No space left on device") as raised:
            cut.train(disk=FaultyDisk(free_bytes=1 << 40))
        assert "goes on from step-0000000" in notes_of(raised.value)
        assert len(cut.metrics) == STEPS
        assert not leftovers(cut.folder)
        done = saved(cut)[-1]
        assert 0 < done < STEPS
        shutil.rmtree(cut.folder / "checkpoints" / "step-00000001")
        cut.resume(saving=Saving(keep=1), disk=FaultyDisk(free_bytes=1 << 40))
        check_same(whole, cut)


def test_a_drive_that_others_fill_for_a_while(tmp_path: Path, whole: Run) -> None:
    (drive := tmp_path / "drive").mkdir()
    with small_drive(drive, 128 << 20):
        cut = Run(drive / "run", PLAN, EVERY)
        foreign = drive / "foreign"

        def show(progress: Progress) -> None:
            cut.shown.append(progress)
            if progress.phase == "training" and progress.done == 2 and not progress.note:
                free = Disk().free_bytes(drive)
                subprocess.run(["fallocate", "-l", str(free - (4 << 20)), str(foreign)], check=True)
            if progress.phase == "training" and progress.done == 4:
                foreign.unlink(missing_ok=True)

        run.execute(cut.request, show)
        check_same(whole, cut)
        assert saved(cut) == [1, 4, 5]
        assert "are needed, " in cut.notes


def test_room_is_looked_at_before_the_first_byte(cut: Run) -> None:
    disk = FaultyDisk(free_bytes=SIZE_BYTES)
    with pytest.raises(ValueError, match=rf"{STEPS} checkpoints need .* are free; name a folder on another drive"):
        cut.train(disk=disk)
    assert disk.counts["create"] == disk.counts["make_folder"] == disk.counts["open_or_create"] == 0
    assert {path.name for path in cut.folder.iterdir()} == {"plan.json"}


@pytest.mark.parametrize(("saving", "saves", "weights"), [(Saving(), 1, 0), (Saving(every=2, keep=1, weights_every=2), 2, 2)])
def test_room_is_asked_for_what_is_carried_with_each_save(tmp_path: Path, saving: Saving, saves: int, weights: int) -> None:
    contents = Contents({}, {"tokenizer.json": bytes(5 << 20), "LICENSE": bytes(7)})
    need = saves * SIZE_BYTES + weights * weights_bytes(UNTIED) + (saves + weights) * ((5 << 20) + 7 + SPARE_BYTES)
    check_room(FaultyDisk(free_bytes=need), tmp_path, PLAN, saving, contents, 0, STEPS, 0)
    with pytest.raises(ValueError, match="name a folder on another drive"):
        check_room(FaultyDisk(free_bytes=need - 1), tmp_path, PLAN, saving, contents, 0, STEPS, 0)


def test_what_an_interrupted_save_has_left_is_room(cut: Run, whole: Run) -> None:
    cut.train(steps=3)
    need = (STEPS - 3) * (SIZE_BYTES + SPARE_BYTES)
    left = cut.folder / "checkpoints" / ".unfinished-step-00000004"
    left.mkdir()
    disk = FaultyDisk(free_bytes=need - (1 << 20))
    with pytest.raises(ValueError, match="need"):
        cut.resume(disk=disk)
    (left / "model").write_bytes(b"x" * (2 << 20))
    cut.resume(disk=disk)
    check_same(whole, cut)


def test_a_drive_that_cannot_be_written_any_more(tmp_path: Path, whole: Run) -> None:
    (drive := tmp_path / "drive").mkdir()
    with small_drive(drive, 128 << 20):
        cut = Run(drive / "run", PLAN, EVERY)
        cut.train(steps=3)
        if subprocess.run(["mount", "-o", "remount,ro", str(drive)], check=False, capture_output=True).returncode:
            pytest.skip("nothing can be mounted again here")
        done = runtime("resume", cut.folder, "--steps", STEPS, "--device", "cpu", cwd=tmp_path)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "cannot be written: Read-only file system" in done.stderr
        assert runtime("export", cut.folder, "-o", tmp_path / "out", cwd=tmp_path).returncode == 0, "which writes elsewhere"
        refused = runtime("export", cut.folder, "-o", drive / "out", cwd=tmp_path)
        assert (refused.returncode, refused.stderr.splitlines()[-1].count("Read-only file system")) == (2, 1)


HOLD = "import sys\nfrom pathlib import Path\nfrom runtime.folder import reopened\nwith reopened(Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True)\n    sys.stdin.read()\n"


def test_a_folder_in_which_another_process_runs_is_refused(cut: Run, tmp_path: Path) -> None:
    cut.train(steps=2)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(cut.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        done = runtime("resume", cut.folder, "--device", "cpu", cwd=tmp_path)
        assert done.stderr == f"runtime: {cut.folder}: another process runs in it; wait for it, or stop it\n"
        assert done.returncode == 2
        other.communicate("")
    assert runtime("resume", cut.folder, "--steps", STEPS, "--device", "cpu", cwd=tmp_path).returncode == 0


# Lanes, losses and users, while a save is under way.


class HeldCalls(WatchedCalls):
    """An operation on files of this pattern waits until it is let go; what waits is told."""

    def __init__(self, operation: str, path: str, reached: Callable[[], None] = lambda: None) -> None:
        self.reached, self.let_go = threading.Event(), threading.Event()
        self._operation, self._path = operation, path
        self._then = reached

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if operation == self._operation and path_of(arguments[0]).match(self._path):
            if not self.reached.is_set():
                self.reached.set()
                self._then()
            assert self.let_go.wait(LIMIT_S)
        return call(*arguments)


class Failing:
    """Handlers of which one update of one step fails; meanwhile a save is under way."""

    def __init__(self, error: Exception, step: int, held: HeldCalls | None = None) -> None:
        self.error, self.step, self.held = error, step, held

    def __call__(self, handlers: Handlers, task: Task, step: int) -> Any:
        if step == self.step and task.lane.kind == "compute":
            if self.held is not None:
                assert self.held.reached.wait(LIMIT_S)
                threading.Timer(0.2, self.held.let_go.set).start()
            raise self.error
        return _RUN_TASK(handlers, task, step)


_RUN_TASK = Handlers.issue


def fail(monkeypatch: pytest.MonkeyPatch, failing: Failing) -> None:
    def issue(handlers: Handlers, task: Task, step: int) -> Any:
        return failing(handlers, task, step)

    monkeypatch.setattr(Handlers, "issue", issue)


def test_a_save_under_way_is_finished_when_a_lane_fails(cut: Run, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldCalls("sync", "checkpoints/.unfinished-step-00000003/*.safetensors")
    with monkeypatch.context() as patch:
        fail(patch, Failing(RuntimeError("device is on fire"), 3, held))
        with pytest.raises(LaneError, match=r"lane compute, step 3, task .*: RuntimeError: device is on fire") as raised:
            cut.train(disk=Disk(held))
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000003"
    assert saved(cut) == [1, 2, 3]
    check_goes_on(cut, whole)


def test_out_of_memory_says_what_to_do(cut: Run, whole: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cut.train(steps=2)
    with monkeypatch.context() as patch:
        fail(patch, Failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 3))
        arguments = ("--steps", STEPS, "--save-every", 1, "--device", "cpu")
        done = runtime("resume", cut.folder, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert "runtime: all lanes stopped: lane compute, step 3, task " in said
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB; plan with a smaller --gpu-memory" in said
    assert said.endswith(f"; `runtime resume {cut.folder}` goes on from step-00000003")
    check_goes_on(cut, whole)


def test_a_loss_that_is_not_finite_leaves_what_was_saved(cut: Run, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    cut.train(steps=3)
    before = {path: path.read_bytes() for path in (cut.folder / "checkpoints").rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        lose_the_loss(patch, 3)
        with pytest.raises(RunError) as raised:
            cut.resume()
    assert str(raised.value) == (
        "step 3: the loss is nan; look for NaN in weights and data, or resume with --lr X, a smaller rate, and --step S, an "
        "earlier checkpoint"
    )
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000003"
    assert before == {path: path.read_bytes() for path in (cut.folder / "checkpoints").rglob("*") if path.is_file()}
    check_goes_on(cut, whole)


# Drives that never answer.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_NS", 100_000_000)
    monkeypatch.setattr(patience, "PATIENCE_NS", 1_000_000_000)


def hung(cut: Run, held: HeldCalls) -> Hung:
    """What a run ends by whose drive does not answer; afterwards the drive does."""
    before = set(threading.enumerate())
    with pytest.raises(Hung) as raised:
        cut.train(disk=Disk(held))
    held.let_go.set()
    end = time.monotonic() + LIMIT_S
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end
        time.sleep(0.01)
    return raised.value


@pytest.mark.parametrize(
    ("operation", "path"),
    [
        ("make_folder", "checkpoints/.unfinished-step-00000003"),
        ("create", "checkpoints/.unfinished-step-00000003/optimizer-00004-of-00006.safetensors"),
        ("write", "checkpoints/.unfinished-step-00000003/model-00002-of-00006.safetensors"),
        ("sync", "checkpoints/.unfinished-step-00000003/model-00006-of-00006.safetensors"),
        ("write", f"checkpoints/.unfinished-step-00000003/{MANIFEST}"),
        ("rename", "checkpoints/.unfinished-step-00000003"),
    ],
)
@pytest.mark.usefixtures("impatient")
def test_a_drive_that_never_answers_ends_the_run(cut: Run, whole: Run, operation: str, path: str) -> None:
    error = hung(cut, HeldCalls(operation, path))
    assert str(error).startswith("the drive has not answered for 1,")
    assert str(error).endswith(f"s, asked for {cut.folder / path}")
    assert notes_of(error) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    check_goes_on(cut, whole)


@pytest.mark.usefixtures("impatient")
def test_metrics_that_the_drive_does_not_take_end_the_run(cut: Run) -> None:
    error = hung(cut, HeldCalls("sync", "metrics.jsonl"))
    assert str(error).endswith(f"s, asked for {cut.folder / 'metrics.jsonl'}")
    assert not notes_of(error), "nothing was saved"


@pytest.mark.usefixtures("impatient")
def test_a_lane_fails_while_the_drive_does_not_answer(cut: Run, whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldCalls("sync", "checkpoints/.unfinished-step-00000003/model-00001-*")
    failing = Failing(RuntimeError("device is on fire"), 3)
    with monkeypatch.context() as patch:
        fail(patch, failing)
        error = hung(cut, held)
    assert "model-00001-of-00006.safetensors; what failed first" in str(error)
    assert "; what failed first: lane compute, step 3, task " in str(error)
    assert notes_of(error) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    check_goes_on(cut, whole)


class SlowCalls(WatchedCalls):
    """Every flush takes its time."""

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if operation == "sync":
            time.sleep(0.5)
        return call(*arguments)


@pytest.mark.usefixtures("impatient")
def test_a_drive_that_is_slow_but_answers_is_waited_for(cut: Run) -> None:
    began_ns = time.perf_counter_ns()
    cut.train(steps=1, disk=Disk(SlowCalls()))
    assert time.perf_counter_ns() - began_ns > 2 * patience.PATIENCE_NS
    assert saved(cut) == [1]


# Weights that are not finite.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("saving", [EVERY, Saving(every=2, weights_every=3)], ids=["a checkpoint", "weights alone"])
def test_weights_that_are_not_finite_are_not_saved(
    cut: Run, whole: Run, monkeypatch: pytest.MonkeyPatch, value: float, saving: Saving
) -> None:
    save = Keeper.save

    def poisoned(keeper: Keeper, step: int, *arguments: Any) -> None:
        if step == 3:
            part = keeper._stored.states[2].weights()[-1].parts[0]
            part.write(part.nbytes - 2, torch.tensor([value], dtype=torch.bfloat16).view(torch.uint8))
        save(keeper, step, *arguments)

    name = PLAN.model.unit_prefix(2) + PLAN.model.parameters(PLAN.model.role(2))[-1].name
    with monkeypatch.context() as patch, pytest.raises(RunError) as raised:
        patch.setattr(Keeper, "save", poisoned)
        cut.train(saving=saving)
    assert str(raised.value) == f"step 3: weights of {name} are not finite: the state is not saved"
    way = f"`runtime resume {cut.folder} --lr X`, with a smaller rate, goes on from step-00000002"
    assert notes_of(raised.value) == way, "one way, and no other"
    assert not leftovers(cut.folder)
    assert saved(cut)[-1] == 2
    assert not checkpoints(cut.folder / "weights")
    cut.resume()
    check_same(whole, cut)


def test_a_first_save_of_weights_that_are_not_finite_names_no_earlier_one(cut: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Keeper.save

    def poisoned(keeper: Keeper, *arguments: Any) -> None:
        first = keeper._stored.states[0].weights()[0].parts[0]
        first.write(0, torch.tensor([float("nan")], dtype=torch.bfloat16).view(torch.uint8))
        save(keeper, *arguments)

    monkeypatch.setattr(Keeper, "save", poisoned)
    with pytest.raises(RunError, match=r"not saved; begin again with a smaller --lr$") as raised:
        cut.train()
    assert not notes_of(raised.value)
    assert not saved(cut)
    assert not leftovers(cut.folder)


def test_every_number_of_bf16_is_known_as_finite_or_not() -> None:
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert [_finite(number.view(1).view(torch.uint8)) for number in numbers] == numbers.isfinite().tolist()


# Users.


def interrupting(times: int, held: list[HeldCalls], seen: threading.Event) -> Callable[[], None]:
    """Interrupts the main thread so often, and lets go what waits. seen: set once the first interrupt is heeded."""

    def interrupt() -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)  # a real one: it wakes whoever waits
            assert seen.wait(LIMIT_S)  # two that come together are one
            time.sleep(0.3)
        held[0].let_go.set()

    def begin() -> None:
        threading.Thread(target=interrupt, name="user").start()

    return begin


def interrupted(cut: Run, operation: str, path: str, times: int, **changes: object) -> KeyboardInterrupt:
    held: list[HeldCalls] = []
    seen, first_stop = threading.Event(), run.first_stop
    held.append(HeldCalls(operation, path, interrupting(times, held, seen)))

    def watched(notice: Callable[[KeyboardInterrupt], None]) -> AbstractContextManager[None]:
        def heeded(cause: KeyboardInterrupt) -> None:
            notice(cause)
            seen.set()

        return first_stop(heeded)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
        patch.setattr(run, "first_stop", watched)
        cut.train(disk=Disk(held[0]), **changes)
    for thread in threading.enumerate():
        if thread.name == "user":
            thread.join()
    return raised.value


# Where a save is interrupted: while it is copied, while it is written, while its folder gets its name, and the last one.
MOMENTS = {
    "copied": ("create", ".unfinished-step-00000003/*"),
    "written": ("sync", ".unfinished-step-00000003/*.safetensors"),
    "named": ("rename", ".unfinished-step-00000003"),
    "the last one": ("sync", ".unfinished-step-00000005/*.safetensors"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_impatient_user_ends_a_save_at_once(cut: Run, whole: Run, moment: str) -> None:
    error = interrupted(cut, *MOMENTS[moment], times=2)
    assert notes_of(error) == f"`runtime resume {cut.folder}` goes on from step-0000000{saved(cut)[-1]}"
    assert saved(cut)[-1] in ((4, 5) if moment == "the last one" else (2, 3))
    if saved(cut)[-1] < STEPS:
        check_goes_on(cut, whole)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_user_who_waits_finds_all_steps_saved(cut: Run, whole: Run, moment: str) -> None:
    error = interrupted(cut, *MOMENTS[moment], times=1)
    done = len(cut.metrics)
    assert saved(cut)[-1] == done
    way = (
        f"`runtime resume {cut.folder}` goes on" if done < STEPS else f"`runtime export {cut.folder} -o DIR` takes the weights"
    )
    newest = cut.folder / "checkpoints" / f"step-{done:08}"
    assert notes_of(error) == f"{done} steps are saved in {newest}; {way}"
    if done < STEPS:
        cut.resume()
    check_same(whole, cut)


def test_a_wish_to_stop_while_weights_alone_are_saved_saves_the_state_too(cut: Run, whole: Run) -> None:
    """After the last look at whether this step is to be saved."""
    path = "weights/.unfinished-step-00000002/*"
    interrupted(cut, "create", path, times=1, saving=Saving(weights_every=2))
    assert saved(cut) == [len(cut.metrics)]
    check_goes_on(cut, whole)


@pytest.mark.parametrize("done", [0, 2])
def test_a_wish_to_stop_before_the_first_step(cut: Run, whole: Run, done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if done:
        cut.train(steps=done)
    first_stop = run.first_stop

    def asked_at_once(notice: Callable[[KeyboardInterrupt], None]) -> AbstractContextManager[None]:
        notice(KeyboardInterrupt())
        return first_stop(notice)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as raised:
        patch.setattr(run, "first_stop", asked_at_once)
        cut.train(found=candidates(cut.folder, silent) if done else ())
    assert len(cut.metrics) == done
    if done:
        assert notes_of(raised.value).startswith("2 steps are saved in ")
        check_goes_on(cut, whole)
    else:
        assert not notes_of(raised.value)
        assert not saved(cut)
