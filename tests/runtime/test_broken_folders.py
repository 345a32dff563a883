"""Run folders in which something is broken that is no shard: one line, with what helps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from commands import Done, runtime
from runtime import run
from runtime.checkpoints import export as module
from runtime.checkpoints.manifest import Saving
from saved_runs import UNTIED, Run, planned
from slideplan.codec import save
from storage import FaultyDisk

PLAN = planned(UNTIED)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    done = Run(tmp_path_factory.mktemp("trained") / "run", PLAN, Saving(every=1))
    done.train(steps=2)
    return done


@pytest.fixture
def folder(trained: Run, tmp_path: Path) -> Path:
    """A run of two steps, both of them saved, and nobody else's."""
    shutil.copytree(trained.folder, tmp_path / "run")
    return tmp_path


def resume(folder: Path, *arguments: object) -> Done:
    return runtime("resume", "run", "--steps", 3, "--device", "cpu", *arguments, cwd=folder)


def last(done: Done, code: int = 2) -> str:
    assert done.returncode == code, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_broken_plan_names_the_way_around_it(folder: Path) -> None:
    (folder / "run" / "plan.json").write_text("{}")
    said = last(resume(folder))
    assert said.startswith("runtime: run/plan.json: ")
    assert said.endswith("; name a plan of the same model with --plan")
    save(folder / "mine.json", PLAN)
    assert resume(folder, "--plan", "mine.json").returncode == 0


def test_a_folder_in_the_place_of_options_is_to_be_moved_away(folder: Path) -> None:
    (folder / "run" / "run.json").unlink()
    (folder / "run" / "run.json").mkdir()
    assert last(resume(folder)) == (
        "runtime: run/run.json: cannot be read: Is a directory; without it the options of run/checkpoints/step-00000002 hold: "
        "move it away"
    )


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "model-00003-of-00006.safetensors"])
def test_a_folder_in_the_place_of_a_file_is_damage(folder: Path, name: str) -> None:
    path = folder / "run" / "checkpoints" / "step-00000002" / name
    path.unlink()
    path.mkdir()
    done = resume(folder)
    assert done.returncode == 0, done.stderr
    said = done.stderr.replace("\n", " ")
    assert f"warning: run/checkpoints/step-00000002/{name}: " in said
    assert "step-00000002 is damaged: it is called damaged-step-00000002 now" in said
    assert "goes on from run/checkpoints/step-00000001: 1 steps done" in said


@pytest.mark.parametrize("command", [("resume", "run", "--device", "cpu"), ("export", "run", "-o", "out")])
def test_a_file_in_the_place_of_all_checkpoints_holds_nothing(folder: Path, command: tuple[object, ...]) -> None:
    shutil.rmtree(folder / "run" / "checkpoints")
    (folder / "run" / "checkpoints").write_text("mine")
    assert last(runtime(*command, cwd=folder)) == (
        "runtime: run: its checkpoints is no folder, and holds nothing; remove the run folder, and start the run again with "
        "`runtime execute`"
    )


def test_an_export_to_a_full_drive_asks_for_another_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = module._write

    def to_a_full_one(*arguments: object) -> None:
        *others, _, show = arguments
        write(*others, FaultyDisk(free_bytes=0), show)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write", to_a_full_one)
    said = last(runtime("export", "run", "-o", "out", cwd=folder), 1)
    assert " are needed, 0 B are free; name a folder on another drive with -o" in said
    assert not (folder / "out").exists()


@pytest.mark.parametrize("name", ["prepare", "clear", "Session", "rehearse", "leave_newer"])
def test_whoever_interrupts_a_resume_before_it_goes_on_is_told_how(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, name, interrupt)
        said = last(resume(folder), 130)
    assert said == "runtime: interrupted; nothing new is saved; `runtime resume run` goes on"
    assert resume(folder).returncode == 0
