"""What is read of published configurations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from public_configs import ACCEPTED, PUBLIC, REFUSED, PublicConfig, label
from slideplan.hf_config import model_from_config


def test_there_are_many_of_every_kind():
    assert Counter(public.config["model_type"] for public in ACCEPTED).keys() == {"llama", "mistral", "qwen2", "qwen3"}
    assert len(ACCEPTED) > 60
    assert len(ACCEPTED) + len(REFUSED) == len(PUBLIC)
    assert all(public.source for public in PUBLIC)


@pytest.mark.parametrize("public", ACCEPTED, ids=label)
def test_parameters_are_those_of_transformers(public: PublicConfig, tmp_path: Path):
    """As it counted them when the file was written; it counts them again in the runtime's tests, which have it at hand."""
    assert model_from_config(public.write(tmp_path)).parameter_count == public.parameters


@pytest.mark.parametrize("public", REFUSED, ids=label)
def test_other_models_are_refused_by_the_field_that_says_so(public: PublicConfig, tmp_path: Path):
    with pytest.raises(ValueError) as refusal:
        model_from_config(public.write(tmp_path))
    assert str(refusal.value).startswith(f"{tmp_path / 'config.json'}: field `{public.refused}` is ")
