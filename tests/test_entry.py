"""How the commands start and end: signals while they load and run, what is missing, full disks, and `~` in paths."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest

from planner.cli import app as planner_app
from runtime.cli import app as runtime_app
from slideplan.command import path
from slideplan.entry import first_stop

# A command's module: it says when it has been reached, and goes on for long.
BUSY = """
import sys, time
def reached(what):
    print(what, flush=True)
    for _ in range(600):
        time.sleep(0.05)
{loading}
def main():
    {running}
"""
START = "from slideplan.entry import enter; enter('tool', 'busy', 'slideplan[tool]')"


def start(folder: Path, loading: str = "", running: str = "pass", before: str = "") -> subprocess.Popen[str]:
    (folder / "busy.py").write_text(BUSY.format(loading=loading, running=running))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    # A shell that tests run in the background of may ignore SIGINT.
    heeding = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    return subprocess.Popen(
        [sys.executable, "-c", f"{heeding}{before}\n{START}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def after(process: subprocess.Popen[str], number: signal.Signals) -> tuple[int, str]:
    assert process.stdout is not None
    assert process.stdout.readline() == "reached\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


ENDS = [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
# Not every module lets an interrupt through that is raised while it is imported.
SWALLOWING = "try:\n    reached('reached')\nexcept BaseException:\n    raise ImportError('what was that?')"


@pytest.mark.parametrize("number, code, word", ENDS)
@pytest.mark.parametrize("loading", ["reached('reached')", SWALLOWING])
def test_a_signal_while_loading_is_a_word(tmp_path: Path, number: signal.Signals, code: int, word: str, loading: str) -> None:
    assert after(start(tmp_path, loading=loading), number) == (code, f"tool: {word}\n")


@pytest.mark.parametrize("number, code, word", ENDS)
def test_a_signal_while_running_is_a_word(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    assert after(start(tmp_path, running="reached('reached')"), number) == (code, f"tool: {word}\n")


@pytest.mark.parametrize("number, code, word", ENDS)
def test_what_is_left_behind_is_said_with_it(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    running = """
    try:
        reached('reached')
    except KeyboardInterrupt as stop:
        stop.add_note('half is in x')
        raise
"""
    assert after(start(tmp_path, running=running), number) == (code, f"tool: {word}; half is in x\n")


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """nohup, and what a shell leaves in the background."""
    process = start(
        tmp_path, running="print('reached', flush=True); time.sleep(1)", before="signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    )
    assert after(process, signal.SIGTERM) == (0, "")


# A command that ends in order by the first signal, and at once by the second.
ORDERLY = """
    from slideplan.entry import first_stop
    kept = []
    with first_stop(kept.append):
        print('reached', flush=True)
        while not kept:
            time.sleep(0.01)
        print(type(kept[0]).__name__, flush=True)
        {meanwhile}
    print('in order', flush=True)
    {after}
"""
RAISED = "kept[0].add_note('saved'); raise kept[0]"
NUMBERS = [signal.SIGINT, signal.SIGTERM]


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number, code, word", ENDS)
def test_the_first_signal_ends_a_command_in_order(tmp_path: Path, number: signal.Signals, code: int, word: str) -> None:
    process = start(tmp_path, running=ORDERLY.format(meanwhile="pass", after=RAISED))
    assert line(process) == "reached"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    kind = "Terminated" if number == signal.SIGTERM else "KeyboardInterrupt"
    assert (process.returncode, out, err) == (code, f"{kind}\nin order\n", f"tool: {word}; saved\n")


@pytest.mark.parametrize("number, code, word", ENDS)
@pytest.mark.parametrize("first", NUMBERS)
def test_the_second_signal_ends_it_at_once(
    tmp_path: Path, first: signal.Signals, number: signal.Signals, code: int, word: str
) -> None:
    process = start(tmp_path, running=ORDERLY.format(meanwhile="time.sleep(60)", after=RAISED))
    assert line(process) == "reached"
    process.send_signal(first)
    assert line(process) in ("KeyboardInterrupt", "Terminated")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (code, "", f"tool: {word}\n")


@pytest.mark.parametrize("number, code, word", ENDS)
@pytest.mark.parametrize("noticed", ["kept.append(None)", "signal.raise_signal(signal.SIGTERM)"])
def test_after_it_signals_are_heeded_as_before(
    tmp_path: Path, number: signal.Signals, code: int, word: str, noticed: str
) -> None:
    running = f"""
    import signal
    from slideplan.entry import first_stop
    kept = []
    with first_stop(kept.append):
        {noticed}
    assert len(kept) == 1
    reached('reached')
"""
    assert after(start(tmp_path, running=running), number) == (code, f"tool: {word}\n")


def test_a_first_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    running = """
    from slideplan.entry import first_stop
    kept = []
    with first_stop(kept.append):
        print('reached', flush=True)
        time.sleep(1)
    assert not kept
"""
    process = start(tmp_path, running=running, before="signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    assert after(process, signal.SIGTERM) == (0, "")


@pytest.mark.parametrize("number, code, word", ENDS)
def test_a_first_signal_is_noticed_where_the_main_thread_waits(
    tmp_path: Path, number: signal.Signals, code: int, word: str
) -> None:
    """For a lock, say: who holds it must be able to learn of the signal."""
    running = """
    import threading
    from slideplan.entry import first_stop
    kept = []
    lock = threading.Lock()
    def hold():
        with lock:
            print('reached', flush=True)
            while not kept:
                time.sleep(0.01)
    with first_stop(kept.append):
        holder = threading.Thread(target=hold)
        holder.start()
        time.sleep(0.1)
        with lock:
            pass
    raise kept[0]
"""
    assert after(start(tmp_path, running=running), number) == (code, f"tool: {word}\n")


def test_in_another_thread_signals_are_nobodys_first() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    found = []

    def elsewhere() -> None:
        with first_stop(found.append):
            found.extend(signal.getsignal(number) for number in NUMBERS)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == before


def test_handlers_of_others_are_left_alone() -> None:
    """Who runs slideplan as a library may have its own."""
    found: list[object] = []
    usual = signal.signal(signal.SIGINT, lambda number, _: found.append(number))
    try:
        with first_stop(found.append):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert found == [signal.SIGINT]


def test_leaving_waits_for_no_thread_and_loses_no_word(tmp_path: Path) -> None:
    running = """
    import atexit, threading
    from slideplan.entry import leave
    atexit.register(lambda: print('late'))
    threading.Thread(target=threading.Event().wait).start()
    print('said')
    sys.stderr.write('and why')
    leave(7)
"""
    process = start(tmp_path, running=running)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (7, "said\n", "and why")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_leaving_is_kept_by_nothing_that_cannot_be_written() -> None:
    code = "from slideplan.entry import leave; print('said'); leave(1)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered, check=False
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_processes_that_a_command_starts_end_by_sigterm_as_they_would(tmp_path: Path) -> None:
    """Pools of processes are ended so; they must not print that they were."""
    running = """
    import multiprocessing
    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))
    child.start(); child.terminate(); child.join()
    print(child.exitcode)
"""
    process = start(tmp_path, running=running)
    assert process.communicate(timeout=60) == (f"{-signal.SIGTERM}\n", "")


@pytest.mark.parametrize(
    "loading, message",
    [
        ("import torrch", "tool: torrch is not installed; `pip install 'slideplan[tool]'` installs what it needs\n"),
        ("from os import nothing", "tool: cannot be loaded: cannot import name 'nothing'"),
        (
            "import ctypes; ctypes.CDLL('libnothing.so')",
            "tool: cannot be loaded: libnothing.so: cannot open shared",
        ),
    ],
)
def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, loading: str, message: str) -> None:
    process = start(tmp_path, loading=loading)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(message)
    assert len(err.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "module, arguments", [("planner", ["models"]), ("planner", ["machines", "--json"]), ("planner", ["--help"])]
)
def test_output_that_cannot_be_written_is_one_line(module: str, arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (1, f"{module}: stdout: No space left on device\n")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "planner", "models"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert done.stderr == ""


WITHOUT_TORCH = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "numba", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv = ["runtime", "execute", "plan.json"]
from runtime.__main__ import main
main()
"""


def test_runtime_without_torch_says_what_to_install() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "runtime: torch is not installed; `pip install 'slideplan[runtime]'` installs what it needs\n"


@pytest.mark.parametrize("seconds", [0.05, 0.3, 0.8])
@pytest.mark.parametrize("module", ["planner", "runtime"])
def test_an_interrupt_in_the_first_second_is_no_traceback(module: str, seconds: float) -> None:
    """As soon as the command itself runs; the interpreter's own start is not ours."""
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"from {module}.__main__ import main; sys.argv = ['{module}', '--help']; print('up', flush=True); main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) in (
        (130, f"{module}: interrupted\n"),
        (0, ""),
        (-signal.SIGINT, ""),
    )  # the latter: over already


def path_parameters() -> dict[str, Any]:
    """Typer's description of every path that a command takes, by command and parameter."""
    found = {}
    for program, app in (("planner", planner_app), ("runtime", runtime_app)):
        for command in app.registered_commands:
            assert command.callback is not None
            for name, hint in get_type_hints(command.callback, include_extras=True).items():
                if get_origin(hint) is Annotated and Path in (hint.__origin__, *get_args(hint.__origin__)):
                    found[f"{program} {command.callback.__name__} {name}"] = hint.__metadata__[0]
    return found


def test_every_path_of_both_commands_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--data=~/texts` reaches us as it is: shells expand `~` at the beginning of a word alone."""
    monkeypatch.setenv("HOME", "/home/me")
    found = path_parameters()
    assert {"runtime execute data", "runtime execute weights", "runtime execute out", "runtime execute plan"} <= found.keys()
    assert {"planner simulate output", "planner profile output", "runtime compare_run folder"} <= found.keys()
    for name, parameter in found.items():
        assert parameter.parser is not None, f"{name} takes `~` as it is: give it parser=slideplan.command.path"
        assert parameter.parser("~/texts") == Path("/home/me/texts"), name


@pytest.mark.parametrize("text", ["~nobody-of-this-name/x", "a/~", "./~/x"])
def test_what_is_no_home_stays_in_the_path(text: str) -> None:
    assert path(text) == Path(text)
