"""Where Triton keeps compiled kernels. Nobody's home must be writable for a run."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "TRITON_CACHE_DIR"


def need_no_home() -> None:
    """Give Triton a folder of this process's own, gone with it, where its usual one cannot be written.

    A folder that the user has chosen stays chosen. Triton reads the environment when it compiles.
    """
    if VARIABLE in os.environ:
        return
    try:
        usual = Path(os.environ.get("TRITON_HOME", "~")).expanduser() / ".triton" / "cache"
        usual.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=usual).close()
    except (OSError, RuntimeError):  # RuntimeError: nobody knows this user's home
        folder = tempfile.mkdtemp(prefix="slideplan-triton-")
        os.environ[VARIABLE] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
