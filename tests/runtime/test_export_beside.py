"""Exports beside the run that they read from, and beside each other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checkpoints import masters_of
from commands import Done, runtime
from runtime import rehearsal
from runtime.checkpoints.keeper import checkpoints
from runtime.checkpoints.manifest import Manifest, Saving, content_hash
from runtime.checkpoints.resuming import leave_newer
from runtime.folder import kept
from runtime.storage.disk import Disk
from runtime.storage.files import FileReader
from runtime.storage.locks import HeldError, exclusive
from saved_runs import CUT, STEPS, UNTIED, Run, planned
from slideplan.codec import load, save
from slideplan.progress import silent
from storage import WatchedCalls, path_of

ONE = Saving(every=1, keep=1)


def trained(folder: Path, saving: Saving, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
    found = Run(folder / "run", planned(UNTIED), saving)
    found.train(steps=CUT)
    return found


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    return trained(tmp_path, ONE, monkeypatch)


def saved(cut: Run) -> list[int]:
    return [step for step, _ in checkpoints(cut.folder / "checkpoints")]


def exported(cut: Run, meanwhile: Callable[[], object] = lambda: None) -> Done:
    """An export to `out`; something is done while it reads its first block."""
    as_it_is, begun = FileReader.read, []

    def read(file: FileReader, block: memoryview, offset: int) -> None:
        if not begun:
            begun.append(file)
            meanwhile()
        as_it_is(file, block, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileReader, "read", read)
        return runtime("export", "run", "-o", "out", cwd=cut.folder.parent)


def check_exported(cut: Run, masters: dict[str, torch.Tensor]) -> None:
    out = cut.folder.parent / "out"
    found = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert found.keys() == masters.keys()
    assert all(torch.equal(value, masters[name].bfloat16()) for name, value in found.items())
    assert {path.name for path in out.parent.iterdir()} == {"run", "out", "text.txt"}


def masters(cut: Run, step: int = CUT) -> dict[str, torch.Tensor]:
    return masters_of(cut.folder / "checkpoints" / f"step-{step:08}", UNTIED)


class _Recorded(WatchedCalls):
    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []

    def around(self, operation: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if operation in ("make_folder", "remove_empty_folder"):
            self.changes.append((operation, path_of(arguments[0]).name))
        return call(*arguments)


def test_a_run_that_goes_on_removes_nothing_that_is_exported(cut: Run) -> None:
    before = masters(cut)
    done = exported(cut, cut.resume)
    assert done.returncode == 0, done.stderr
    check_exported(cut, before)
    assert saved(cut) == list(range(CUT, STEPS + 1))
    oldest = cut.folder / "checkpoints" / f"step-{CUT:08}"
    stays = f"{oldest} stays until the next save: this run is being exported"
    assert cut.notes.count(stays) == STEPS - CUT, "once a save"
    assert "warning" not in cut.notes

    calls = _Recorded()
    cut.resume(steps=STEPS + 1, disk=Disk(calls))
    assert saved(cut) == [STEPS + 1]
    first = calls.changes.index(("make_folder", f".unfinished-step-{STEPS + 1:08}"))
    removed = [name for operation, name in calls.changes[:first] if operation == "remove_empty_folder"]
    assert removed == [f".removed-step-{step:08}" for step in range(CUT, STEPS)], "they would take the new one's room"


HOLD = "import sys\nfrom pathlib import Path\nfrom runtime.folder import kept\nwith kept(Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True)\n    sys.stdin.read()\n"


def test_an_export_that_is_killed_holds_nothing_back(cut: Run) -> None:
    """Its run folder may be one that can only be read."""
    cut.folder.chmod(0o555)
    try:
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(cut.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == "held\n"
            with pytest.raises(HeldError), exclusive(cut.folder):
                pytest.fail("was locked")
            other.kill()
        with exclusive(cut.folder):
            pass
        assert exported(cut).returncode == 0
    finally:
        cut.folder.chmod(0o755)


ALL = Saving(every=1, keep=STEPS)


@pytest.fixture
def several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Each of its steps is saved."""
    return trained(tmp_path, ALL, monkeypatch)


def snapshot(run: Run) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}


def resumed_meanwhile(run: Run, *arguments: object) -> Done:
    """A resume while the run is exported, which changes nothing and does the export no harm."""
    found: list[Done] = []
    before, state = snapshot(run), masters(run)

    def resume() -> None:
        found.append(runtime("resume", "run", "--device", "cpu", *arguments, cwd=run.folder.parent))

    done = exported(run, resume)
    assert done.returncode == 0, done.stderr
    assert "is taken" not in done.stderr
    check_exported(run, state)
    assert snapshot(run) == before
    return found[0]


EXPORTED = "run: is being exported, and checkpoints would get other names; wait for the export"


def test_going_back_while_the_run_is_exported_is_refused(several: Run) -> None:
    refused = resumed_meanwhile(several, "--step", 1)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, f"runtime: {EXPORTED}")
    assert runtime("resume", "run", "--step", 1, "--device", "cpu", cwd=several.folder.parent).returncode == 0
    assert saved(several) == [1, 2, 3]


def test_a_damaged_checkpoint_keeps_its_name_while_the_run_is_exported(several: Run) -> None:
    (several.folder / "checkpoints" / "step-00000001" / "config.json").unlink()
    refused = resumed_meanwhile(several, "--steps", STEPS)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (2, f"runtime: {EXPORTED}")


def test_damage_that_is_found_while_the_run_is_exported_is_said(several: Run, tmp_path: Path) -> None:
    path = several.folder / "checkpoints" / f"step-{CUT:08}" / "model-00002-of-00006.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    names = saved(several)
    with kept(several.folder):
        refused = runtime("resume", "run", "--steps", STEPS, "--device", "cpu", cwd=tmp_path)
    assert refused.returncode == 2
    damage = f"run/checkpoints/{path.parent.name}/{path.name}: its content is not what was written (XXH3 differs)"
    assert refused.stderr.splitlines()[-1] == f"runtime: {damage}; {EXPORTED}"
    assert saved(several) == names


def test_an_export_that_begins_while_a_run_goes_back_loses_no_checkpoint(several: Run) -> None:
    """The last look is that of who renames, and it comes before the first change."""
    several.resume(saving=Saving(every=1, weights_every=2, keep=STEPS))
    before = snapshot(several)
    with kept(several.folder), pytest.raises(ValueError, match="run: is being exported"):
        leave_newer(several.folder, 2, Disk(), silent)
    assert snapshot(several) == before
    (several.folder / "weights" / f"step-{STEPS + 1:08}").mkdir()
    with kept(several.folder):
        leave_newer(several.folder, STEPS, Disk(), silent)
    assert (several.folder / "weights" / f"left-step-{STEPS + 1:08}").is_dir(), "no export reads weights alone"


def test_a_checkpoint_that_is_gone_while_it_is_exported_is_no_damage(several: Run) -> None:
    """No older one is taken in its place."""
    newest = several.folder / "checkpoints" / f"step-{CUT:08}"
    done = exported(several, lambda: newest.rename(newest.with_name(f"left-{newest.name}")))
    assert done.returncode == 2
    gone = f"run/checkpoints/{newest.name}: was renamed or removed while it was read; give the command again"
    assert done.stderr.splitlines()[-1] == f"runtime: {gone}"
    assert {path.name for path in several.folder.parent.iterdir()} == {"run", "text.txt"}
    assert exported(several).returncode == 0
    check_exported(several, masters(several, CUT - 1))


def test_of_two_exports_to_one_name_the_second_is_refused(cut: Run) -> None:
    second = []
    first = exported(cut, lambda: second.append(runtime("export", "run", "-o", "out", cwd=cut.folder.parent)))
    assert first.returncode == 0, first.stderr
    assert [done.returncode for done in second] == [2]
    assert second[0].stderr == "runtime: out: another export writes it; wait for it, or name another folder with -o\n"
    check_exported(cut, masters(cut))


def test_what_gets_the_name_during_an_export_keeps_it(cut: Run) -> None:
    out = cut.folder.parent / "out"
    done = exported(cut, out.mkdir)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "runtime: out: exists already; name a new folder with -o"
    assert not list(out.iterdir())
    assert {path.name for path in out.parent.iterdir()} == {"run", "out", "text.txt"}


def test_weights_that_are_not_finite_are_exported_with_a_warning(cut: Run) -> None:
    assert "finite" not in exported(cut).stderr
    folder = cut.folder / "checkpoints" / f"step-{CUT:08}"
    manifest = load(folder / "manifest.json", Manifest)
    files = {file.name: file for file in manifest.files}
    for number in (2, 3):
        name = f"model-{number:05}-of-00006.safetensors"
        content = (folder / name).read_bytes()[:-2] + b"\xc0\x7f"
        (folder / name).write_bytes(content)
        files[name] = type(files[name])(name=name, size_bytes=len(content), xxh128=content_hash(content))
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    save(folder / "manifest.json", Manifest(**fields | {"files": tuple(files.values())}).sealed())
    (cut.folder.parent / "out").rename(cut.folder.parent / "before")
    done = exported(cut)
    assert done.returncode == 0, done.stderr
    last = "model.layers.0.post_attention_layernorm.weight"
    assert f"weights are not finite: {last} and 1 more; export an earlier one with --step" in done.stderr
    index = json.loads((cut.folder.parent / "out/model.safetensors.index.json").read_text())["weight_map"]
    assert load_file(cut.folder.parent / "out" / index[last])[last].isnan().sum() == 1
