"""Runs that are killed again and again, wherever they are, and go on as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import killed_runs
from killing import Change, Ended, in_child
from runtime.checkpoints.keeper import checkpoints, leftovers
from runtime.checkpoints.layout import MANIFEST, REMOVED, UNFINISHED
from runtime.checkpoints.manifest import Saving
from runtime.checkpoints.resuming import candidates
from saved_runs import PLACEMENTS, STEPS, UNTIED, Run, planned
from slideplan.progress import silent

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Of every kind that a resume has to fill, and tasks that run from one step into the next.
PLACED = ("streamed", "resident state", "passing", "lean state", "deferred updates", "everything")
KILLS = 18  # of each: 108 in all
IN_A_ROW = 5  # most of one run, so that some come to their end
SAVING = Saving(every=1, weights_every=2, keep=2)
SURVIVED: Counter[str] = Counter()


@pytest.fixture(scope="module", autouse=True)
def survived_is_said(say: Callable[[str], None]) -> Iterator[None]:
    """How many kills were survived is shown with the results."""
    yield
    of_each = ", ".join(f"{count} in {phase}" for phase, count in SURVIVED.most_common())
    say(f"kills survived: {SURVIVED.total()} ({of_each})")


def files(folder: Path) -> dict[str, bytes]:
    """All of a save but its manifest, which has a date."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def check_whole(run: Run, reference: Run) -> list[int]:
    """What can be gone on from is what the uninterrupted run had saved, newest first: after which steps."""
    steps = []
    for folder, manifest, *_ in candidates(run.folder, silent):
        assert files(folder) == files(reference.folder / "checkpoints" / folder.name)
        steps.append(manifest.step)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines[: steps[0]] == (reference.folder / "metrics.jsonl").read_text().splitlines(keepends=True)[: steps[0]]
    return steps


def check_ended(run: Run, reference: Run) -> None:
    assert check_whole(run, reference) == [STEPS, STEPS - 1]
    for name in ("metrics.jsonl", "plan.json"):
        assert (run.folder / name).read_bytes() == (reference.folder / name).read_bytes()
    names = ["measurement.json", "metrics.jsonl", "plan.json", "run.json"]
    assert sorted(path.name for path in run.folder.iterdir() if path.is_file()) == names
    assert not leftovers(run.folder)
    alone = [step for step, _ in checkpoints(run.folder / "weights")]
    assert alone == [2, 4]
    for step, folder in checkpoints(run.folder / "weights"):
        assert files(folder) == files(reference.folder / "weights" / f"step-{step:08}")


def phase(ended: Ended, run: Run) -> str:
    """Where a run was killed: by the change, or else by what it has left."""
    if ended.at is not None:
        return phase_of(ended.at)
    left = [folder.name for folder in leftovers(run.folder)]
    if any(name.startswith(UNFINISHED) for name in left):
        return "saves"
    if left:
        return "the removal of old ones"
    return "steps" if (run.folder / "metrics.jsonl").exists() else "what comes before the first step"


def phase_of(change: Change) -> str:
    names = change.path.parts
    if change.operation == "rename":
        return "renames"
    if change.operation.startswith("remove"):
        return "the removal of old ones"
    if any(name.startswith(REMOVED) for name in names):
        return "the removal of old ones"
    if "metrics.jsonl" in names:
        return "steps"
    if any(name in ("checkpoints", "weights") for name in names):
        return "saves"
    return "what comes before the first step"


class Moments:
    """Draws when to kill: after a while, or at a change; every phase of a run as often as any other."""

    def __init__(self, seed: int, changes: list[Change], run_s: float) -> None:
        self._draw = random.Random(seed)
        self._run_s = run_s
        self._by_phase: dict[str, list[int]] = {}
        for number, change in enumerate(changes, 1):
            self._by_phase.setdefault(phase_of(change), []).append(number)
        self._changes = len(changes)

    def of_a_start(self) -> dict[str, float | int]:
        if self._draw.random() < 0.35:
            return {"after_s": self._draw.uniform(0, self._run_s)}
        numbers = self._by_phase[self._draw.choice(sorted(self._by_phase))]
        return {"at_change": self._draw.choice(numbers), "seed": self._draw.randrange(1 << 30)}

    def of_a_resume(self, left: float) -> dict[str, float | int]:
        """left: the share of the steps that it has to do."""
        if self._draw.random() < 0.35:
            return {"after_s": self._draw.uniform(0, self._run_s)}
        at_change = self._draw.randint(1, max(1, round(left * self._changes)))
        return {"at_change": at_change, "seed": self._draw.randrange(1 << 30)}


def steps_saved(run: Run) -> int:
    """Steps of the newest checkpoint; 0 where nothing was saved, which must be said."""
    if any((folder / MANIFEST).exists() for _, folder in checkpoints(run.folder / "checkpoints")):
        return candidates(run.folder, silent)[0].manifest.step
    unfinished = any(run.folder.glob(f"checkpoints/{UNFINISHED}*"))
    said = (
        "was not written to its end; .* start the run again"
        if unfinished
        else "its run has saved nothing; remove the folder|holds no checkpoint; name a run folder"
    )
    with pytest.raises(ValueError, match=said):
        candidates(run.folder, silent)
    return 0


@pytest.mark.parametrize("name", PLACED)
def test_runs_that_are_killed_go_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    plan = planned(UNTIED, **PLACEMENTS[name])
    reference = Run(tmp_path / "reference", plan, Saving(every=1, weights_every=2, keep=STEPS))
    in_child(killed_runs.train, reference.request)
    other = Run(tmp_path / "other", plan, SAVING)
    uninterrupted = in_child(killed_runs.train, other.request)
    check_ended(other, reference)
    moments = Moments(PLACED.index(name), uninterrupted.result, uninterrupted.run_s)
    survived = number = 0
    while survived < KILLS:
        run = Run(tmp_path / f"run-{(number := number + 1)}", plan, SAVING)
        ended = in_child(killed_runs.train, run.request, **moments.of_a_start())
        for left in reversed(range(IN_A_ROW)):
            if not ended.killed:
                break
            where = phase(ended, run)
            done = steps_saved(run)
            if done:
                check_whole(run, reference)
            if done == STEPS:
                ended = None
            elif done:
                when = moments.of_a_resume(1 - done / STEPS) if left else {}
                ended = in_child(killed_runs.resume, run.request, **when)
            else:
                shutil.rmtree(run.folder)
                run = Run(run.folder, plan, SAVING)
                ended = in_child(killed_runs.train, run.request, **(moments.of_a_start() if left else {}))
            survived += 1
            SURVIVED[where] += 1
            if ended is None:  # nothing was left to be done
                break
        else:
            assert not ended.killed
        if ended is not None:
            check_ended(run, reference)
        shutil.rmtree(run.folder)
