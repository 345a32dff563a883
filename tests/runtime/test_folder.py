"""Run folders belong to one run; those of runs that never began are gone again."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier

import msgspec
import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from running import plan_for
from runtime import folder as module
from runtime.checkpoints.manifest import RunRecord, Saving
from runtime.folder import begin_part, claimed, reopened
from runtime.lanes.backend import CpuBackend
from runtime.optimizer.adamw import AdamW
from runtime.storage.disk import Disk
from slideplan.codec import load, save
from slideplan.plan import Plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_for(tiny_model(), tiny_policy(tiny_model()), tiny_workload(), CpuBackend())


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 0, "loss": 5.5}\n')


def test_the_plan_is_in_the_folder_from_the_start(plan: Plan) -> None:
    with claimed(Path("a/b/run"), plan) as folder:
        assert folder == Path("a/b/run")
        assert load(folder / "plan.json", Plan) == plan
        train(folder)
    assert {file.name for file in folder.iterdir()} == {"plan.json", "metrics.jsonl"}


def test_runs_of_one_second_get_folders_of_their_own(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_name", lambda plan: "tiny-20260101-000000")
    with ExitStack() as stack:
        folders = [stack.enter_context(claimed(None, plan)) for _ in range(3)]
    assert [str(folder) for folder in folders] == [f"runs/tiny-20260101-000000{end}" for end in ("", "-2", "-3")]


@pytest.mark.parametrize("exists", [False, True])
def test_of_runs_that_ask_for_one_folder_at_once_one_gets_it(plan: Plan, exists: bool) -> None:
    runs = 8
    for attempt in range(20):
        out, barrier = Path(f"run{attempt}"), Barrier(runs)
        if exists:
            out.mkdir()

        def run(out: Path, barrier: Barrier) -> str:
            barrier.wait()
            try:
                with claimed(out, plan) as folder:
                    train(folder)
                    return "done"
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(runs) as pool:
            ends = list(pool.map(run, [out] * runs, [barrier] * runs))
        assert ends.count("done") == 1
        assert all("name another folder with -o" in end for end in ends if end != "done")
        assert load(out / "plan.json", Plan) == plan


@pytest.mark.parametrize("name", ["plan.json", "run.json", "metrics.jsonl", "measurement.json", "comparison.json"])
def test_a_folder_of_an_earlier_run_is_refused_and_kept(plan: Plan, name: str) -> None:
    Path("run").mkdir()
    Path("run", name).write_text("dear")
    with (
        pytest.raises(ValueError, match=f"run: holds {name} of an earlier run; name another folder with -o"),
        claimed(Path("run"), plan),
    ):
        pytest.fail("was taken")
    assert [(file.name, file.read_text()) for file in Path("run").iterdir()] == [(name, "dear")]


@pytest.mark.parametrize("parent", ["checkpoints", "weights"])
@pytest.mark.parametrize("before", ["", ".unfinished-", "damaged-", "left-"])
def test_a_folder_with_saves_of_another_run_is_refused(plan: Plan, parent: str, before: str) -> None:
    """What is called so and holds none is the user's own."""
    save = Path("run", parent, f"{before}step-00000003")
    save.mkdir(parents=True)
    message = f"run: holds {parent}/{save.name} of an earlier run; name another folder with -o"
    with pytest.raises(ValueError, match=message), claimed(Path("run"), plan):
        pytest.fail("was taken")
    save.rename(save.with_name("model.safetensors"))
    with claimed(Path("run"), plan) as folder:
        train(folder)


@pytest.mark.parametrize("out", [None, Path("a/b/run")])
@pytest.mark.parametrize("error", [ValueError("refused"), KeyboardInterrupt()])
def test_a_run_that_never_began_leaves_nothing(plan: Plan, out: Path | None, error: BaseException, empty: Path) -> None:
    with pytest.raises(type(error)) as raised, claimed(out, plan):
        raise error
    assert list(empty.iterdir()) == []
    assert not hasattr(raised.value, "__notes__")


def test_a_run_that_has_opened_its_metrics_and_written_nothing_leaves_nothing(plan: Plan) -> None:
    with pytest.raises(KeyboardInterrupt) as raised, claimed(Path("run"), plan) as folder:
        begin_part(folder, plan, RunRecord(1, None, True, "auto", 0, AdamW(), Saving()), Disk())
        (folder / "metrics.jsonl").touch()
        raise KeyboardInterrupt
    assert not Path("run").exists()
    assert not hasattr(raised.value, "__notes__")


def test_one_process_at_a_time_has_a_run_folder(plan: Plan) -> None:
    busy = "run: another process runs in it; wait for it, or stop it"
    with claimed(Path("run"), plan) as folder:
        train(folder)
        with pytest.raises(ValueError, match=busy), reopened(folder):
            pass
    with reopened(folder), pytest.raises(ValueError, match=busy), reopened(folder):
        pass
    with reopened(folder):
        pass


@pytest.mark.parametrize("earlier", [False, True])
def test_who_is_refused_leaves_the_folder_to_the_process_that_has_it(plan: Plan, earlier: bool) -> None:
    """Also where that one is only about to put its plan there."""
    with claimed(Path("run"), plan) as folder:
        if earlier:
            train(folder)
        else:
            (folder / "plan.json").unlink()
        before = {file: file.read_bytes() for file in folder.iterdir()}
        with (
            pytest.raises(ValueError, match="run: another process runs in it; name another folder with -o"),
            claimed(folder, plan),
        ):
            pytest.fail("was taken")
        assert {file: file.read_bytes() for file in folder.iterdir()} == before
        assert folder / ".lock" in before
        save(folder / "plan.json", plan)
        with pytest.raises(ValueError, match="another process runs in it"), reopened(folder):
            pytest.fail("was opened")


def test_a_folder_in_which_nothing_goes_on_is_left_as_it_was(plan: Plan) -> None:
    """A folder with a plan, say, that is no run's."""
    Path("mine").mkdir()
    save("mine/plan.json", plan)
    with pytest.raises(ValueError, match="holds no checkpoint"), reopened(Path("mine")):
        raise ValueError("holds no checkpoint")
    with pytest.raises(ValueError, match=r"holds plan\.json of an earlier run"), claimed(Path("mine"), plan):
        pytest.fail("was taken")
    assert [file.name for file in Path("mine").iterdir()] == ["plan.json"]


def test_a_run_that_was_killed_leaves_no_lock_that_holds(plan: Plan) -> None:
    Path("run").mkdir()
    save("run/plan.json", plan)
    Path("run/.lock").touch()
    with reopened(Path("run")):
        pass
    assert [file.name for file in Path("run").iterdir()] == ["plan.json"]


def test_what_was_there_before_stays(plan: Plan) -> None:
    Path("runs").mkdir()
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("mine")
    for out in (None, Path("mine")):
        with pytest.raises(ValueError, match="refused"), claimed(out, plan):
            raise ValueError("refused")
    assert list(Path("runs").iterdir()) == []
    assert [file.name for file in Path("mine").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("error", [RuntimeError("failed"), KeyboardInterrupt()])
def test_a_run_that_began_keeps_what_it_wrote_and_an_interrupt_says_where(plan: Plan, error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, claimed(Path("run"), plan) as folder:
        train(folder)
        raise error
    assert {file.name for file in folder.iterdir()} == {"plan.json", "metrics.jsonl"}
    notes = getattr(raised.value, "__notes__", [])
    assert notes == (["losses so far are in run/metrics.jsonl"] if isinstance(error, KeyboardInterrupt) else [])


@pytest.mark.parametrize("out", ["file/run", "file", "x" * 300, f"{'x' * 300}/run", f"a/b/{'x' * 300}"])
def test_a_folder_that_cannot_be_made_is_refused(plan: Plan, out: str, empty: Path) -> None:
    Path("file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written.*name another with -o"), claimed(Path(out), plan):
        pytest.fail("was taken")
    assert [(file.name, file.read_text()) for file in empty.iterdir()] == [("file", "")]


def test_a_full_disk_names_the_file_and_leaves_nothing(plan: Plan, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(document: Plan) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module, "encoded", full)
    with pytest.raises(OSError, match="No space left") as raised, claimed(None, plan):
        pytest.fail("was taken")
    assert str(raised.value.filename).endswith("plan.json")
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("name", ["../../away", "/away", "a/b c", "", ".", "..", "x" * 5000, "ä\n\0"])
def test_a_models_name_does_not_lead_out_of_runs(plan: Plan, name: str, empty: Path) -> None:
    with claimed(None, msgspec.structs.replace(plan, model=msgspec.structs.replace(plan.model, name=name))) as folder:
        assert folder.parent == Path("runs")
        assert folder.resolve().parent == (empty / "runs").resolve()
        assert "\n" not in folder.name
