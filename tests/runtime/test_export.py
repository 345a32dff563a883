"""Models of every family are trained, go on by another plan, are exported, and load as what was trained."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import killed_things
from builders import tiny_model, tiny_policy, tiny_workload
from checkpoints import masters_of, random_state_dict
from commands import planner, runtime
from killing import in_child
from running import plan_for, rounded_away
from runtime import rehearsal
from runtime.checkpoints import export as exporting
from runtime.lanes.backend import CpuBackend
from runtime.storage.files import FileReader, FileWriter
from slideplan.codec import save
from slideplan.hf_config import config_of
from slideplan.model import ModelSpec
from tokenizers_made import WORDS, gpt2, llama2, llama3, qwen2, write_tokenizer

STEPS, MORE_STEPS = 20, 24
CHECKPOINT = f"run/checkpoints/step-{MORE_STEPS:08}"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Case(NamedTuple):
    """A model as somebody has stored it. base: names have no `model.`; head: tied weights lie under the head's name."""

    model: ModelSpec
    tokenizer: Callable[[], Tokenizer]
    dtype: torch.dtype = torch.bfloat16
    shards: int = 1
    base: bool = False
    head: bool = False

    def stored(self, name: str) -> str:
        """By which name a parameter lies in the source."""
        if self.head and name == EMBEDDING:
            return HEAD
        return name.removeprefix("model.") if self.base else name

    @property
    def names(self) -> dict[str, str]:
        return {name: self.stored(name) for name in random_state_dict(self.model)}


def model(architecture: str, tied: bool, **changes: object) -> ModelSpec:
    more = {"qwen2": {"attention_bias": "qkv"}, "qwen3": {"qk_norm": True}}.get(architecture, {})
    return tiny_model(architecture=architecture, tied_embeddings=tied, vocabulary=600, **more | changes)


CASES = {
    "llama": Case(model("llama", False), llama3),
    "llama, tied, in shards": Case(model("llama", True), llama2, shards=3),
    "llama, tied under the head's name": Case(model("llama", True), llama2, head=True),
    "llama, attention biases, fp32": Case(model("llama", False, attention_bias="qkvo"), gpt2, torch.float32),
    "mistral, fp16": Case(model("mistral", False), llama2, torch.float16, shards=2),
    "mistral, tied": Case(model("mistral", True, sliding_window=48), llama2),
    "qwen2": Case(model("qwen2", False), qwen2, shards=2),
    "qwen2, tied, a base model, fp32": Case(model("qwen2", True), qwen2, torch.float32, base=True),
    "qwen3, fp16": Case(model("qwen3", False), qwen2, torch.float16),
    "qwen3, tied, a base model in shards": Case(model("qwen3", True), qwen2, shards=2, base=True),
}


def write_source(folder: Path, case: Case) -> None:
    """A Hugging Face directory with all that lies in published ones."""
    write_tokenizer(folder, case.tokenizer(), eos_token="</s>", bos_token="<s>", tokenizer_class="PreTrainedTokenizerFast")
    config = config_of(case.model) | {"torch_dtype": NAMES[case.dtype], "bos_token_id": 0, "eos_token_id": 1, "note": "ä"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "eos_token_id": 1, "pad_token_id": 1}))
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}\r\n{% endfor %}")
    (folder / "LICENSE").write_bytes(b"Anyone may.\r\n\xff")
    (folder / "README.md").write_text("---\nlicense: other\n---\n# A model\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(pickle.dumps({"lr": 1}))
    tensors = {case.stored(name): value for name, value in random_state_dict(case.model, case.dtype).items()}
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    placed = {name: f"model-{n % case.shards + 1:05}-of-{case.shards:05}.safetensors" for n, name in enumerate(sorted(tensors))}
    for file in set(placed.values()):
        save_file({name: tensors[name] for name in placed if placed[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class Trained:
    """A folder with source, plans, a run that went on by another plan, and exports of it."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        write_source(folder / "source", case)
        (folder / "text.txt").write_text(WORDS * 60)
        plans = {"plan.json": {}, "other.json": {"resident_state": (1,), "window": 3, "keep": (4,), "kernels": "fused"}}
        for name, knobs in plans.items():
            save(folder / name, plan_for(case.model, tiny_policy(case.model, **knobs), tiny_workload(), CpuBackend()))
        source = ("--weights", "source", "--data", "text.txt")
        first = ("--steps", STEPS, "--save-every", 10, "--lr", 1e-3, "-o", "run")
        self.executed = self.done("execute", "plan.json", *source, *first, "--device", "cpu")
        self.resumed = self.done("resume", "run", "--plan", "other.json", "--steps", MORE_STEPS, "--device", "cpu")
        self.exported = {dtype: self.done("export", "run", "--dtype", dtype, "-o", dtype) for dtype in DTYPES}

    def done(self, *arguments: object) -> str:
        """What a command that works says."""
        found = runtime(*arguments, cwd=self.folder)
        assert found.returncode == 0, found.stderr
        return found.stderr

    @cached_property
    def masters(self) -> dict[str, torch.Tensor]:
        return masters_of(self.folder / CHECKPOINT, self.case.model, self.case.names)

    def network(self, dtype: torch.dtype) -> PreTrainedModel:
        """transformers' model of the source's configuration, with the masters rounded to this."""
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder / "source"), dtype=dtype)
        parameters = dict(network.named_parameters())
        assert parameters.keys() == self.masters.keys()
        with torch.no_grad():
            for name, value in self.masters.items():
                parameters[name].copy_(value.to(dtype))
        return network.eval()


@pytest.fixture(scope="module", autouse=True)
def short_rehearsals() -> None:
    """What a rehearsal finds is nothing to these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal, "LEAST_REHEARSAL_NS", 1)
        yield


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), CASES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One of them, for what has nothing to do with the family."""
    return Trained(tmp_path_factory.mktemp("llama"), CASES["llama"])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors that the index of a folder names, each from the file in which it says that it lies."""
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(placed.values())}
    return {name: files[file][name] for name, file in placed.items()}


def test_a_run_goes_on_by_another_plan(trained: Trained) -> None:
    assert f"goes on from run/checkpoints/step-{STEPS:08}: {STEPS} steps done" in trained.resumed
    metrics = [json.loads(line) for line in (trained.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [each["step"] for each in metrics] == list(range(MORE_STEPS))
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
    assert {path.name for path in (trained.folder / "run/checkpoints").iterdir()} == {
        f"step-{step:08}" for step in (STEPS, MORE_STEPS)
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_computes_what_the_rounded_masters_compute(trained: Trained, dtype: str) -> None:
    found = AutoModelForCausalLM.from_pretrained(trained.folder / dtype).eval()
    assert found.dtype is DTYPES[dtype]
    tokens = torch.randint(0, 600, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, trained.network(DTYPES[dtype])(tokens).logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_generates_from_its_own_folder(trained: Trained, dtype: str) -> None:
    network = AutoModelForCausalLM.from_pretrained(trained.folder / dtype)
    tokenizer = AutoTokenizer.from_pretrained(trained.folder / dtype)
    source = Tokenizer.from_file(str(trained.folder / "source/tokenizer.json"))
    asked = tokenizer("One slow link", return_tensors="pt", return_token_type_ids=False)
    assert asked["input_ids"].tolist() == [source.encode("One slow link").ids]
    answer = network.generate(**asked, max_new_tokens=6, min_new_tokens=6)[0]
    assert answer.tolist()[:-6] == source.encode("One slow link").ids
    assert tokenizer.decode(answer) == source.decode(answer.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_has_the_sources_names_and_tied_weights_once(trained: Trained, dtype: str) -> None:
    case, found = trained.case, tensors(trained.folder / dtype)
    assert found.keys() == set(case.names.values())
    for name, stored in case.names.items():
        assert torch.equal(found[stored], trained.masters[name].to(DTYPES[dtype])), name
    total = json.loads((trained.folder / dtype / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    assert total == case.model.parameter_count * DTYPES[dtype].itemsize


CARRIED = {
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE", "README.md",
    "config.json",
}  # fmt: skip


@pytest.mark.parametrize("place", [*DTYPES, CHECKPOINT])
def test_what_lay_with_the_weights_lies_with_them_again(trained: Trained, place: str) -> None:
    folder, source = trained.folder / place, trained.folder / "source"
    shards = {path.name for path in folder.glob("model-*.safetensors")}
    own = {path.name for path in folder.glob("optimizer-*.safetensors")} | {"manifest.json"} if place == CHECKPOINT else set()
    assert {path.name for path in folder.iterdir()} == CARRIED | shards | {"model.safetensors.index.json"} | own
    assert len(shards) == trained.case.model.units
    for name in CARRIED - {"config.json"}:
        assert (folder / name).read_bytes() == (source / name).read_bytes(), name
    config, before = (json.loads((each / "config.json").read_text()) for each in (folder, source))
    assert config == before | {"torch_dtype": NAMES[DTYPES.get(place, torch.bfloat16)]}


def test_what_is_not_carried_is_said(trained: Trained) -> None:
    assert "weights: not kept with checkpoints: original (a folder)" in trained.executed


@pytest.mark.parametrize("place", [*DTYPES, CHECKPOINT])
def test_vllm_and_llama_cpp_find_the_weights_and_nothing_else(trained: Trained, place: str) -> None:
    """vLLM reads what the index names; llama.cpp's converter what is called model*.safetensors, all of it in the index."""
    folder = trained.folder / place
    placed = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    parts = sorted(path.name for path in folder.iterdir() if path.name.startswith("model") and path.suffix == ".safetensors")
    assert parts == sorted(set(placed.values()))
    inside = {}
    for part in parts:
        with safe_open(folder / part, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            inside |= dict.fromkeys(file.keys(), part)
    assert inside == placed


def test_a_checkpoint_is_read_as_it_is(trained: Trained) -> None:
    """Its weights are those that compute: rounded with ties away from zero."""
    found = dict(AutoModelForCausalLM.from_pretrained(trained.folder / CHECKPOINT).named_parameters())
    assert found.keys() == trained.masters.keys()
    assert all(torch.equal(found[name], rounded_away(value)) for name, value in trained.masters.items())


def test_a_checkpoint_can_be_planned_for(trained: Trained) -> None:
    """And the plan goes on with its run: the model is the same, whatever its folder is called."""
    done = planner("simulate", "--model", CHECKPOINT, "--seq-len", 32, "--global-batch", 4, cwd=trained.folder)
    assert done.returncode == 0, done.stderr
    assert f"step-{MORE_STEPS:08}: fits" in done.stdout


def begins(trained: Trained, place: str) -> None:
    """A new run begins with the weights of this folder: a learning rate of zero leaves them as they came."""
    new = f"new-{Path(place).name}"
    more = ("--data", "text.txt", "--steps", 1, "--lr", 0, "--device", "cpu", "-o", new)
    said = trained.done("execute", "plan.json", "--weights", place, *more)
    assert "left out" not in said
    assert "not kept" not in said
    checkpoint = trained.folder / new / "checkpoints/step-00000001"
    before, after = tensors(trained.folder / place), tensors(checkpoint)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {path.name for path in checkpoint.iterdir()} >= CARRIED
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 1


def test_a_new_run_begins_with_a_checkpoint(trained: Trained) -> None:
    begins(trained, CHECKPOINT)


def test_a_new_run_begins_with_an_export(llama: Trained) -> None:
    begins(llama, "bf16")


def test_a_comparison_covers_the_steps_since(llama: Trained) -> None:
    before = (llama.folder / "run/comparison.json").read_bytes()
    measured = json.loads((llama.folder / "run/measurement.json").read_text())
    losses = [json.loads(line)["loss"] for line in (llama.folder / "run/metrics.jsonl").read_text().splitlines()]
    assert measured["first_step"] == STEPS
    assert measured["losses"] == pytest.approx(losses[STEPS:])
    assert set(measured["steady_steps"]) <= set(range(STEPS + 2, MORE_STEPS))
    done = runtime("compare", "run", cwd=llama.folder)
    assert done.returncode == 0, done.stderr
    assert (llama.folder / "run/comparison.json").read_bytes() == before


def test_an_export_says_as_json_what_it_did(llama: Trained) -> None:
    done = runtime("export", "run", "--step", STEPS, "-o", "earlier", "--json", cwd=llama.folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "folder": "earlier", "checkpoint": f"run/checkpoints/step-{STEPS:08}", "step": STEPS, "dtype": "bf16",
    }  # fmt: skip
    expected = masters_of(llama.folder / f"run/checkpoints/step-{STEPS:08}", llama.case.model)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in tensors(llama.folder / "earlier").items())


def refused(trained: Trained, *arguments: object, code: int = 2) -> str:
    """What an export that fails says: one line. It leaves nothing behind."""
    before = set(trained.folder.iterdir())
    done = runtime("export", *arguments, cwd=trained.folder)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert set(trained.folder.iterdir()) == before
    lines = [line for line in done.stderr.splitlines() if line.startswith("runtime: ")]
    assert len(lines) == 1
    return lines[0]


def test_what_cannot_be_exported_is_refused_in_one_line(llama: Trained) -> None:
    assert refused(llama, "run", "--step", 7, "-o", "out") == (
        f"runtime: run: has no checkpoint after step 7; there are some after {STEPS}, {MORE_STEPS}"
    )
    assert refused(llama, "run", "-o", "bf16") == "runtime: bf16: exists already; name a new folder with -o"
    assert refused(llama, "run", "-o", "text.txt") == "runtime: text.txt: exists already; name a new folder with -o"
    assert "text.txt: cannot be written (text.txt is no folder)" in refused(llama, "run", "-o", "text.txt/out")
    for out in ("x" * 300, f"{'x' * 300}/out", "x" * 250):  # the last is too long as `.unfinished-`
        assert f"{'x' * 250}: cannot be written: File name too long" in refused(llama, "run", "-o", out)
    assert "is not a folder; name the run folder" in refused(llama, "x" * 300, "-o", "out")
    assert refused(llama, CHECKPOINT, "-o", "out") == (
        f"runtime: {CHECKPOINT}: is a checkpoint; name its run's folder: "
        f"`runtime export {llama.folder / 'run'} --step {MORE_STEPS} -o DIR`"
    )
    assert "nothing: is not a folder; name the run folder" in refused(llama, "nothing", "-o", "out")
    assert "source: holds no checkpoint; name a run folder" in refused(llama, "source", "-o", "out")


def test_where_there_is_no_room_nothing_is_written(llama: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting.Disk, "free_bytes", lambda *_: 1 << 20)
    said = refused(llama, "run", "-o", "out", code=1)
    assert said.startswith("runtime: .: ")
    assert "a/b: " in refused(llama, "run", "-o", "a/b/out", code=1), "whose folders are gone again"
    assert "are needed, 1.0 MiB are free" in said


def damaged(llama: Trained, folder: Path, *steps: int) -> None:
    """A copy of the run with a bit flipped in the weights after these steps."""
    shutil.copytree(llama.folder / "run", folder / "run")
    for step in steps:
        file = folder / f"run/checkpoints/step-{step:08}/model-00002-of-00006.safetensors"
        content = bytearray(file.read_bytes())
        content[-9] ^= 4
        file.write_bytes(content)


def test_where_the_newest_is_damaged_the_one_before_is_exported(llama: Trained, tmp_path: Path) -> None:
    damaged(llama, tmp_path, MORE_STEPS)
    done = runtime("export", "run", "-o", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stderr.replace("\n", " ")
    assert (
        "warning: run/checkpoints/step-00000024/model-00002-of-00006.safetensors: its content is not what was written" in said
    )
    assert f"the checkpoint before is taken; `runtime resume run --step {STEPS}` makes the steps since again" in said
    assert f"out: weights after {STEPS} steps in bf16, from run/checkpoints/step-{STEPS:08}" in said
    expected = masters_of(tmp_path / f"run/checkpoints/step-{STEPS:08}", llama.case.model)
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in tensors(tmp_path / "out").items())
    assert {path.name for path in tmp_path.iterdir()} == {"run", "out"}


def test_where_nothing_whole_is_left_nothing_is_exported(llama: Trained, tmp_path: Path) -> None:
    damaged(llama, tmp_path, STEPS, MORE_STEPS)
    for asked in ((), ("--step", MORE_STEPS)):
        done = runtime("export", "run", "-o", "out", *asked, cwd=tmp_path)
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("runtime: no checkpoint is whole: run/checkpoints/step-00000024/model-00002")
        assert done.stderr.count("the checkpoint before is taken") == (0 if asked else 1)
        assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_export_that_was_killed_leaves_a_hidden_folder_which_the_next_removes(llama: Trained, tmp_path: Path) -> None:
    shutil.copytree(llama.folder / "run", tmp_path / "run")
    changes = in_child(killed_things.exports, tmp_path / "run", tmp_path / "whole").changes
    assert changes > 50
    left = set()
    for at_change in range(1, changes + 1, changes // 8):
        out = tmp_path / f"out-{at_change}"
        assert in_child(killed_things.exports, tmp_path / "run", out, at_change=at_change, seed=at_change).killed
        found = {path.name for path in tmp_path.iterdir() if path.name.endswith(out.name)}
        assert found <= {f".unfinished-{out.name}"}
        left |= found
        done = runtime("export", "run", "-o", out.name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert {path.name for path in tmp_path.iterdir() if path.name.endswith(out.name)} == {out.name}
        assert contents(out) == contents(tmp_path / "whole")
    assert len(left) >= 6


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("held", [(FileWriter, "write"), (FileReader, "read")], ids=["writing", "reading"])
def test_an_interrupted_export_ends_its_threads_and_leaves_nothing(
    llama: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: tuple[type, str]
) -> None:
    """Ctrl-C comes while threads read or write; each of their blocks takes its time from then on."""
    shutil.copytree(llama.folder / "run", tmp_path / "run")
    kind, name = held
    as_it_is, calls = getattr(kind, name), []

    def slow(file: FileWriter | FileReader, block: memoryview, offset: int) -> None:
        calls.append(offset)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        if len(calls) >= 3:
            time.sleep(0.2)
        as_it_is(file, block, offset)

    monkeypatch.setattr(kind, name, slow)
    done = runtime("export", "run", "-o", "out", cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "runtime: interrupted"
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("checkpoint-")]
