"""Runs that save, stop and go on train bit for bit as runs that do neither."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders import tiny_policy, tiny_workload
from checkpoints import masters_of
from running import EVERYTHING, plan_for
from runtime import rehearsal
from runtime.checkpoints.export import export
from runtime.checkpoints.keeper import checkpoints
from runtime.checkpoints.manifest import Saving, read_manifest
from runtime.checkpoints.resuming import candidates
from runtime.lanes.backend import CpuBackend
from runtime.storage.disk import Disk
from saved_runs import CUT, PLACEMENTS, STEPS, TIED, UNTIED, Run, check_same, planned, text
from slideplan.model import ModelSpec
from slideplan.progress import silent


@pytest.fixture(autouse=True)
def short_rehearsals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rehearsal finds is nothing to these tests."""
    monkeypatch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
def test_a_run_that_was_cut_trains_bit_for_bit_as_one_that_was_not(tmp_path: Path, name: str, model: ModelSpec) -> None:
    plan = planned(model, **PLACEMENTS[name])
    whole = Run(tmp_path / "whole", plan)
    whole.train()
    cut = Run(tmp_path / "cut", plan, Saving(every=2))
    cut.train(steps=CUT)
    assert [step for step, _ in checkpoints(cut.folder / "checkpoints")] == [2, CUT]
    cut.resume()
    check_same(whole, cut)
    assert [each["step"] for each in cut.metrics] == list(range(STEPS))
    assert [step for step, _ in checkpoints(cut.folder / "checkpoints")] == [4, STEPS]


def test_an_uninterrupted_run_that_saves_trains_as_one_that_does_not(tmp_path: Path) -> None:
    plan = planned(UNTIED, **EVERYTHING, kernels="fused")
    plain, saving = Run(tmp_path / "plain", plan), Run(tmp_path / "saving", plan, Saving(every=1, weights_every=2, keep=3))
    plain.train()
    saving.train()
    check_same(plain, saving)
    assert [step for step, _ in checkpoints(saving.folder / "checkpoints")] == [3, 4, 5]
    assert [step for step, _ in checkpoints(saving.folder / "weights")] == [2, 4]
    assert not any(saving.folder.glob("weights/*/optimizer-*"))
    assert not list(saving.folder.rglob(".*"))


CHANGES = {
    "another window": {"window": 3},
    "other tiers": {"resident_state": (0, 1), "stream_state": (2, 3), "resident_weights": (4,)},
    "boundaries on the host": {"offload_boundaries": True},
    "updates in another order": {"update_order": (0, 1, 2, 3, 4, 5)},
    "everything resident": {"resident_state": (0, 1, 2, 3, 4, 5), "keep": (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_goes_on_bit_for_bit(tmp_path: Path, name: str) -> None:
    """What lies where is nothing to the weights; so it is with what is kept and recomputed."""
    before, after = planned(TIED), planned(TIED, **CHANGES[name])
    whole, cut = Run(tmp_path / "whole", before), Run(tmp_path / "cut", before)
    whole.train()
    cut.train(steps=CUT)
    cut.resume(plan=after)
    check_same(whole, cut)
    assert (
        read_manifest(cut.folder / "checkpoints" / "step-00000005").plan_digest
        != read_manifest(whole.folder / "checkpoints" / "step-00000005").plan_digest
    )


@pytest.mark.parametrize(
    "knobs", [{"micro_batch": 1, "micro_batches": 4}, {"micro_batch": 4, "micro_batches": 1}, {"kernels": "fused"}]
)
def test_other_micro_batches_and_kernels_go_on_nearly_alike(tmp_path: Path, knobs: dict) -> None:
    whole, cut = Run(tmp_path / "whole", planned(UNTIED)), Run(tmp_path / "cut", planned(UNTIED))
    whole.train()
    cut.train(steps=CUT)
    cut.resume(plan=planned(UNTIED, **knobs))
    assert [each["loss"] for each in cut.metrics] == pytest.approx([each["loss"] for each in whole.metrics], rel=2e-3)


def test_another_global_batch_goes_on_with_the_next_sequences(tmp_path: Path) -> None:
    workload = msgspec.structs.replace(tiny_workload(), global_batch=2)
    small = plan_for(UNTIED, tiny_policy(UNTIED, micro_batch=1), workload, CpuBackend())
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=CUT)
    cut.resume(plan=small)
    taken = [read_manifest(path).sequences for _, path in checkpoints(cut.folder / "checkpoints")]
    assert taken == [CUT * tiny_workload().global_batch, CUT * tiny_workload().global_batch + 2 * 2]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"resident_state": (1, 2, 3), "state": "lean"}, {"resident_state": (1, 2, 3)}),
        ({"resident_state": (1, 2, 3)}, {"stream_state": (1, 2, 3), "state": "lean", "state_chunks": 3}),
        ({"stream_state": (1, 2, 3), "state": "lean", "state_chunks": 10}, {"stream_state": (1, 3), "state_chunks": 3}),
        ({"state": "bf16-moments"}, {"ssd_state": (1, 2), "state": "lean", "ssd_chunks": 2}),
        ({"ssd_state": (0, 5), "state": "lean"}, {"stream_state": (1, 2), "state": "bf16-moments", "state_chunks": 3}),
        ({"state": "bf16-moments"}, {}),
    ],
)
def test_state_changes_its_format_with_the_plan_and_that_is_said(tmp_path: Path, before: dict, after: dict) -> None:
    """All ways nearly: rounded to the nearest of fewer bits, or exactly what fewer bits say."""
    whole, cut = Run(tmp_path / "whole", planned(UNTIED, **before)), Run(tmp_path / "cut", planned(UNTIED, **before))
    whole.train()
    cut.train(steps=CUT)
    cut.resume(plan=planned(UNTIED, **after))
    assert "state of 6 units is kept in another format by this plan than in the checkpoint" in cut.notes
    assert [each["loss"] for each in cut.metrics] == pytest.approx([each["loss"] for each in whole.metrics], rel=0.02)


def test_a_checkpoint_is_what_transformers_reads(tmp_path: Path) -> None:
    done = Run(tmp_path / "run", planned(TIED))
    done.train()
    folder = done.folder / "checkpoints" / f"step-{STEPS:08}"
    network = AutoModelForCausalLM.from_pretrained(folder)
    assert network.dtype is torch.bfloat16
    stored = {name: value for file in folder.glob("model-*.safetensors") for name, value in load_file(file).items()}
    assert stored.keys() == dict(network.named_parameters()).keys()
    assert all(torch.equal(stored[name], value) for name, value in network.named_parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("model", [UNTIED, TIED], ids=["untied", "tied"])
def test_an_export_is_the_master_rounded_to_nearest_even(tmp_path: Path, dtype: str, model: ModelSpec) -> None:
    done = Run(tmp_path / "run", planned(model))
    done.train()
    folder = done.folder / "checkpoints" / f"step-{STEPS:08}"
    expected = masters_of(folder, model)
    export(candidates(done.folder, silent), tmp_path / "out", dtype, Disk(), silent)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert network.dtype is {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    parameters = dict(network.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(parameters[name], value.to(network.dtype)), name
    assert not any(path.name.startswith(("optimizer", "manifest", ".")) for path in (tmp_path / "out").iterdir())


def test_what_somebody_adds_to_a_checkpoint_is_not_carried_on(tmp_path: Path) -> None:
    """No manifest names it, and nobody has compared it with anything."""
    cut = Run(tmp_path / "run", planned(UNTIED))
    cut.train(steps=CUT)
    before = cut.folder / "checkpoints" / f"step-{CUT:08}"
    names = {path.name for path in before.iterdir()}
    (before / "added.json").write_text("{}")
    cut.resume()
    assert {path.name for path in (cut.folder / "checkpoints" / f"step-{STEPS:08}").iterdir()} == names
    assert "config.json" in names
    export(candidates(cut.folder, silent), tmp_path / "out", "bf16", Disk(), silent)
    assert not (tmp_path / "out" / "added.json").exists()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit in a moment": lambda folder: flip(folder / "optimizer-00002-of-00006.safetensors", -1),
    "a bit in a weight": lambda folder: flip(folder / "model-00006-of-00006.safetensors", 5000),
    "a bit in a header": lambda folder: flip(folder / "model-00006-of-00006.safetensors", 30),
    "the length of a header": lambda folder: flip(folder / "model-00001-of-00006.safetensors", 6),
    "a bit in the configuration": lambda folder: flip(folder / "config.json", 40),
    "a digit in the manifest": lambda folder: flip(
        folder / "manifest.json", (folder / "manifest.json").read_bytes().find(b'"step": ') + 8
    ),
    "half a file": lambda folder: (folder / "model-00003-of-00006.safetensors").write_bytes(b"half"),
    "no file": lambda folder: (folder / "optimizer-00001-of-00006.safetensors").unlink(),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a manifest of another version": lambda folder: edit(folder / "manifest.json", format_version=99),
}


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path: Path, damage: str) -> None:
    plan = planned(UNTIED, resident_state=(1,))
    whole, cut = Run(tmp_path / "whole", plan), Run(tmp_path / "cut", plan, Saving(every=2))
    whole.train()
    cut.train(steps=4)
    DAMAGES[damage](cut.folder / "checkpoints" / "step-00000004")
    cut.resume()
    assert "warning: " in cut.notes
    assert "step-00000004" in cut.notes
    assert f"goes on from {cut.folder / 'checkpoints' / 'step-00000002'}: 2 steps done" in cut.notes
    check_same(whole, cut)


def test_where_no_checkpoint_is_whole_nothing_is_trained(tmp_path: Path) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=2)
    (cut.folder / "checkpoints" / "step-00000002" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no checkpoint that is whole: .*config\.json: No such file"):
        cut.resume()
    assert len(cut.metrics) == 2


def test_metrics_go_on_without_a_gap_or_a_double_line(tmp_path: Path) -> None:
    """Also where the process has died after steps that no checkpoint holds, in the midst of a line."""
    cut = Run(tmp_path / "cut", planned(UNTIED), Saving(every=2))
    cut.train(steps=2)
    with (cut.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 9.9}\n{"step": 3, "lo')
    cut.resume()
    assert "has no line" not in cut.notes
    assert [each["step"] for each in cut.metrics] == list(range(STEPS))
    assert all(each["loss"] < 9 for each in cut.metrics)


REFUSED = {
    "fewer steps": ({"steps": 2}, r"3 steps are done, --steps is 2; name a larger number"),
    "no more steps": ({"steps": 3}, r"3 steps are done, --steps is 3; name a larger number"),
    "another model": ({"plan": planned(TIED)}, r"step-00000003: is not the model that was planned .*tied_embeddings"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_on_is_refused_and_nothing_changes(tmp_path: Path, name: str) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=3)
    before = {path: path.read_bytes() for path in cut.folder.rglob("*") if path.is_file()}
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        cut.resume(**changes)
    assert before == {path: path.read_bytes() for path in cut.folder.rglob("*") if path.is_file()}


def test_sequences_of_another_length_are_refused(tmp_path: Path) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=3)
    longer = plan_for(UNTIED, tiny_policy(UNTIED), tiny_workload(seq_len=24), CpuBackend())
    with pytest.raises(ValueError, match=r"workload\.seq_len is 24, the run has taken its data in sequences of \d+; plan with"):
        cut.resume(plan=longer)


def test_data_that_have_changed_are_refused_until_that_is_said(tmp_path: Path) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=3)
    data = text(tmp_path)
    data.write_text(data.read_text() * 2)
    with pytest.raises(ValueError, match=r"text\.txt: its tokens are not those .*--data-changed"):
        cut.resume()
    cut.resume(data_changed=True)
    assert len(cut.metrics) == STEPS


def test_the_data_must_be_those_of_the_checkpoint_that_is_taken_in_the_end(tmp_path: Path) -> None:
    """The newest, which has learned from these, is found to be damaged while it is read."""
    cut = Run(tmp_path / "cut", planned(UNTIED), Saving(every=1))
    cut.train(steps=2)
    data = text(tmp_path)
    data.write_text(data.read_text() * 2)
    cut.resume(steps=3, data_changed=True)
    before = cut.metrics
    flip(cut.folder / "checkpoints" / "step-00000003" / "model-00002-of-00006.safetensors", -1)
    with pytest.raises(ValueError, match=r"text\.txt: its tokens are not those .*--data-changed"):
        cut.resume()
    assert cut.metrics == before
    with pytest.raises(ValueError, match=r"text\.txt: its tokens are not those .*--data-changed"):
        cut.resume()
    cut.resume(data_changed=True)
    assert "step-00000002: 2 steps done" in cut.notes
    assert len(cut.metrics) == STEPS


@pytest.mark.parametrize(
    ("lines", "said"), [([], "3 of the 3 steps that are done, the first is step 0"), ([0, 2], "1 of the 3")]
)
def test_metrics_that_begin_with_a_gap_are_said(tmp_path: Path, lines: list[int], said: str) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=CUT)
    path = cut.folder / "metrics.jsonl"
    written = path.read_text().splitlines(keepends=True)
    path.write_text("".join(written[line] for line in lines))
    if not lines:
        path.unlink()
    cut.resume()
    assert f"warning: {path}: has no line of {said}" in cut.notes
    assert [each["step"] for each in cut.metrics] == [*lines, 3, 4]
    cut.resume(steps=STEPS + 1)
    assert cut.notes.count("has no line of") == 2


def test_a_line_of_metrics_that_somebody_has_spoiled_costs_none_of_the_others(tmp_path: Path) -> None:
    cut = Run(tmp_path / "cut", planned(UNTIED))
    cut.train(steps=CUT)
    lines = (cut.folder / "metrics.jsonl").read_text().splitlines()
    (cut.folder / "metrics.jsonl").write_text("\n".join([lines[0], "spoiled", lines[2]]) + "\n")
    cut.resume()
    after = (cut.folder / "metrics.jsonl").read_text().splitlines()
    assert after[:3] == [lines[0], "spoiled", lines[2]]
    assert [json.loads(line)["step"] for line in after[3:]] == [3, 4]
    assert "has no line of 1 of the 3 steps that are done, the first is step 1" in cut.notes
