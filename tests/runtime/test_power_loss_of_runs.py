"""The power goes off at any change of what a run keeps on its drive: a whole checkpoint is found, and metrics fit to it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from builders import tiny_model
from running import bytes_of, session_for
from runtime import rehearsal
from runtime.checkpoints.contents import contents_of
from runtime.checkpoints.keeper import Keeper, Stored, checkpoints, leftovers
from runtime.checkpoints.layout import MANIFEST
from runtime.checkpoints.manifest import Manifest, RunRecord, Saving, StoredFile
from runtime.checkpoints.resuming import Resume, asked, candidates, clear, leave_newer
from runtime.checkpoints.staging import Staging
from runtime.folder import PLAN, begin_part, open_metrics
from runtime.lanes.backend import CpuBackend
from runtime.lanes.clock import RunError
from runtime.memory.parts import Part
from runtime.optimizer.adamw import AdamW
from runtime.session import Session
from runtime.storage.disk import Disk
from saved_runs import PLACEMENTS, STEPS, UNTIED, Run, check_same, planned
from slideplan.codec import encoded, load
from slideplan.plan import Plan
from slideplan.progress import silent
from slideplan.saving import LEAST_STAGING_BYTES
from storage import CrashingDisk, PowerLoss, power_losses

SEEDS = 3  # of each moment: only what is safe is left, everything, and what is drawn
SMALL = tiny_model(hidden=32, layers=1, heads=2, kv_heads=1, ffn=32)
# Moments in fp32 and in 8 bits, of units on the device and on the host.
PLAN_BEFORE, PLAN_AFTER = planned(SMALL, resident_state=(1,), state="lean"), planned(SMALL, resident_state=(2,))


def describe(step: int, optimizer: bool, files: tuple[StoredFile, ...]) -> Manifest:
    run = RunRecord(
        steps=9, data=None, byte_tokens=True, document_end="auto", seed=0, settings=AdamW(), saving=Saving(every=1, keep=1)
    )
    return Manifest(
        version="1", step=step, sequences=4 * step, seq_len=32, optimizer=optimizer, run=run, model_name="small",
        model_digest="", plan_digest="", data_digest="", date="", versions={}, files=files,
    )  # fmt: skip


class Saver:
    """Saves whatever state one likes, as a run does."""

    def __init__(self) -> None:
        self.backend = CpuBackend()
        self.session: Session = session_for(PLAN_BEFORE, self.backend)
        self.staging = Staging(self.backend, LEAST_STAGING_BYTES, page_locked=False)

    def parts(self) -> list[Part]:
        tensors = [each for state in self.session.states for each in (*state.weights(), *state.optimizer())]
        return [part for each in tensors for part in each.parts]

    def set(self, step: int) -> None:
        """Bytes that stand for the state after this many steps."""
        draw = torch.Generator().manual_seed(step)
        for part in self.parts():
            part.write(0, torch.randint(0, 256, (part.nbytes,), dtype=torch.uint8, generator=draw))
        for each in (each for state in self.session.states for each in state.weights()):
            for part in each.parts:
                content = bytes_of(part)
                content[1::2] &= 0xBF  # the exponent's highest bit: weights that are not finite are not saved
                part.write(0, content)

    def holds(self, step: int) -> bool:
        found = [bytes_of(part) for part in self.parts()]
        self.set(step)
        return all(map(torch.equal, found, map(bytes_of, self.parts())))

    def keeper(self, folder: Path, disk: Disk) -> Keeper:
        stored = Stored(SMALL, self.session.states, contents_of(SMALL))
        return Keeper(folder, disk, stored, self.staging, self.backend, describe, keep=1, cost=None, show=silent)

    def run(self, folder: Path, disk: Disk, steps: range, weights: bool = False) -> None:
        """Steps, each of which is saved; also the weights alone."""
        keeper = self.keeper(folder, disk)
        try:
            with open_metrics(folder, steps.start, disk, silent) as metrics:
                for step in steps:
                    metrics.append(f"{json.dumps({'step': step, 'loss': 1 / (1 + step)})}\n".encode())
                    self.set(step + 1)
                    if weights:
                        keeper.save(step + 1, False, metrics)
                    keeper.save(step + 1, True, metrics)
                keeper.finish()
        finally:
            keeper.close()

    def resume(self, folder: Path, disk: Disk) -> None:
        """Two steps more, by another plan."""
        found = candidates(folder, silent)
        done = found[0].manifest.step
        clear(folder, found, disk, silent)
        leave_newer(folder, done, disk, silent)
        begin_part(folder, PLAN_AFTER, asked(folder, found), disk)
        try:
            self.run(folder, disk, range(done, done + 2), weights=True)
        except RunError as error:  # of the thread that ends a save
            if not isinstance(error.__cause__, PowerLoss):
                raise

    def check(self, folder: Path, disk: Disk, possible: set[int]) -> int:
        """The newest checkpoint is whole; which it is. Metrics go on where it ends."""
        assert load(folder / PLAN, Plan) in (PLAN_BEFORE, PLAN_AFTER)
        found = candidates(folder, silent)
        resume = Resume(found, lambda manifest: None, SMALL, disk, self.staging, self.backend)
        step = resume.fill(self.session.states, silent).step
        assert step in possible
        assert step == found[0].manifest.step, "the newest is never torn"
        assert self.holds(step)
        clear(folder, found, disk, silent)
        open_metrics(folder, step, disk, silent).close()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert lines == [{"step": number, "loss": 1 / (1 + number)} for number in range(step)]
        return step


@pytest.fixture(scope="module")
def saver() -> Saver:
    return Saver()


def test_a_first_save_is_whole_or_not_there(saver: Saver, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / PLAN).write_bytes(encoded(PLAN_BEFORE))

    def act(disk: CrashingDisk, folder: Path) -> None:
        try:
            saver.run(folder, disk, range(1))
        except RunError as error:
            if not isinstance(error.__cause__, PowerLoss):
                raise

    whole = []
    for disk in power_losses(tmp_path, tmp_path / "before", act):
        for seed in (0, 1, 1 + disk.changes):
            left = tmp_path / "left"
            disk.after_power_loss(seed, left)
            if list(left.glob(f"checkpoints/step-*/{MANIFEST}")):
                assert saver.check(left, Disk(), {1}) == 1
                whole.append(disk.stopped)
            else:
                assert disk.stopped
                with pytest.raises(
                    ValueError,
                    match=r"holds no checkpoint; |its run has saved nothing; |its first checkpoint was not written ",
                ):
                    candidates(left, silent)
            shutil.rmtree(left)
        shutil.rmtree(tmp_path / f"stopped-{disk.changes if disk.stopped else disk.changes + 1}")
    assert set(whole) == {True, False}


@pytest.mark.slow
def test_the_old_checkpoint_is_there_until_the_new_one_is(saver: Saver, tmp_path: Path, say) -> None:
    """A resume, which clears what others have left, two saves of each kind, and the removal of old ones."""
    before = tmp_path / "before"
    before.mkdir()
    (before / PLAN).write_bytes(encoded(PLAN_BEFORE))
    saver.run(before, Disk(), range(2))
    whole = before / "checkpoints" / "step-00000002"
    for name in (".unfinished-step-00000003", ".removed-step-00000001", "step-00000007"):
        shutil.copytree(whole, whole.with_name(name))
    (whole.with_name("step-00000007") / MANIFEST).unlink()
    with (before / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.9}\n{"step": 3, "lo')
    newest: dict[int, int] = dict.fromkeys((2, 3, 4), 0)
    stops = 0
    for disk in power_losses(tmp_path, before, lambda disk, folder: saver.resume(folder, disk)):
        stops += disk.stopped
        for seed in (0, 1, 1 + disk.changes):
            left = tmp_path / "left"
            disk.after_power_loss(seed, left)
            newest[saver.check(left, Disk(), {2, 3, 4} if disk.stopped else {4})] += 1
            assert not leftovers(left)
            shutil.rmtree(left)
        for folder in tmp_path.glob("stopped-*"):
            shutil.rmtree(folder)
    assert all(newest.values())
    say(f"power losses survived: {stops * SEEDS}, at each of {stops} changes of a resume that saves twice")


@pytest.mark.slow
def test_whole_runs_go_on_after_power_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
    plan = planned(UNTIED, **PLACEMENTS["passing"])
    whole = Run(tmp_path / "whole", plan, Saving(every=1))
    disk = CrashingDisk(whole.folder)
    whole.train(disk=disk)
    draw = random.Random(15)
    resumed = 0
    for number in range(8):
        cut = Run(tmp_path / f"cut-{number}", plan, Saving(every=1))
        crashing = CrashingDisk(cut.folder, draw.randint(disk.changes // 5, disk.changes))
        with pytest.raises((PowerLoss, RunError)):
            cut.train(disk=crashing)
        shutil.rmtree(cut.folder)
        crashing.after_power_loss(draw.randrange(2, 1 << 30), cut.folder)
        if candidates(cut.folder, silent)[0].manifest.step < STEPS:
            cut.resume()
            resumed += 1
        check_same(whole, cut)
        assert [step for step, _ in checkpoints(cut.folder / "checkpoints")][-1] == STEPS
    assert resumed
