"""Several runs that keep tokens in one folder at the same time."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.inputs.token_cache import TokenCache, TokenRecord
from slideplan.progress import silent


def record(count: int, digest: str) -> TokenRecord:
    return TokenRecord(tokens=count, dtype="uint8", digest=digest, documents=1)


def test_another_run_does_not_take_away_what_is_about_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It starts between the moment when a file is made and the one when it is locked."""
    cache, make = TokenCache(tmp_path), tempfile.mkstemp
    others: list[TokenCache] = []

    def made(**options: Any) -> tuple[int, str]:
        found = make(**options)
        if not others:
            others.append(TokenCache(tmp_path))
        return found

    monkeypatch.setattr(tempfile, "mkstemp", made)
    written = cache.put("key", "uint8", [np.arange(9, dtype=np.uint8)], record)
    assert others
    found = cache.get("key", silent)
    assert found is not None
    assert found.tokens.tolist() == written.tokens.tolist() == list(range(9))
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".json"}


def test_another_run_does_not_take_away_what_is_being_written(tmp_path: Path) -> None:
    cache = TokenCache(tmp_path)

    def parts() -> Any:
        yield np.zeros(4, np.uint8)
        TokenCache(tmp_path)
        yield np.ones(4, np.uint8)

    assert len(cache.put("key", "uint8", parts(), record).tokens) == 8
