"""A resume from an earlier checkpoint, with other settings; and what a resume that fails leaves of the run before it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from commands import Done, runtime
from runtime import rehearsal, training
from runtime.checkpoints.keeper import checkpoints
from runtime.checkpoints.layout import MANIFEST
from runtime.checkpoints.manifest import Manifest, RunDocument, Saving, read_manifest
from runtime.checkpoints.resuming import Resume, asked, candidates, clear, leave_newer
from runtime.folder import RESULTS, begin_part
from runtime.inputs.checkpoint import INDEX
from runtime.lanes.clock import RunError
from runtime.storage.disk import Disk
from runtime.training import StepResult
from saved_runs import SETTINGS, STEPS, UNTIED, Run, check_same, lose_the_loss, planned
from slideplan import __version__
from slideplan.codec import encoded, load, save
from slideplan.plan import Plan
from slideplan.progress import silent
from storage import power_losses

PLAN, OTHER = planned(UNTIED, resident_state=(1,)), planned(UNTIED, window=3)
EVERY = Saving(every=1, weights_every=2, keep=STEPS)


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


@pytest.fixture
def done(tmp_path: Path) -> Run:
    """A finished run that has saved after each of its five steps."""
    found = Run(tmp_path / "run", PLAN, EVERY)
    found.train()
    return found


def names(run: Run, parent: str = "checkpoints") -> set[str]:
    return {path.name for path in (run.folder / parent).iterdir()}


def steps(*numbers: int, before: str = "") -> set[str]:
    return {f"{before}step-{number:08}" for number in numbers}


def resume(run: Run, *arguments: object, code: int = 0) -> Done:
    found = runtime("resume", run.folder, "--device", "cpu", *arguments, cwd=run.folder.parent)
    assert found.returncode == code, found.stderr
    return found


def manifest(run: Run, step: int) -> Manifest:
    return read_manifest(run.folder / "checkpoints" / f"step-{step:08}")


def last(found: Done) -> str:
    return found.stderr.splitlines()[-1]


def snapshot(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}


def spoil(path: Path) -> None:
    """Change a bit of its last byte."""
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


# An earlier checkpoint.


def test_steps_after_an_earlier_checkpoint_are_made_again_and_those_that_were_there_are_kept(done: Run) -> None:
    before, metrics = done.state(), done.metrics
    done.resume(step=2)
    assert f"goes on from {done.folder / 'checkpoints' / 'step-00000002'}: 2 steps done" in done.notes
    assert "checkpoints/step-00000005 is called left-step-00000005 now: the run goes on from step 2" in done.notes
    assert names(done) == steps(1, 2, 3, 4, 5) | steps(3, 4, 5, before="left-")
    assert names(done, "weights") == steps(2, 4) | steps(4, before="left-")
    assert done.metrics == metrics
    assert all(torch.equal(value, before[name]) for name, value in done.state().items())
    done.resume(step=4)
    assert names(done) >= {"left-step-00000005", "left-step-00000005-2"}


def test_weights_alone_that_are_newer_are_left_though_no_checkpoint_is(done: Run) -> None:
    """With another rate their steps are others."""
    done.resume(steps=7, saving=Saving(every=5, weights_every=2, keep=STEPS))
    (done.folder / "checkpoints" / "step-00000007").rename(done.folder.parent / "gone")
    done.resume(steps=6, saving=EVERY, settings=dataclasses.replace(SETTINGS, lr=1e-5))
    assert names(done, "weights") == steps(2, 4, 6) | steps(6, before="left-")
    folders = [done.folder / "weights" / f"{before}step-00000006" for before in ("", "left-")]
    assert [read_manifest(folder).run.settings.lr for folder in folders] == [1e-5, SETTINGS.lr]


def test_a_run_that_is_killed_as_it_goes_back_keeps_no_stale_weights(done: Run, tmp_path: Path) -> None:
    """At any change: where the newer checkpoints are gone, the newer weights are."""

    def act(disk: Disk, folder: Path) -> None:
        leave_newer(folder, 2, disk, silent)

    (tmp_path / "scratch").mkdir()
    for disk in power_losses(tmp_path / "scratch", done.folder, act):
        for seed in range(3):
            left = tmp_path / "left"
            disk.after_power_loss(seed, left)
            if candidates(left, silent)[0].manifest.step == 2:
                assert [step for step, _ in checkpoints(left / "weights")] == [2]
            shutil.rmtree(left)


def test_what_is_left_is_whole_and_counts_for_nothing(done: Run) -> None:
    whole = read_manifest(done.folder / "checkpoints" / "step-00000005")
    done.resume(step=3, saving=Saving(every=1, keep=1))
    assert names(done) == steps(5) | steps(4, 5, before="left-")
    assert read_manifest(done.folder / "checkpoints" / "left-step-00000005") == whole


def test_a_step_that_was_not_saved_names_those_that_were(done: Run) -> None:
    before = snapshot(done)
    said = last(resume(done, "--step", 7, code=2))
    assert said == f"runtime: {done.folder}: has no checkpoint after step 7; there are some after 1, 2, 3, 4, 5"
    assert snapshot(done) == before


def test_a_step_that_is_damaged_is_not_exchanged_for_another(done: Run) -> None:
    """The one that was asked for, or none; whatever part of it is damaged."""
    spoil(done.folder / "checkpoints" / "step-00000003" / "config.json")
    spoil(done.folder / "checkpoints" / "step-00000002" / "model-00002-of-00006.safetensors")
    said = last(resume(done, "--step", 3, code=2))
    assert "step-00000003/config.json: was changed since it was written" in said
    assert said.endswith("; --step takes another checkpoint: there are some after 1, 2, 4, 5")
    said = last(resume(done, "--step", 2, code=2))
    assert "no checkpoint is whole: " in said
    assert said.endswith("(XXH3 differs); --step takes another checkpoint: there are some after 1, 4, 5")
    assert names(done) == steps(1, 4, 5) | steps(2, 3, before="damaged-")


def test_a_smaller_rate_holds_from_the_checkpoint_on_and_for_later_resumes(done: Run) -> None:
    before = done.metrics
    resume(done, "--step", 2, "--lr", 1e-5, "--weight-decay", 0.5)
    after = done.metrics
    assert after[:3] == before[:3], "the loss of a step is that of the weights before it"
    assert after[3:] != before[3:]
    assert len(after) == STEPS
    assert manifest(done, 2).run.settings == SETTINGS
    for step in (3, STEPS):
        settings = manifest(done, step).run.settings
        assert (settings.lr, settings.weight_decay, settings.beta1) == (1e-5, 0.5, SETTINGS.beta1)
    resume(done, "--steps", 6)
    assert manifest(done, 6).run.settings.lr == 1e-5


def test_a_loss_that_is_not_finite_names_the_way_back(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        lose_the_loss(patch, 6)
        said = last(resume(done, "--steps", 8, code=1))
    assert said == (
        "runtime: step 6: the loss is nan; look for NaN in weights and data, or resume with --lr X, a smaller rate, and "
        f"--step S, an earlier checkpoint; `runtime resume {done.folder}` goes on from step-00000006"
    )
    resume(done, "--step", 4, "--lr", 1e-6)
    assert len(done.metrics) == 8


# Checkpoints that are whole and cannot be used.


def of_another_version(run: Run, step: int) -> None:
    path = run.folder / "checkpoints" / f"step-{step:08}" / MANIFEST
    path.write_bytes(encoded(msgspec.structs.replace(load(path, Manifest), format_version=99, version="9.1").sealed()))


def test_a_checkpoint_of_another_version_is_refused_and_keeps_its_name(done: Run) -> None:
    of_another_version(done, 5)
    before = snapshot(done)
    out = done.folder.parent / "out"
    for command in (("resume", done.folder, "--steps", 9), ("export", done.folder, "-o", out)):
        refused = runtime(*command, cwd=done.folder.parent)
        assert refused.returncode == 2
        assert last(refused) == (
            f"runtime: {done.folder}/checkpoints/step-00000005/manifest.json: was written by slideplan 9.1 (format 99), which "
            f"this one, {__version__} (format 1), cannot read; use slideplan 9.1; --step takes another checkpoint: there are "
            "some after 1, 2, 3, 4"
        )
    assert snapshot(done) == before
    resume(done, "--step", 4)
    assert names(done) == steps(1, 2, 3, 4, 5) | steps(5, before="left-")


def test_an_older_checkpoint_of_another_version_is_left_out_and_keeps_its_name(done: Run) -> None:
    of_another_version(done, 3)
    said = resume(done, "--steps", 6).stderr.replace("\n", " ")
    assert "step-00000003/manifest.json: was written by slideplan 9.1" in said
    assert names(done) == steps(2, 3, 4, 5, 6)


def test_a_number_of_a_version_that_somebody_has_changed_is_damage(done: Run) -> None:
    path = done.folder / "checkpoints" / "step-00000005" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    said = resume(done).stderr.replace("\n", " ")
    assert "manifest.json: was changed since it was written" in said
    assert names(done) == steps(1, 2, 3, 4, 5) | steps(5, before="damaged-")


# A finished run whose newest checkpoint is damaged.


def test_missing_steps_of_a_finished_run_are_made_again(done: Run, tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", PLAN, EVERY)
    whole.train()
    (done.folder / "checkpoints" / "step-00000005" / "config.json").unlink()
    said = resume(done).stderr.replace("\n", " ")
    assert "step-00000005 is damaged: it is called damaged-step-00000005 now" in said
    check_same(whole, done)
    spoil(done.folder / "checkpoints" / "step-00000005" / "model-00001-of-00006.safetensors")
    assert "--step S to make the steps after an earlier checkpoint again" in last(resume(done, code=2))
    resume(done, "--step", 4)
    check_same(whole, done)


# What a resume leaves that fails.


@pytest.fixture
def compared(done: Run) -> Run:
    """With its results."""
    found = runtime("compare", done.folder, cwd=done.folder)
    assert found.returncode == 0, found.stderr
    assert all((done.folder / name).exists() for name in RESULTS)
    save(done.folder.parent / "other.json", OTHER)
    return done


def fails_at(step: int, patch: pytest.MonkeyPatch) -> None:
    result_of = training.result_of

    def broken(*where: Any) -> StepResult:
        found = result_of(*where)
        if found.step == step:
            raise RunError("the power goes off")
        return found

    patch.setattr(training, "result_of", broken)


def test_what_fails_before_the_run_goes_on_changes_nothing(compared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    before = snapshot(compared)
    with monkeypatch.context() as patch:
        patch.setattr(Resume, "fill", fail)
        resume(compared, "--steps", 9, "--step", 3, "--plan", "other.json", "--lr", 1e-5, code=1)
    assert snapshot(compared) == before


def test_results_of_the_steps_before_go_when_the_run_goes_on(compared: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fails_at(6, patch)
        resume(compared, "--steps", 9, "--plan", "other.json", code=1)
    assert load(compared.folder / "plan.json", Plan) == OTHER
    assert not [name for name in RESULTS if (compared.folder / name).exists()]
    refused = runtime("compare", compared.folder, cwd=compared.folder)
    assert refused.returncode == 2
    assert f"holds no measurement.json yet: its run was not finished; `runtime resume {compared.folder}`" in refused.stderr
    resume(compared)
    assert all((compared.folder / name).exists() for name in RESULTS)


def test_options_hold_that_a_resume_was_given_which_has_saved_nothing(done: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = done.folder.parent / "elsewhere.txt"
    (done.folder.parent / "text.txt").rename(elsewhere)
    options = ("--steps", 12, "--save-every", 4, "--save-weights-every", 0, "--keep", 1, "--data", elsewhere, "--lr", 1e-5)
    with monkeypatch.context() as patch:
        fails_at(6, patch)
        resume(done, *options, code=1)
    assert names(done) == steps(1, 2, 3, 4, 5), "nothing was saved"
    resume(done)
    assert names(done) == steps(12)
    run = manifest(done, 12).run
    assert (run.steps, run.saving, run.settings.lr) == (12, Saving(every=4, keep=1), 1e-5)
    assert run.data == str(elsewhere)
    assert load(done.folder / "run.json", RunDocument).run == run


def test_a_resume_that_keeps_nothing_leaves_what_was_asked_for(done: Run) -> None:
    resume(done, "--steps", 9, "--no-save")
    assert load(done.folder / "run.json", RunDocument).run == manifest(done, STEPS).run


def test_a_folder_of_an_older_version_goes_by_its_newest_checkpoint(done: Run) -> None:
    (done.folder / "run.json").unlink()
    (done.folder / "checkpoints" / "step-00000005" / "config.json").unlink()
    resume(done)
    assert manifest(done, STEPS).run == manifest(done, 4).run
    (done.folder / "run.json").write_text("{")
    said = last(resume(done, "--steps", 6, code=2))
    assert "run.json: not valid JSON" in said
    assert said.endswith(f"; without it the options of {done.folder}/checkpoints/step-00000005 hold: move it away")


def test_a_resume_whose_power_goes_off_as_it_goes_back_leaves_a_run(compared: Run, tmp_path: Path) -> None:
    """At any change: there is a checkpoint, and no result of another plan or of steps that are gone."""

    def act(disk: Disk, folder: Path) -> None:
        found = candidates(folder, silent, 2)
        clear(folder, found, disk, silent)
        leave_newer(folder, 2, disk, silent)
        begin_part(folder, OTHER, msgspec.structs.replace(asked(folder, found), steps=9), disk)

    seen = set()
    (tmp_path / "scratch").mkdir()
    for disk in power_losses(tmp_path / "scratch", compared.folder, act):
        for seed in (0, 1, 1 + disk.changes):
            left = tmp_path / "left"
            disk.after_power_loss(seed, left)
            step = candidates(left, silent)[0].manifest.step
            seen.add(step)
            plan, run = load(left / "plan.json", Plan), asked(left, candidates(left, silent))
            assert plan in (PLAN, OTHER)
            if plan == OTHER or run.steps == 9:
                assert step == 2
                assert not [name for name in RESULTS if (left / name).exists()]
            if not disk.stopped:
                assert (plan, run.steps, step) == (OTHER, 9, 2)
            assert {each for each, _ in checkpoints(left / "checkpoints")} == set(range(1, step + 1))
            shutil.rmtree(left)
    assert seen == {2, 3, 4, 5}


def test_small_files_of_a_checkpoint_are_read_once(tmp_path: Path) -> None:
    """They are compared with their hashes when a checkpoint is looked for, and are what goes on: whatever comes after."""
    whole, cut = Run(tmp_path / "whole", PLAN, EVERY), Run(tmp_path / "cut", PLAN, EVERY)
    whole.train()
    cut.train(steps=2)
    found = candidates(cut.folder, silent)
    assert [set(each.files) == {INDEX} for each in found] == [False, True], "many checkpoints may be kept"
    (found[0].folder / INDEX).write_text("{}")
    cut.train(found=found)
    check_same(whole, cut)
