"""Token windows."""

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.compute.uploads import TokenUploads
from runtime.inputs.data import TokenWindows
from runtime.machine import resident_bytes


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


def test_only_windows_being_read_of_mapped_tokens_are_in_memory(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(1 << 23, dtype=np.uint32))
    with (tmp_path / "tokens.npy").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    windows = TokenWindows(np.frombuffer(mapping, dtype=np.uint32, offset=128), 1023, 64, seed=1)
    before = resident_bytes()
    for step in range(windows.windows // 64):
        batch = windows.micro_batch(step, 0, 64)
        assert torch.equal(batch.labels, batch.inputs + 1)
    assert resident_bytes() - before < 8 << 20
