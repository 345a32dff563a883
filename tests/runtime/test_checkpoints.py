"""Folders as they are met in the wild: what is read, what is refused and with which words, and that nothing vanishes unsaid."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from builders import tiny_model, tiny_policy, tiny_workload
from checkpoints import random_state_dict, write_checkpoint
from running import plan_for, unit_tensors
from runtime.inputs.weights import SafetensorsWeights
from runtime.lanes.backend import CpuBackend
from runtime.run import RunRequest, check_request, execute
from runtime.session import Progress
from slideplan.hf_config import config_of
from slideplan.model import ModelSpec

MODEL = tiny_model()
TIED = tiny_model(tied_embeddings=True)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 11421896\n"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

Tensors = dict[str, torch.Tensor]


def shards(folder: Path, tensors: Tensors, count: int = 2, index: bool = True) -> list[Path]:
    """A checkpoint in shards, without a config."""
    names = sorted(tensors)
    files = [folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, file in enumerate(files):
        save_file({name: tensors[name] for name in names[number::count]}, file)
    if index:
        placed = {name: files[number % count].name for number, name in enumerate(names)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return files


def refusal(folder: Path, model: ModelSpec = MODEL) -> str:
    """The message of a refusal: one line that names the folder or a file in it."""
    with pytest.raises(ValueError) as refused:
        SafetensorsWeights(model, folder)
    message = str(refused.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def check_read(source: SafetensorsWeights, model: ModelSpec, tensors: Tensors) -> None:
    """Every parameter has the values of the tensor of its standard name."""
    for unit in range(model.units):
        for name, value in unit_tensors(source, unit).items():
            assert torch.equal(value, tensors[model.unit_prefix(unit) + name])


def first_loss(plan_model: ModelSpec, folder: Path, out: Path) -> tuple[float, list[Progress]]:
    plan = plan_for(plan_model, tiny_policy(plan_model), tiny_workload(), CpuBackend())
    shown: list[Progress] = []
    text = folder / "text.txt"
    text.write_text("Neither a borrower nor a lender be. " * 100)
    out.mkdir()
    request = RunRequest(plan, "plan.json", out, steps=1, device="cpu", data=text, weights=folder, byte_tokens=True)
    return execute(request, shown.append).losses[0], shown


# -- which names -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [MODEL, TIED, tiny_model(architecture="qwen2", attention_bias="qkv", tied_embeddings=True)])
def test_a_base_models_names_are_read(model: ModelSpec, tmp_path: Path) -> None:
    tensors = random_state_dict(model)
    bare = {name.removeprefix("model."): value for name, value in tensors.items()}
    source = SafetensorsWeights(model, write_checkpoint(tmp_path, model, bare))
    check_read(source, model, tensors)
    assert source.notes == []


def test_a_base_model_without_head_says_what_would_take_its_place(tmp_path: Path) -> None:
    tensors = {name: value for name, value in random_state_dict(MODEL).items() if name != HEAD}
    message = refusal(write_checkpoint(tmp_path, MODEL, tensors))
    assert "tensor lm_head.weight is missing" in message
    assert "set tie_word_embeddings to true" in message


def test_both_names_at_once_are_two_answers_unless_they_agree(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    norm = "model.layers.1.input_layernorm.weight"
    both = {**tensors, norm.removeprefix("model."): tensors[norm].clone()}
    assert SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, both)).notes == []
    both[norm.removeprefix("model.")][3] = 7.0
    message = refusal(write_checkpoint(tmp_path, MODEL, both))
    assert f"{norm.removeprefix('model.')} differs from {norm}" in message


@pytest.mark.parametrize(
    ("rename", "words"),
    [
        (lambda name: f"module.{name}", "`module.` was put there by DistributedDataParallel or DeepSpeed"),
        (lambda name: f"_orig_mod.{name}", "`_orig_mod.` was put there by torch.compile"),
        (lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod.").replace("layers.", "layers._orig_mod."),
         "`_orig_mod.` was put there by torch.compile"),
        (lambda name: f"module._orig_mod.{name}", "torch.compile and `module.` was put there by"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "`_fsdp_wrapped_module.` was put there by FSDP"),
        (lambda name: f"language_model.{name}", "`language_model.` was put there by a model of images"),
        (lambda name: name.replace("model.", "model.language_model."), "`language_model.` was put there by a model of images"),
        (lambda name: f"base_model.model.{name}", "`base_model.model.` was put there by PEFT"),
        (lambda name: f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight", "an adapter (LoRA) and no whole model"),
        (lambda name: f"transformer.{name.replace('layers', 'h')}", "there are transformer.lm_head.weight, transf"),
    ],
)  # fmt: skip
def test_other_prefixes_are_explained(rename: Callable[[str], str], words: str, tmp_path: Path) -> None:
    tensors = {rename(name): value for name, value in random_state_dict(MODEL).items()}
    message = refusal(write_checkpoint(tmp_path, MODEL, tensors))
    assert words in message
    assert len(message) < 500 + len(str(tmp_path))


# -- tied embeddings ---------------------------------------------------------------------------


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    tensors = random_state_dict(TIED)
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] += 1
    folder = write_checkpoint(tmp_path, TIED, tensors)
    message = refusal(folder, TIED)
    assert "lm_head.weight differs from model.embed_tokens.weight" in message
    assert "tie_word_embeddings: true; set it to false" in message
    # What the message says works: both are trained then, and the loss is transformers'.
    untied = msgspec.structs.replace(TIED, tied_embeddings=False)
    (folder / "config.json").write_text(json.dumps(config_of(untied)))
    check_read(SafetensorsWeights(untied, folder), untied, tensors)


def test_transformers_does_not_tie_what_differs(tmp_path: Path) -> None:
    """Or the refusal would be of something that it trains."""
    tensors = random_state_dict(TIED)
    tensors[HEAD] = tensors[EMBEDDING] + 1
    network = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path, TIED, tensors), dtype=torch.bfloat16)
    assert torch.equal(network.lm_head.weight, tensors[HEAD])
    assert torch.equal(network.model.embed_tokens.weight, tensors[EMBEDDING])


@pytest.mark.parametrize("stored", [(EMBEDDING, HEAD), (HEAD,), ("embed_tokens.weight", HEAD), ("embed_tokens.weight",)])
def test_tied_embeddings_are_read_under_the_name_of_either_end(stored: tuple[str, ...], tmp_path: Path) -> None:
    tensors = random_state_dict(TIED)
    matrix = tensors[EMBEDDING]
    written = {name: value for name, value in tensors.items() if name != EMBEDDING} | {name: matrix.clone() for name in stored}
    source = SafetensorsWeights(TIED, write_checkpoint(tmp_path, TIED, written))
    check_read(source, TIED, tensors)
    assert source.notes == []
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(network.lm_head.weight, matrix)
    assert torch.equal(network.model.embed_tokens.weight, matrix)


# -- what the config leaves out ----------------------------------------------------------------


def test_biases_that_the_config_omits_are_named_once_before_the_first_step(tmp_path: Path) -> None:
    biased = tiny_model(attention_bias="qkvo")
    folder = write_checkpoint(tmp_path / "weights", MODEL, random_state_dict(biased))
    _, shown = first_loss(MODEL, folder, tmp_path / "run")
    notes = [progress.note for progress in shown if progress.note.startswith("weights: ")]
    assert len(notes) == 1
    assert notes[0].startswith("weights: 39 tensors used, 16 not, because config.json describes a llama without them: ")
    assert "model.layers.{0-3}.self_attn.q_proj.bias, " in notes[0]
    told, trained = ([bool(getattr(progress, of)) for progress in shown].index(True) for of in ("note", "loss"))
    assert told < trained


@pytest.mark.parametrize(
    ("planned", "stored", "said"),
    [
        (MODEL, tiny_model(layers=6), "39 tensors used, 18 not, .*model.layers.{4-5}.self_attn.q_proj.weight, "),
        (MODEL, tiny_model(layers=5), "39 tensors used, 9 not, .*model.layers.4.mlp.up_proj.weight, "),
        (MODEL, tiny_model(architecture="qwen3", qk_norm=True), "39 tensors used, 8 not, .*layers.{0-3}.self_attn.k_norm"),
        (MODEL, tiny_model(architecture="qwen2", attention_bias="qkv"), "39 tensors used, 12 not, .*self_attn.v_proj.bias$"),
    ],
)  # fmt: skip
def test_layers_norms_and_biases_that_the_config_omits(
    planned: ModelSpec, stored: ModelSpec, said: str, tmp_path: Path
) -> None:
    (note,) = SafetensorsWeights(planned, write_checkpoint(tmp_path, planned, random_state_dict(stored))).notes
    assert re.search(said, note), note


def test_other_tensors_are_named_too(tmp_path: Path) -> None:
    extra = {
        **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1, 3)},
        **{f"vision_tower.blocks.{block}.mlp.0.weight": torch.ones(2, 2) for block in range(12)},
        "score.weight": torch.ones(1, 64),
        "model.norm.bias": torch.zeros(64),
    }
    source = SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, random_state_dict(MODEL) | extra))
    (note,) = source.notes
    assert "39 tensors used, 17 not" in note
    for name in (
        "model.layers.{0-1,3}.self_attn.rotary_emb.inv_freq",
        "vision_tower.blocks.{0-11}.mlp.0.weight",
        "score.weight",
    ):
        assert name in note
    assert "model.norm.bias" in note


def test_names_of_a_file_cannot_break_a_message(tmp_path: Path) -> None:
    extra = {"a\nb[/red]": torch.ones(1), "x" * 1000: torch.ones(1)}
    (note,) = SafetensorsWeights(MODEL, write_checkpoint(tmp_path, MODEL, random_state_dict(MODEL) | extra)).notes
    assert "\n" not in note
    assert len(note) < 1000


def test_a_config_that_promises_more_than_there_is(tmp_path: Path) -> None:
    assert "self_attn.q_proj.bias is missing" in refusal(
        write_checkpoint(tmp_path, MODEL, random_state_dict(MODEL)), tiny_model(attention_bias="qkvo")
    )


@pytest.mark.parametrize("rows", [250, 320])
def test_a_padded_vocabulary_says_which_field(rows: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, MODEL, random_state_dict(tiny_model(vocabulary=rows)))
    message = refusal(folder)
    assert f"model.embed_tokens.weight in model.safetensors has shape [{rows}, 64], expected [256, 64]" in message
    assert f"set vocab_size to {rows} in config.json" in message


# -- which files -------------------------------------------------------------------------------


def test_an_index_of_shards_beside_a_single_file_is_two_answers(tmp_path: Path) -> None:
    old, new = random_state_dict(MODEL), {name: value + 1 for name, value in random_state_dict(MODEL).items()}
    files = shards(tmp_path, old)
    write_checkpoint(tmp_path, MODEL, new)
    message = refusal(tmp_path)
    assert "holds two checkpoints, model.safetensors and the 2 shards of model.safetensors.index.json" in message
    assert "move one of them away" in message
    files[0].unlink()
    assert "two checkpoints" in refusal(tmp_path)
    files[1].unlink()  # an index that describes nothing is no answer
    check_read(SafetensorsWeights(MODEL, tmp_path), MODEL, new)


def test_an_index_of_the_single_file_is_one_answer(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    write_checkpoint(tmp_path, MODEL, tensors)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(tensors, "model.safetensors")})
    )
    check_read(SafetensorsWeights(MODEL, tmp_path), MODEL, tensors)


def test_a_tensor_of_two_shards_is_two_answers(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    first, _ = shards(tmp_path, tensors)
    save_file(tensors, first)
    assert " is in model-00001-of-00002.safetensors and in model-00002-of-00002.safetensors" in refusal(tmp_path)


def test_shards_know_more_than_their_index(tmp_path: Path) -> None:
    tensors = random_state_dict(MODEL)
    shards(tmp_path, tensors | {"extra.weight": torch.ones(3)})
    index = tmp_path / "model.safetensors.index.json"
    placed = json.loads(index.read_text())["weight_map"]
    del placed["extra.weight"]
    index.write_text(json.dumps({"weight_map": placed}))
    (note,) = SafetensorsWeights(MODEL, tmp_path).notes
    assert note.endswith(": extra.weight")
    placed["lm_head.weight"] = "model-00002-of-00002.safetensors"
    placed["model.layers.9.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": placed}))
    assert (
        "tensor lm_head.weight is not in model-00002-of-00002.safetensors, where the index places it"
        in refusal_without_head(tmp_path, tensors)
    )


def refusal_without_head(folder: Path, tensors: Tensors) -> str:
    for file in folder.glob("*.safetensors"):
        kept = [name for name in sorted(tensors) if name != HEAD]
        save_file({name: tensors[name] for name in kept[int(file.name[10]) - 1 :: 2]}, file)
    return refusal(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"pytorch_model.bin": b"x"}, "but pytorch_model.bin: a pickle, which can run code of its own; load"),
        ({"pytorch_model-00001-of-00002.bin": b"x", "pytorch_model.bin.index.json": b"{}"}, "a pickle, which can run code"),
        ({"consolidated.00.pth": b"x", "params.json": b"{}"}, "but consolidated.00.pth: a pickle"),
        ({"model-q4_k_m.gguf": b"x"}, "a quantized format; take the weights that it was made from"),
        ({"consolidated.safetensors": b"x"}, "not what the layout of Hugging Face calls the model"),
        ({"model-00001-of-00002.safetensors": b"x"}, "but no model.safetensors.index.json; download the index"),
        ({"adapter_model.safetensors": b"x", "adapter_config.json": b"{}"}, "an adapter and no whole model; merge it"),
        ({"tf_model.h5": b"x"}, "weights of TensorFlow"),
        ({"training_args.bin": b"x"}, "holds neither model.safetensors nor model.safetensors.index.json; name a Hugging Face"),
        ({"model.safetensors": LFS}, "is a Git LFS pointer and not the file itself; fetch it with `git lfs pull`"),
        ({"model.safetensors.index.json": LFS}, "index.json: is a Git LFS pointer"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "m.safetensors"}}', "m.safetensors": LFS}, "is a Git LFS"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "../m.safetensors"}}'}, "which is no file of this folder"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "/etc/passwd"}}'}, "which is no file of this folder"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": 5}}'}, "which is no file of this folder"),
        ({"model.safetensors.index.json": b'{"weight_map": []}'}, "no readable `weight_map`"),
        ({"model.safetensors.index.json": b'{"weight_map": {}}'}, "no readable `weight_map`"),
        ({"model.safetensors.index.json": b"["}, "not valid JSON"),
        ({"model.safetensors.index.json": b"[" * 100_000}, "not valid JSON"),
        ({"model.safetensors": b""}, "not a readable safetensors file"),
        ({"model.safetensors": b"\xff" * 7 + b"\x7f" + b"{"}, "it says that its header has 9223372036854775807 bytes"),
    ],
)  # fmt: skip
def test_folders_without_a_readable_checkpoint(files: dict[str, bytes], words: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert words in refusal(tmp_path)


def test_files_that_were_left_out_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, MODEL)
    for name in ("consolidated.safetensors", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "rng_state.pth"):
        (tmp_path / name).write_bytes(b"x")
    (note,) = SafetensorsWeights(MODEL, tmp_path).notes
    assert note == "weights: read model.safetensors; left out: consolidated.safetensors, pytorch_model.bin"


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, MODEL) / "model.safetensors"
    for length in (1, 8, 100, file.stat().st_size - 1):
        content = file.read_bytes()
        file.write_bytes(content[:length])
        assert "not a readable safetensors file" in refusal(tmp_path)
        file.write_bytes(content)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors.index.json")
    assert "index.json: is not a file" in refusal(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    assert "holds neither" in refusal(tmp_path)


def test_the_hubs_cache_of_links_is_read(tmp_path: Path) -> None:
    real = write_checkpoint(tmp_path / "real", MODEL)
    snapshot = tmp_path / "models--acme--tiny" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(real.iterdir())):
        blob = tmp_path / "models--acme--tiny" / f"{number}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(f"../../{blob.name}")
    check_read(SafetensorsWeights(MODEL, snapshot), MODEL, random_state_dict(MODEL))


# -- against the plan --------------------------------------------------------------------------


def check(planned: ModelSpec, folder: Path, out: Path, **workload: Any) -> None:
    plan = plan_for(planned, tiny_policy(planned), tiny_workload(**workload), CpuBackend())
    check_request(RunRequest(plan, "plan.json", out, steps=1, device="cpu", weights=folder))


def test_another_number_of_positions_is_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()  # as the command has: what is free on its drive is asked
    for positions in (64, 128, 4096):
        write_checkpoint(tmp_path, tiny_model(max_positions=positions))
        check(MODEL, tmp_path, tmp_path / "run", seq_len=64)
    write_checkpoint(tmp_path, tiny_model(max_positions=63))
    with pytest.raises(ValueError, match="max_positions is 63, planned 512"):
        check(MODEL, tmp_path, tmp_path / "run", seq_len=64)
    write_checkpoint(tmp_path, tiny_model(max_positions=4096, rope_theta=1e6))
    with pytest.raises(ValueError, match=r"rope_theta is 1000000\.0, planned 10000\.0; plan for it"):
        check(MODEL, tmp_path, tmp_path / "run", seq_len=64)


def test_a_dynamic_scaling_is_the_same_below_its_positions(tmp_path: Path) -> None:
    """The one type whose frequencies read the number of positions; the loss shows that they do not here."""
    scaling: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0}
    losses = []
    for positions in (128, 4096):
        folder = write_checkpoint(tmp_path / str(positions), tiny_model(max_positions=positions, rope_scaling=scaling))
        losses.append(first_loss(tiny_model(rope_scaling=scaling), folder, tmp_path / f"run{positions}")[0])
    assert losses[0] == losses[1]
