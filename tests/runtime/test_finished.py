"""A finished run never fails: what is drawn and printed of it may, which is a warning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from commands import runtime
from running import plan_for, session_for
from runtime import report, run
from runtime.checkpoints.manifest import Saving
from runtime.folder import open_metrics
from runtime.lanes.backend import CpuBackend
from runtime.storage.disk import Disk
from runtime.training import Stop, train
from slideplan.codec import save
from slideplan.plan import Plan
from slideplan.progress import silent

MODEL = tiny_model()
PICTURES = {"lanes.png", "trace.json", "comparison.txt"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(MODEL, tiny_policy(MODEL), tiny_workload(), CpuBackend())


@pytest.fixture
def folder(plan: Plan, tmp_path: Path) -> Path:
    save(tmp_path / "plan.json", plan)
    return tmp_path


ARGUMENTS = ("execute", "plan.json", "--steps", 2, "--device", "cpu", "-o", "out")


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "module://nowhere", "nonsense", "TkAgg"])
def test_a_notebooks_drawing_backend_is_no_matter(folder: Path, backend: str) -> None:
    """In a process of its own: matplotlib reads it once."""
    draw = (
        "import sys; sys.path[:0] = sys.argv[1:]\n"
        "from pathlib import Path; from runtime.report import draw_lanes; from slideplan.codec import load\n"
        "from slideplan.plan import Plan; plan = load('plan.json', Plan)\n"
        "draw_lanes(Path('lanes.png'), plan.graph, {'predicted': plan.prediction.record}, 'a plan')\n"
        "import os; print(os.environ['MPLBACKEND'])\n"
    )
    environment = os.environ | {"MPLBACKEND": backend}
    done = subprocess.run(
        [sys.executable, "-c", draw, *sys.path], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{backend}\n"
    assert (folder / "lanes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "broken, file",
    [("draw_lanes", "lanes.png"), ("write_trace", "trace.json"), ("_write_table", "comparison.txt")],
)
@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("no font"), "ValueError: no font"),
        (MemoryError(), "MemoryError: "),
        (OSError(28, "No space left", "x"), "x: No space left"),
    ],
)
def test_a_picture_that_fails_is_a_warning(
    folder: Path, broken: str, file: str, error: Exception, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(report, broken, fail)
    done = runtime(*ARGUMENTS, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"warning: out/{file} was not written: {words}" in done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "out/comparison.json").read_text())
    assert {each.name for each in (folder / "out").iterdir()} & PICTURES == PICTURES - {file}
    assert "in 2 steps; run folder: out; trained weights: out/checkpoints/step-00000002; `runtime export out" in done.stderr
    again = runtime("compare", "out", cwd=folder)
    assert again.returncode == 0
    assert "was not written" in again.stderr


def in_its_own_process(folder: Path, *arguments: object, **streams: Any) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "runtime", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(words, cwd=folder, text=True, check=False, env=environment, **streams)


@pytest.fixture(params=["full", "unread"])
def no_stream(request: pytest.FixtureRequest) -> Iterator[int]:
    """A descriptor to which nothing can be written: of a full disk, or a pipe that nobody reads."""
    if request.param == "full":
        if not Path("/dev/full").exists():
            pytest.skip("no device that is always full")
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("more", [(), ("--json",)], ids=["table", "json"])
def test_a_table_that_cannot_be_printed_is_at_most_a_warning(folder: Path, no_stream: int, more: tuple[str, ...]) -> None:
    done = in_its_own_process(folder, *ARGUMENTS, *more, stdout=no_stream, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert "in 2 steps; run folder: out; trained weights: out/checkpoints/step-00000002" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "out/comparison.json").exists()


def test_a_run_goes_on_where_nobody_can_be_told(folder: Path, no_stream: int) -> None:
    done = in_its_own_process(folder, *ARGUMENTS, "--json", stdout=subprocess.PIPE, stderr=no_stream)
    assert done.returncode == 0
    assert json.loads(done.stdout) == json.loads((folder / "out/comparison.json").read_text())


def test_a_comparison_that_fails_is_a_warning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("nothing was predicted")

    monkeypatch.setattr(report, "compare", fail)
    done = runtime(*ARGUMENTS, cwd=folder)
    assert done.returncode == 0
    assert "out: the run is finished, but was not compared with its plan: ZeroDivisionError: nothing" in done.stderr
    assert json.loads((folder / "out/measurement.json").read_text())["document"] == "measurement"


def test_the_result_is_safe_before_anything_is_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        assert (folder / "out/measurement.json").exists()
        assert (folder / "out/comparison.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_trace", killed)
    done = runtime(*ARGUMENTS, cwd=folder)
    assert done.returncode == 130
    assert (folder / "out/measurement.json").exists()


def test_a_measurement_that_cannot_be_kept_is_no_bad_input(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, document: msgspec.Struct) -> None:
        raise ValueError(f"{path}: cannot be written: Permission denied")

    monkeypatch.setattr(run, "save", refuse)
    done = runtime(*ARGUMENTS, cwd=folder)
    assert done.returncode == 1
    assert "out/measurement.json: cannot be written: Permission denied" in done.stderr
    assert len((folder / "out/metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_names_the_metrics(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    session = session_for(plan, CpuBackend())
    with (
        open_metrics(tmp_path, 0, Disk(), silent) as log,
        pytest.raises(OSError, match="No space left") as raised,
    ):
        train(session, 2, log, None, Saving(), Stop(), silent)
    assert raised.value.filename == str(tmp_path / "metrics.jsonl")


def test_a_run_that_keeps_nothing_says_so(folder: Path) -> None:
    done = runtime(*ARGUMENTS, "--no-save", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "run folder: out; nothing was kept of what was trained (--no-save)" in done.stderr
    assert not (folder / "out/checkpoints").exists()
