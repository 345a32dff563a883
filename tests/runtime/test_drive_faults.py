"""Drives that fail in the midst of a run, or never answer: what ends the run, what it says, and what is left."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drives import EVERY, NEED, PAGE, PLAN, SCRATCH, Armed, named, several, small_drives, whole_run
from runtime import rehearsal
from runtime.lanes import patience, watchdog
from runtime.lanes.backend import CpuBackend
from runtime.lanes.clock import Hung, LaneError
from runtime.lanes.helpers import held_up
from runtime.memory.speeds import measured_speeds
from runtime.storage.calls import Calls, OpenFile
from runtime.storage.disk import Disk
from saved_runs import Run, check_same, notes_of
from storage import DelayedCalls


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    with small_drives(tmp_path) as mounted:
        yield mounted


class FailingCalls(Calls):
    """The next move of this kind fails, once lanes move slots: with an error; or `short`, from the midst of the slot on."""

    def __init__(self, operation: str, code: int, armed: Armed, short: bool = False) -> None:
        self._operation, self._code, self._armed, self._short = operation, code, armed, short
        self._lock = threading.Lock()  # protects what is left to do, by the drive's threads
        self._half = False

    def _fails(self, operation: str, file: OpenFile, block: memoryview) -> memoryview:
        if operation != self._operation or not self._armed.on.is_set() or not file.path.match(SCRATCH):
            return block
        with self._lock:
            if self._short and not self._half and len(block) > PAGE:
                self._half = True
                return block[:PAGE]
            self._armed.on.clear()
            raise OSError(self._code, os.strerror(self._code), str(file.path))

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        return super().read(file, self._fails("read", file, block), offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        return super().write(file, self._fails("write", file, block), offset)


@pytest.mark.parametrize("folders", [1, 2])
@pytest.mark.parametrize("short", [False, True], ids=["at once", "after a short move"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.ESTALE])
@pytest.mark.parametrize(("operation", "move"), [("read", "ssd>host"), ("write", "host>ssd")])
def test_a_drive_that_fails_in_mid_run_ends_it_by_name(
    tmp_path: Path, whole: Run, operation: str, move: str, code: int, short: bool, folders: int
) -> None:
    """Once: what was saved is whole, and the run goes on from there bit for bit."""
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()
    ssd = several(tmp_path, folders)
    with pytest.raises(LaneError) as raised:
        cut.train(disk=Disk(FailingCalls(operation, code, armed, short)), ssd=ssd)
    lane = "ssd_read" if operation == "read" else "ssd_write"
    said = str(raised.value)
    assert re.match(rf"lane {lane}, step [234], task \w+ {move}/\w+.*, unit \d: ", said), said
    assert re.search(rf"{os.strerror(code)}: '({'|'.join(map(str, ssd))})/.scratch-\w+'$", said), said
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    cut.resume()
    check_same(whole, cut)


class EndingCalls(Calls):
    """A file that ends in the midst of a slot once lanes read: another program has cut it."""

    def __init__(self, armed: Armed) -> None:
        self._armed = armed

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        if self._armed.on.is_set() and file.path.match(SCRATCH):
            return 0
        return super().read(file, block, offset)


def test_a_read_that_finds_the_end_of_the_file_ends_the_run_by_name(tmp_path: Path, whole: Run) -> None:
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()
    with pytest.raises(LaneError, match=r"^lane ssd_read, step \d, task .*, unit \d: OSError: .* ends at byte \d+ instead of"):
        cut.train(disk=Disk(EndingCalls(armed)))
    cut.resume()
    check_same(whole, cut)


class BlockedCalls(Calls):
    """A drive that answers nothing any more once the event is set, until it is let go."""

    def __init__(self, blocked: threading.Event, operation: str) -> None:
        self.let_go, self.reached = threading.Event(), threading.Event()
        self._blocked, self._operation = blocked, operation

    def _pass(self, operation: str, file: OpenFile) -> None:
        if operation == self._operation and file.path.match(SCRATCH) and self._blocked.is_set():
            self.reached.set()
            assert self.let_go.wait(60)

    def read(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._pass("read", file)
        return super().read(file, block, offset)

    def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
        self._pass("write", file)
        return super().write(file, block, offset)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "LOOK_NS", 100_000_000)
    monkeypatch.setattr(watchdog, "LEAST_PATIENCE_NS", 1_000_000_000)
    monkeypatch.setattr(patience, "PATIENCE_NS", 1_000_000_000)


def check_threads_end(before: set[threading.Thread]) -> None:
    end = time.monotonic() + 60
    while set(threading.enumerate()) - before:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.usefixtures("impatient")
def test_a_drive_that_never_answers_is_not_waited_for_before_the_first_step(tmp_path: Path, operation: str) -> None:
    """Nor where weights are filled in."""
    always, before = threading.Event(), set(threading.enumerate())
    always.set()
    run, held = Run(tmp_path / "run", PLAN), BlockedCalls(always, operation)
    with pytest.raises(Hung, match=rf"^the drive has not answered for 1,.* ms, asked for {tmp_path}/.scratch-\w+$"):
        run.train(disk=Disk(held))
    assert "rehearsing the drive" in [each.phase for each in run.shown]
    assert "training" not in [each.phase for each in run.shown]
    held.let_go.set()
    check_threads_end(before)


@pytest.mark.usefixtures("impatient")
def test_drives_that_never_answer_are_not_measured_for_ever(tmp_path: Path) -> None:
    always, before = threading.Event(), set(threading.enumerate())
    always.set()
    held = BlockedCalls(always, "read")
    with pytest.raises(Hung, match=r"asked for .*/one/.scratch-\w+, .*/other/.scratch-\w+$"):
        measured_speeds(Disk(held), named(tmp_path, "one", "other"))
    held.let_go.set()
    check_threads_end(before)


@pytest.mark.parametrize("operation", ["read", "write"])
@pytest.mark.usefixtures("impatient")
def test_a_lane_whose_drive_never_answers_ends_the_run_by_name(tmp_path: Path, whole: Run, operation: str) -> None:
    cut, before = Run(tmp_path / "cut", PLAN, EVERY), set(threading.enumerate())
    cut.shown = armed = Armed()
    held = BlockedCalls(armed.on, operation)
    with pytest.raises(Hung) as raised:
        cut.train(disk=Disk(held))
    said = (
        rf"lane ssd_{operation}, step [234], task .*, unit \d: has not moved for 1,.* ms \(planned: .*\); the drive does not "
    )
    assert re.search(rf"{said}answer, asked for {tmp_path}/.scratch-\w+", str(raised.value))
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    held.let_go.set()
    check_threads_end(before)
    cut.resume()
    check_same(whole, cut)


@pytest.mark.usefixtures("impatient")
def test_a_save_that_copies_from_a_slow_drive_is_waited_for(tmp_path: Path) -> None:
    """As long as the drive answers; so is the rest that comes through parts."""
    run = Run(tmp_path / "run", PLAN)
    run.shown = armed = Armed(1)
    run.train(steps=1, ssd=named(tmp_path, "one"), disk=Disk(DelayedCalls(armed.on, one=0.1)))
    assert float(re.search(r"training paused for ([\d,.]+ (?:s|ms))", run.notes)[1].split()[0].replace(",", "")) > 1.2


@pytest.mark.parametrize("operation", ["read", "write"])
def test_an_interrupt_leaves_lanes_that_the_drive_holds_up(
    tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """The second one, that is; the memory that the drive still fills stays, and the page locks of all memory with it."""
    cut, before, closed = Run(tmp_path / "cut", PLAN, EVERY), set(threading.enumerate()), []
    monkeypatch.setattr(CpuBackend, "close", closed.append)
    cut.shown = armed = Armed()
    held = BlockedCalls(armed.on, operation)

    def interrupt() -> None:
        assert held.reached.wait(60)
        time.sleep(0.3)
        for _ in range(2):  # the first one waits for the end of the step
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)

    user = threading.Thread(target=interrupt)
    user.start()
    with pytest.raises(KeyboardInterrupt) as raised:
        cut.train(disk=Disk(held))
    user.join()
    assert not closed
    assert held_up()
    assert notes_of(raised.value) == f"`runtime resume {cut.folder}` goes on from step-00000002"
    held.let_go.set()
    check_threads_end(before)
    monkeypatch.undo()
    cut.resume()
    check_same(whole, cut)


def test_a_filesystem_that_promises_no_room_and_fills_in_mid_run_ends_the_run(
    tmp_path: Path, small: Callable[[int], Path], whole: Run
) -> None:
    """What is written there fails by name; the checkpoint is whole, and the run goes on once there is room."""
    folder = small(NEED + (2 << 20))
    cut = Run(tmp_path / "cut", PLAN, EVERY)
    cut.shown = armed = Armed()

    class Promising(Calls):
        """Writes no block twice, as some filesystems do: another program takes what is given back."""

        def allocate(self, file: OpenFile, size_bytes: int) -> None:
            pass

        def write(self, file: OpenFile, block: memoryview, offset: int) -> int:
            if armed.on.is_set() and file.path.match(SCRATCH):
                size = os.fstat(file.descriptor).st_size
                os.ftruncate(file.descriptor, offset)
                os.ftruncate(file.descriptor, size)
                with contextlib.suppress(OSError), (folder / "others").open("ab", buffering=0) as others:
                    while others.write(bytes(PAGE)):
                        pass
            return super().write(file, block, offset)

    with pytest.raises(LaneError, match=rf"^lane ssd_write, step \d, task .*, unit \d: .*No space left.*'{folder}/.scratch-"):
        cut.train(ssd=[folder], disk=Disk(Promising()))
    (folder / "others").unlink()
    cut.resume(ssd=[folder])
    check_same(whole, cut)
