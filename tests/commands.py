"""Commands as a user types them, in this process, which spares loading torch every time."""

from __future__ import annotations

import io
import sys
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
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["runtime", *map(str, arguments)])
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
