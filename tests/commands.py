"""Commands as a user types them, in this process, which spares loading torch every time."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from runtime.cli import main


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def runtime(*arguments: object, cwd: Path) -> Done:
    """`runtime` with these arguments in this folder."""
    return _run(main, "runtime", arguments, cwd)


def planner(*arguments: object, cwd: Path) -> Done:
    """`planner` with these arguments in this folder."""
    from planner.cli import main as plan  # tests of the runtime alone need none of it

    return _run(plan, "planner", arguments, cwd)


def _run(command: Callable[[], None], name: str, arguments: Sequence[object], cwd: Path) -> Done:
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            command()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
