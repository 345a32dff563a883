"""What `runtime execute` says of its data, and refuses."""

from __future__ import annotations

import gzip
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from checkpoints import write_checkpoint
from running import plan_for
from runtime.cli import main
from runtime.lanes.backend import CpuBackend
from slideplan.codec import save
from tokenizers_made import WORDS, gpt2, write_tokenizer

MODEL = tiny_model(vocabulary=512)
WORKLOAD = tiny_workload()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder / "plan.json", plan_for(MODEL, tiny_policy(MODEL), WORKLOAD, CpuBackend()))
    write_checkpoint(folder / "weights", MODEL)
    tokenizer = gpt2()
    tokenizer.enable_truncation(8)
    write_tokenizer(folder / "weights", tokenizer, eos_token="</s>")
    (folder / "data").mkdir()
    (folder / "data" / "a.TXT").write_text(WORDS * 60)
    (folder / "data" / "b.jsonl").write_text((json.dumps({"text": WORDS}) + "\n") * 20)
    (folder / "data" / "c.gz").write_bytes(gzip.compress(b"text"))
    return folder


def execute(folder: Path, *arguments: object) -> tuple[int, list[str]]:
    """Exit code and lines of standard error, after two steps."""
    out, err = io.StringIO(), io.StringIO()
    words = ["runtime", "execute", "plan.json", "--device", "cpu", "--steps", "2", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, err.getvalue().splitlines()


def test_what_was_read_is_said_before_the_first_step(folder: Path) -> None:
    code, lines = execute(folder, "--data", "data", "--weights", "weights", "-o", "said", "--token-cache", "kept")
    assert code == 0, lines
    (number,) = [number for number, line in enumerate(lines) if line.startswith("read 2 of 3 files (JSON lines, text), 21 doc")]
    assert " epochs in 2 steps; left out: c.gz (gzip-compressed)" in lines[number]
    assert lines[number + 1].strip() == ("documents end with </s>; the truncation saved in tokenizer.json is not applied")
    assert not any("training" in line for line in lines[:number])
    assert {path.suffix for path in (folder / "kept").iterdir()} == {".npy", ".json"}


def test_choices_of_what_ends_a_document(folder: Path) -> None:
    code, lines = execute(
        folder,
        "--data",
        "data/b.jsonl",
        "--weights",
        "weights",
        "-o",
        "none",
        "--document-end",
        "none",
        "--token-cache",
        "kept",
    )
    assert code == 0, lines
    assert any("nothing ends a document" in line for line in lines)
    code, lines = execute(folder, "--data", "data", "--weights", "weights", "-o", "bad", "--document-end", "<|no|>")
    assert code == 2
    assert len(lines) == 1
    assert lines[0].startswith("runtime: --document-end: the end-of-text token '<|no|>' is not in weights/tokenizer.json")


def test_refused_data_gets_one_line_and_no_folder(folder: Path) -> None:
    code, lines = execute(folder, "--data", "data/c.gz", "--weights", "weights", "-o", "refused")
    assert (code, lines) == (2, ["runtime: --data data/c.gz: is gzip-compressed; unpack it"])
    assert not (folder / "refused").exists()


def test_what_is_too_little_is_said_with_what_was_left_out(folder: Path) -> None:
    (folder / "little").mkdir()
    (folder / "little" / "a.txt").write_text("short")
    (folder / "little" / "chat.jsonl").write_text('{"messages": []}\n' * 2)
    code, lines = execute(folder, "--data", "little", "--weights", "weights", "-o", "short")
    assert code == 2
    assert lines[-1].startswith("runtime: the data holds ")
    assert "read 1 of 2 files (text), 1 document, " in lines[-1]
    assert lines[-1].endswith("left out: chat.jsonl (JSON lines with the field 'messages')")
