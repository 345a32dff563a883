from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from planner.catalogue.models import ALIASES, MODELS, find_model
from slideplan.hf_config import config_of, model_from_config
from slideplan.model import ModelSpec


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_parameters_are_those_of_transformers(model: ModelSpec):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        network = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config_of(model)))
    theirs = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}  # tied weights appear once
    assert model.shapes == theirs
    assert model.parameter_count == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_config_round_trip(model: ModelSpec, tmp_path: Path):
    folder = tmp_path / model.name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(model)))
    assert model_from_config(folder) == model


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-3.1-8b", 8_030_261_248), ("123b", 122_610_069_504), ("qwen3-8b", 8_190_735_360),
        ("qwen2.5-7b", 7_615_616_512), ("llama-3.2-3b", 3_212_749_824), ("405b", 405_853_388_800),
        ("llama-3.1-70b", 70_553_706_496), ("llama-3.2-1b", 1_235_814_400), ("mistral-7b", 7_248_023_552),
        ("qwen2.5-0.5b", 494_032_768), ("qwen2.5-72b", 72_706_203_648), ("qwen3-32b", 32_762_123_264),
    ],
)  # fmt: skip
def test_published_totals(name: str, parameters: int):
    assert find_model(name).parameter_count == parameters


@pytest.mark.parametrize(
    ("given", "name"),
    [("123B", "mistral-large-123b"), ("QWEN3-8B", "qwen3-8b"), ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
     ("meta-llama/Llama-3.1-8B", "llama-3.1-8b"), ("mistralai/Mistral-7B-v0.3", "mistral-7b"), ("tiny", "tiny")],
)  # fmt: skip
def test_names_aliases_and_repository_names(given: str, name: str):
    assert find_model(given) is MODELS[name]


def test_every_alias_leads_to_a_model():
    assert set(ALIASES.values()) <= set(MODELS)
    assert not set(ALIASES) & set(MODELS)
    assert all(name == name.casefold() for name in (*MODELS, *ALIASES))


def test_a_directory_is_read_and_a_catalogue_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "tiny"
    folder.mkdir()
    changed = msgspec.structs.replace(MODELS["tiny"], ffn=96)
    (folder / "config.json").write_text(json.dumps(config_of(changed)))
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny") is MODELS["tiny"]
    assert find_model("./tiny") == changed
    assert find_model(str(folder / "config.json")) == changed


def test_unknown_names_get_the_nearest_ones():
    with pytest.raises(ValueError, match=r"'llama-3\.1-9b' is neither .* did you mean llama-3\.1-8b.*`planner models`"):
        find_model("llama-3.1-9b")
    with pytest.raises(ValueError, match=r"'zzz' is neither in the catalogue nor a directory with a config.json; `planner"):
        find_model("zzz")


@pytest.mark.parametrize(
    "path", ["~nobody-of-that-name/tiny", "tiny" * 1000, "./tiny", "../tiny", "~/no-such-folder/tiny", "/tiny", "a/b/tiny"]
)
def test_a_path_that_is_not_there_is_not_taken_for_a_name(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is neither in the catalogue nor a directory"):
        find_model(path)


def test_rope_scaling_of_llama3():
    assert MODELS["llama-3.1-70b"].rope_scaling["factor"] == 8
    assert MODELS["llama-3.2-1b"].rope_scaling["factor"] == 32
