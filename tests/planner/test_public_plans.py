"""`planner simulate --model FOLDER` on published configurations."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from planner import cli
from public_configs import ACCEPTED, REFUSED, PublicConfig, label


def simulate(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["planner", "simulate", "--model", str(folder), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


# Small ones of every architecture: the search of a large one takes its time, and what is read of it is tested with the reader.
@pytest.mark.parametrize(
    "public", [each for each in ACCEPTED if each.parameters is not None and each.parameters < 7e8][::3], ids=label
)
def test_a_plan_is_of_the_model_that_was_read(
    public: PublicConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--machine", "rtx4090-2tib", "--seq-len", "256", "--global-batch", "1", "--effort", "0.01", "--json")
    assert simulate(public.write(tmp_path), monkeypatch, *options) == 0
    model = json.loads(capsys.readouterr().out)["model"]
    assert (model["layers"], model["vocabulary"]) == (public.config["num_hidden_layers"], public.config["vocab_size"])


@pytest.mark.parametrize("public", REFUSED[::6], ids=label)
def test_a_refusal_is_one_line(
    public: PublicConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert simulate(public.write(tmp_path), monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"planner: {tmp_path / 'config.json'}: field `{public.refused}` is ")
