"""Locks on files and folders."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.storage.locks import HeldError, exclusive, shared
from storage import open_descriptors


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> None:
    before = open_descriptors()
    yield
    assert open_descriptors() == before


def test_who_shares_shares_with_others_and_not_with_one_alone(tmp_path: Path) -> None:
    with shared(tmp_path), shared(tmp_path), pytest.raises(HeldError), exclusive(tmp_path):
        pytest.fail("was locked")
    with exclusive(tmp_path), pytest.raises(HeldError), exclusive(tmp_path):
        pytest.fail("was locked")
    with exclusive(tmp_path):
        pass


def test_who_shares_waits_for_one_alone(tmp_path: Path) -> None:
    order = []

    def share() -> None:
        with shared(tmp_path):
            order.append("shared")

    waiting = threading.Thread(target=share)
    with exclusive(tmp_path):
        waiting.start()
        waiting.join(0.2)
        order.append("alone")
    waiting.join()
    assert order == ["alone", "shared"]


def removed(folder: Path) -> None:
    folder.rmdir()


def replaced(folder: Path) -> None:
    folder.rename(folder.with_name("other"))
    folder.mkdir()


@pytest.mark.parametrize("change", [removed, replaced])
def test_what_has_lost_its_name_is_not_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    """The holder before has removed or renamed it between our opening and our lock."""
    folder, as_it_is = tmp_path / "folder", fcntl.flock
    folder.mkdir()

    def flock(descriptor: int, operation: int) -> None:
        change(folder)
        as_it_is(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(HeldError), exclusive(folder):
        pytest.fail("was locked")


@pytest.mark.parametrize("lock", [shared, exclusive])
def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: Callable) -> None:
    with pytest.raises(FileNotFoundError) as missing, lock(tmp_path / "no"):
        pytest.fail("was locked")
    assert missing.value.filename == str(tmp_path / "no")

    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="No locks available") as refused, lock(tmp_path):
        pytest.fail("was locked")
    assert refused.value.filename == str(tmp_path)
