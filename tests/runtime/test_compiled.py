"""Compiled code is kept between processes as a convenience: a run needs no place for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from numba.core.caching import CacheImpl

from runtime.kernels import cache
from runtime.optimizer.compiled import compiled

DOUBLE = """
import sys
from pathlib import Path
from runtime.optimizer.compiled import compiled

@compiled(nogil=True)
def double(x):
    return 2 * x

assert double(21) == 42
print(len(double.stats.cache_hits), len(double.stats.cache_misses))
"""


def double(folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(folder / "double.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


def test_code_is_kept_and_what_is_broken_is_compiled_again(tmp_path: Path) -> None:
    (tmp_path / "double.py").write_text(DOUBLE)
    assert double(tmp_path) == "0 1"
    assert double(tmp_path) == "1 0"
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".nbi", ".nbc")]
    assert {file.suffix for file in kept} == {".nbi", ".nbc"}
    for file in kept:
        whole = file.read_bytes()
        for broken in (b"", whole[:50], b"\x80\x05rubbish"):
            file.write_bytes(broken)
            assert double(tmp_path) == "0 1"
            file.write_bytes(whole)
        assert double(tmp_path) == "1 0"


def test_without_a_place_it_is_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])

    @compiled(nogil=True)
    def triple(x):  # type: ignore[no-untyped-def]
        return 3 * x

    assert triple(2) == 6


def test_a_disk_that_is_full_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    @compiled(nogil=True)
    def square(x):  # type: ignore[no-untyped-def]
        return x * x

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(square._cache._cache_file, "save", full)
    assert (square(3), square(1.5)) == (9, 2.25)


@pytest.mark.skipif(not shutil.which("setpriv") or os.geteuid() != 0, reason="becoming somebody else needs root and setpriv")
@pytest.mark.parametrize("uid", [65534, 4_000_000])  # nobody, and somebody who stands in no list of users
def test_loads_as_a_user_without_a_home_who_can_write_nothing(uid: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "NUMBA_CACHE_DIR")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = ["setpriv", "--reuid", str(uid), "--regid", str(uid), "--clear-groups", sys.executable, "-c"]
    if subprocess.run(
        [*command, "import torch, slideplan"], env=environment, cwd="/", capture_output=True, check=False
    ).returncode:
        pytest.skip("this interpreter, or this checkout, is root's alone")
    load = "from runtime.optimizer.adamw import HostUpdate; HostUpdate(1).compile(); import runtime.cli; print('done')"
    done = subprocess.run([*command, load], env=environment, cwd="/", capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


@pytest.fixture
def triton_cache(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is registered for the process's end."""
    registered: list[tuple[object, ...]] = []
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_HOME", raising=False)
    monkeypatch.setattr(cache.atexit, "register", lambda *arguments, **_: registered.append(arguments))
    return registered


def test_kernels_are_kept_in_the_home_folder(
    triton_cache: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    cache.need_no_home()
    assert cache.VARIABLE not in os.environ
    assert list((tmp_path / ".triton/cache").iterdir()) == []


@pytest.mark.parametrize("home", ["/proc/nowhere", "file"])
def test_without_a_home_kernels_are_kept_for_the_process(
    triton_cache: list[tuple[object, ...]], home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    cache.need_no_home()
    folder = Path(os.environ[cache.VARIABLE])
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    ((remove, removed),) = triton_cache
    remove(removed)  # type: ignore[operator]
    assert not folder.exists()
    monkeypatch.delenv(cache.VARIABLE)


def test_a_chosen_folder_stays_chosen(triton_cache: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/proc/nowhere")
    monkeypatch.setenv(cache.VARIABLE, "/mine")
    cache.need_no_home()
    assert os.environ[cache.VARIABLE] == "/mine"
    assert not triton_cache
