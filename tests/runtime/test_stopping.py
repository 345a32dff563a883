"""Runs that are stopped, hung or misnamed, by the command that users have, in processes of their own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from builders import tiny_model
from checkpoints import write_checkpoint
from commands import Done, runtime
from running import EVERYTHING, NO_DRIVE
from runtime.checkpoints.keeper import leftovers
from runtime.checkpoints.layout import MANIFEST
from runtime.checkpoints.resuming import candidates
from saved_runs import TIED, UNTIED, planned, text
from slideplan.codec import save
from slideplan.graph.operations import LOAD_WEIGHTS
from slideplan.progress import silent
from tokenizers_made import gpt2, write_tokenizer

pytestmark = pytest.mark.slow
LIMIT_S = 120.0
# Without state on the SSD: drives that are stuck here hold up saves, and no lane.
PLAN = planned(UNTIED, **EVERYTHING | NO_DRIVE, kernels="fused")

# What is done to the command before it begins: nothing; writes that take a second each once a file `slow` is there; a lane
# that never comes back.
PLAIN = "from runtime.__main__ import main\nmain()\n"
SLOW = """
import os, time
from runtime.storage.calls import Calls
write = Calls.write
def slow(self, file, block, offset):
    if os.path.exists("slow") and file.path.suffix == ".safetensors":
        time.sleep(1)
    return write(self, file, block, offset)
Calls.write = slow
"""
# A drive that does not answer any more once a file `stuck` is there: what it is asked first, and all that it is asked then.
STUCK = """
import os, threading
from runtime.storage.calls import Calls
def stuck(operation):
    call = getattr(Calls, operation)
    def asked(self, *arguments):
        if os.path.exists("stuck") and threading.current_thread() is not threading.main_thread():
            open("reached", "w").close()
            threading.Event().wait()
        return call(self, *arguments)
    setattr(Calls, operation, asked)
for operation in OPERATIONS:
    stuck(operation)
"""
IMPATIENT = """
from runtime.lanes import patience
patience.PATIENCE_NS = 2_000_000_000
"""
HUNG = """
import threading
from runtime.handlers import Handlers
from runtime.lanes import watchdog
from slideplan.graph.operations import LOAD_WEIGHTS
watchdog.LOOK_NS, watchdog.LEAST_PATIENCE_NS = 50_000_000, 5_000_000_000
run = Handlers.issue
def stuck(self, task, step):
    if step == 5 and task.unit == 3 and task.operation == LOAD_WEIGHTS:
        threading.Event().wait()
    return run(self, task, step)
Handlers.issue = stuck
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "plan.json", PLAN)
    text(tmp_path)
    return tmp_path


@contextmanager
def started(folder: Path, *arguments: object, before: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", before + PLAIN, *map(str, arguments)]
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # A group of its own, as a shell gives it: signals of the test reach it alone.
    process = subprocess.Popen(
        command, cwd=folder, stderr=subprocess.PIPE, text=True, start_new_session=True, env=os.environ | {"PYTHONPATH": path}
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


TRAIN = ("execute", "plan.json", "--data", "text.txt", "--steps", 100_000, "--save-every", 3, "--device", "cpu", "-o", "run")


def until(process: subprocess.Popen[str], holds: str, folder: Path, count: int = 1) -> None:
    """Wait for so many of these files, or lines of the metrics."""
    end = time.monotonic() + LIMIT_S
    while True:
        path = folder / holds
        lines = path.read_bytes().count(b"\n") if path.suffix == ".jsonl" and path.exists() else 0
        if lines >= count or (len(list(folder.glob(holds))) >= count and path.suffix != ".jsonl"):
            return
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and last line."""
    stderr = process.communicate(timeout=LIMIT_S)[1]
    assert "Traceback" not in stderr
    return process.returncode, stderr.splitlines()[-1]


def newest(folder: Path) -> int:
    """Steps of the newest checkpoint, which is whole."""
    return candidates(folder / "run", silent)[0].manifest.step


def check_goes_on(folder: Path) -> None:
    """Four steps more end where a run ends that nobody has stopped."""
    steps = newest(folder) + 4
    done = runtime("resume", "run", "--steps", steps, "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert not leftovers(folder / "run")
    arguments = ("--data", "text.txt", "--steps", steps, "--device", "cpu", "-o", "whole")
    done = runtime("execute", "plan.json", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    last = f"checkpoints/step-{steps:08}"
    for path in (folder / "whole" / last).iterdir():
        if path.name != MANIFEST:
            assert path.read_bytes() == (folder / "run" / last / path.name).read_bytes(), path.name
    assert (folder / "whole" / "metrics.jsonl").read_bytes() == (folder / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_a_run_after_its_step_and_its_save(folder: Path, number: signal.Signals, code: int, word: str) -> None:
    with started(folder, *TRAIN) as process:
        until(process, "run/metrics.jsonl", folder, 5)
        process.send_signal(number)
        result, said = ended(process)
    done = newest(folder)
    assert result == code
    assert len((folder / "run" / "metrics.jsonl").read_text().splitlines()) == done
    goes_on = f"{done} steps are saved in run/checkpoints/step-{done:08}; `runtime resume run` goes on"
    assert said.startswith(f"runtime: {word}; {goes_on}")
    check_goes_on(folder)


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_second_signal_ends_it_at_once(folder: Path, number: signal.Signals, code: int, word: str) -> None:
    """In the midst of the save that the first one has asked for."""
    with started(folder, *TRAIN, before=SLOW) as process:
        until(process, "run/checkpoints/step-*", folder)
        (folder / "slow").touch()
        process.send_signal(number)
        assert process.stderr is not None
        while "a second signal stops at once" not in process.stderr.readline():
            assert process.poll() is None
        until(process, "run/checkpoints/.unfinished-*/*.safetensors", folder)
        process.send_signal(number)
        result, said = ended(process)
    assert result == code
    assert said.startswith(f"runtime: {word}; `runtime resume run` goes on from step-{newest(folder):08}")
    assert leftovers(folder / "run"), "it has not waited for the save"
    check_goes_on(folder)


def stuck(*operations: str) -> str:
    return f"OPERATIONS = {operations}{STUCK}"


@pytest.mark.parametrize("operation", ["create", "write", "sync", "rename", "make_folder"])
def test_a_second_signal_ends_a_run_whose_drive_never_answers(folder: Path, operation: str) -> None:
    """The first one asks for a save, which never ends."""
    with started(folder, *TRAIN, before=stuck(operation)) as process:
        until(process, "run/checkpoints/step-00000003", folder)
        (folder / "stuck").touch()
        until(process, "reached", folder)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        while "a second signal stops at once" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.5)
        assert process.poll() is None, "it waits for the save"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        result, said = ended(process)
        took_s = time.monotonic() - began
    assert result == 130
    assert said.startswith(f"runtime: interrupted; `runtime resume run` goes on from step-{newest(folder):08}")
    assert took_s < 6, "a second for threads to end, and some for the interpreter on a busy machine"
    check_goes_on(folder)


# A drive of state that does not answer lanes any more once a file `stuck` is there.
STUCK_LANE = """
import os, threading
from runtime.storage.calls import Calls
call = Calls.{operation}
def asked(self, file, *arguments):
    if file.path.name.startswith(".scratch-") and os.path.exists("stuck"):
        open("reached", "w").close()
        threading.Event().wait()
    return call(self, file, *arguments)
Calls.{operation} = asked
"""


@pytest.mark.parametrize("operation", ["read", "write"])
def test_a_second_signal_ends_a_run_with_a_lane_that_the_drive_holds_up(folder: Path, operation: str) -> None:
    save(folder / "plan.json", planned(UNTIED, **EVERYTHING, kernels="fused"))
    with started(folder, *TRAIN, "--ssd", ".", before=STUCK_LANE.format(operation=operation)) as process:
        until(process, "run/checkpoints/step-00000003", folder)
        (folder / "stuck").touch()
        until(process, "reached", folder)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None, "it waits for the end of the step"
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        result, said = ended(process)
        took_s = time.monotonic() - began
    assert result == 130
    assert said.startswith(f"runtime: interrupted; `runtime resume run` goes on from step-{newest(folder):08}")
    assert took_s < 8, "two seconds for lanes to end, one for threads, and some for the interpreter on a busy machine"


def test_a_drive_that_never_answers_ends_the_run_and_leaves_its_checkpoint(folder: Path) -> None:
    with started(folder, *TRAIN, before=stuck("write") + IMPATIENT) as process:
        until(process, "run/checkpoints/step-00000003", folder)
        (folder / "stuck").touch()
        result, said = ended(process)
    assert result == 1
    assert ", asked for run/checkpoints/.unfinished-step-" in said
    assert said.endswith(f"; `runtime resume run` goes on from step-{newest(folder):08}")
    check_goes_on(folder)


@pytest.mark.parametrize(
    ("command", "operation"),
    [
        (("export", "run", "-o", "out"), "read"),
        (("export", "run", "-o", "out"), "write"),
        (("export", "run", "-o", "out"), "sync"),
        (("resume", "run", "--steps", 9, "--device", "cpu"), "read"),
    ],
)
def test_a_signal_ends_a_command_whose_drive_never_answers(trained: Path, command: tuple[object, ...], operation: str) -> None:
    for name in ("stuck", "reached"):
        (trained / name).unlink(missing_ok=True)
    (trained / "stuck").touch()
    with started(trained, *command, before=stuck(operation)) as process:
        until(process, "reached", trained)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        result, said = ended(process)
        took_s = time.monotonic() - began
    assert (result, said.startswith("runtime: interrupted")) == (130, True)
    assert took_s < 6
    assert not (trained / "out").exists()


def test_a_lane_that_hangs_ends_the_run_and_leaves_its_checkpoint(folder: Path) -> None:
    with started(folder, *TRAIN, before=HUNG) as process:
        result, said = ended(process)
    assert result == 1
    assert said.startswith(f"runtime: lane h2d, step 5, task {LOAD_WEIGHTS}/layer002, unit 3: has not moved for 5")
    assert said.endswith("; `runtime resume run` goes on from step-00000003")
    assert newest(folder) == 3
    check_goes_on(folder)


# Bad input: one line, with the remedy.


def refused(done: Done) -> str:
    """The one line; before it there may be the bar of tokenising, which takes its time."""
    assert done.returncode == 2, done.stderr
    *before, line = done.stderr.splitlines()
    assert line.startswith("runtime: ")
    assert all("━" in each for each in before)
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps."""
    folder = tmp_path_factory.mktemp("trained")
    save(folder / "plan.json", PLAN)
    text(folder)
    done = runtime("execute", "plan.json", "--data", "text.txt", "--steps", 3, "--device", "cpu", "-o", "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("resume", "nothing"), "nothing: is not a folder; name the run folder that `runtime execute` wrote"),
        (("resume", "plan.json"), "plan.json: is not a folder; name the run folder that `runtime execute` wrote"),
        (("resume", "empty"), "empty: holds no plan.json: it is no run folder; name one that `runtime execute` wrote"),
        (("resume", "run/checkpoints/step-00000003"), "holds no plan.json: it is no run folder; name one that"),
        (("resume", "run"), "run: 3 steps are done, --steps is 3; name a larger number to go on, --step S to make"),
        (("resume", "run", "--steps", 2), "run: 3 steps are done, --steps is 2; name a larger number to go on"),
        (("resume", "run", "--step", 2), "run: has no checkpoint after step 2; there are some after 3"),
        (("resume", "run", "--steps", 9, "--lr", -1), "lr is -1.0, must be zero or more"),
        (("resume", "run", "--steps", 9, "--plan", "nothing"), "nothing: cannot be read: No such file"),
        (("resume", "run", "--steps", 9, "--plan", "other.json"), "is not the model that was planned"),
        (("resume", "run", "--steps", 9, "--data", "other.txt"), "its tokens are not those that the run has had until now"),
        (("resume", "run", "--steps", 9, "--keep", 0), "--keep is 0, must be at least 1"),
        (("resume", "run", "--steps", 9, "--save-every", -1), "--save-every is -1, must be at least 0"),
        (("export", "nothing", "-o", "out"), "nothing: is not a folder; name the run folder that `runtime execute` wrote"),
        (("export", "empty", "-o", "out"), "empty: holds no checkpoint; name a run folder of `runtime execute` that has saved"),
        (("export", "run", "-o", "empty"), "empty: exists already; name a new folder with -o"),
        (("export", "run", "-o", "plan.json"), "plan.json: exists already; name a new folder with -o"),
        (("export", "run", "-o", "plan.json/out"), "cannot be written"),
        (("export", "run", "--step", 2, "-o", "out"), "run: has no checkpoint after step 2; there are some after 3"),
    ],
)
def test_bad_input_is_one_line(trained: Path, command: tuple[object, ...], message: str) -> None:
    (trained / "empty").mkdir(exist_ok=True)
    save(trained / "other.json", planned(TIED))
    (trained / "other.txt").write_text((trained / "text.txt").read_text() * 2)
    before = snapshot(trained)
    device = ("--device", "cpu") if command[0] == "resume" else ()
    assert message in refused(runtime(*command, *device, cwd=trained))
    assert snapshot(trained) == before


def test_runs_that_have_not_saved_yet_are_refused(folder: Path) -> None:
    run = folder / "run"
    run.mkdir()
    save(run / "plan.json", PLAN)
    assert "run: holds no checkpoint; name a run folder" in refused(runtime("resume", "run", cwd=folder))
    (run / "checkpoints" / ".unfinished-step-00000002").mkdir(parents=True)
    for command in (("resume", "run"), ("export", "run", "-o", "out")):
        said = refused(runtime(*command, cwd=folder))
        assert "its first checkpoint was not written to its end; remove the folder, and start the run again with" in said
    assert "run: holds plan.json of an earlier run; name another folder" in refused(
        runtime("execute", "plan.json", "--device", "cpu", "-o", "run", cwd=folder)
    )


def test_a_run_needs_its_weights_no_more_and_its_tokenizer_still(tmp_path: Path) -> None:
    """Checkpoints carry it."""
    model = tiny_model(vocabulary=512)
    save(tmp_path / "plan.json", planned(model))
    write_checkpoint(tmp_path / "weights", model)
    write_tokenizer(tmp_path / "weights", gpt2(), eos_token="</s>")
    text(tmp_path)
    arguments = ("--data", "text.txt", "--weights", "weights", "--steps", 2, "--device", "cpu", "-o", "run")
    done = runtime("execute", "plan.json", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "weights")
    done = runtime("resume", "run", "--steps", 3, "--keep", 1, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (tmp_path / "run/checkpoints/step-00000003/tokenizer.json").unlink()
    for command in (("resume", "run", "--steps", 4, "--device", "cpu"), ("export", "run", "-o", "out")):
        said = refused(runtime(*command, cwd=tmp_path))
        assert "run: holds no checkpoint that is whole: run/checkpoints/step-00000003/tokenizer.json: No such file" in said
