"""Text to token windows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from runtime.compute.uploads import TokenUploads
from runtime.inputs.data import TokenWindows, default_text, text_files, tokenize


def test_windows_cover_an_epoch_once_and_shift_labels() -> None:
    tokens = np.arange(101, dtype=np.uint32)
    windows = TokenWindows(tokens, seq_len=10, global_batch=5)
    assert windows.windows == 10
    seen = []
    for step in range(2):
        batch = windows.micro_batch(step, 0, 5)
        assert torch.equal(batch.labels, batch.inputs + 1)
        seen += batch.inputs.view(5, 10)[:, 0].tolist()
    assert sorted(seen) == list(range(0, 100, 10))
    second_epoch = [start for step in (2, 3) for start in windows.micro_batch(step, 0, 5).inputs.view(5, 10)[:, 0].tolist()]
    assert sorted(second_epoch) == sorted(seen)
    assert second_epoch != seen


def test_micro_batches_divide_the_step_and_depend_on_seed_and_step_alone() -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 1001).astype(np.uint32)
    windows = TokenWindows(tokens, 10, 4, seed=3)
    whole = windows.micro_batch(7, 0, 4)
    windows.micro_batch(100, 0, 4)
    parts = [windows.micro_batch(7, micro, 2) for micro in range(2)]
    assert torch.equal(whole.inputs, torch.cat([part.inputs for part in parts]))
    assert torch.equal(whole.inputs, TokenWindows(tokens, 10, 4, seed=3).micro_batch(7, 0, 4).inputs)
    assert not torch.equal(whole.inputs, TokenWindows(tokens, 10, 4, seed=4).micro_batch(7, 0, 4).inputs)
    assert torch.equal(whole.distinct[whole.positions_in_distinct], whole.inputs)


def test_what_was_sent_ahead_is_what_the_step_takes() -> None:
    """In any order, after a step was left out, and where nothing was sent."""
    tokens = np.random.default_rng(0).integers(0, 50, 1001).astype(np.uint32)
    uploads = TokenUploads(TokenWindows(tokens, 10, 4, seed=3), 2, torch.device("cpu"))
    truth = TokenWindows(tokens, 10, 4, seed=3)
    for step, next_step in ((0, 1), (1, 2), (2, 7), (7, 8), (3, 4)):
        for micro in (1, 0):
            taken, expected = uploads.take(step, micro), truth.micro_batch(step, micro, 2)
            assert all(torch.equal(left, right) for left, right in zip(taken, expected, strict=True))
            uploads.send(next_step, micro)


def test_too_little_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"holds 10 tokens, one sequence needs 11\b"):
        TokenWindows(np.arange(10, dtype=np.uint32), 10, 1)


def test_bytes_are_tokens_without_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").write_text("xyz")
    (tmp_path / "a.txt").write_text("hello")
    assert bytes(tokenize(tmp_path, None, 256).astype(np.uint8)) == b"hello\n\nxyz\n\n"
    monkeypatch.setattr("runtime.inputs.data.MAX_TOKENS", 4)
    assert bytes(tokenize(tmp_path, None, 256)) == b"hell"


def test_tokenizer_of_the_weights_is_used(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("hello big world")
    assert tokenize(tmp_path / "text.txt", tmp_path, 3).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"gives token 2, the model's vocabulary has 2\b"):
        tokenize(tmp_path / "text.txt", tmp_path, 2)
    assert tokenize(tmp_path / "text.txt", tmp_path, 256, byte_tokens=True).tolist() == [*b"hello big world", 10, 10]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        tokenize(tmp_path / "text.txt", tmp_path, 3)


def test_missing_and_empty_data(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing: does not exist"):
        text_files(tmp_path / "nothing")
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no text files"):
        text_files(tmp_path)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ValueError, match=r"byte-level tokens need a vocabulary of 256\b"):
        tokenize(tmp_path, None, 100)


def test_default_text_is_there() -> None:
    assert len(tokenize(default_text(), None, 256)) > 1_000_000


def test_folder_below_installed_packages_is_data_too(tmp_path: Path) -> None:
    folder = tmp_path / "site-packages" / "mine"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("abc")
    assert text_files(folder) == [folder / "a.txt"]
    (tmp_path / "b.txt").write_text("abc")
    assert text_files(tmp_path) == [tmp_path / "b.txt"]


def test_no_more_of_a_large_file_is_read_than_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.inputs.data.MAX_TOKENS", 100)
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(1 << 40)  # sparse: nothing of it lies anywhere
    assert len(tokenize(tmp_path / "large.txt", None, 256)) == 100
