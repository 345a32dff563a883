"""What is built is what is used: a wheel, installed elsewhere, plans without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _pip("wheel", str(REPOSITORY), "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder))
    (found,) = folder.glob("slideplan-*.whl")
    return found


def _pip(*arguments: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_wheel_holds_the_packages_and_the_profiles_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    rooms = {name.split("/")[0] for name in names}
    assert {room for room in rooms if not room.endswith(".dist-info")} == {
        "slideplan", "simulator", "planner", "runtime", "profiles",
    }  # fmt: skip
    profiles = {Path(name).name for name in names if name.startswith("profiles/") and name.endswith(".json")}
    tracked = subprocess.run(["git", "ls-files", "profiles"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert profiles >= {Path(name).name for name in tracked.stdout.split() if name.endswith(".json")}


def test_a_wheel_installed_elsewhere_plans_123b(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    _pip("install", str(wheel), "--no-deps", "--target", str(site))
    environment = os.environ | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import planner, slideplan; print(planner.__file__, slideplan.__file__)"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    assert all(Path(file).is_relative_to(site) for file in where.stdout.split())
    run = subprocess.run(
        [sys.executable, str(site / "bin" / "planner"), "simulate", "--model", "123b"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "mistral-large-123b: fits" in run.stdout
    assert "taking the shipped" in run.stderr
