"""Executes a plan: lanes, buffers, units, optimizer, data, and the probes that measure a machine."""

import os
import sys

# Kept activations come and go in sizes that differ: growing segments instead of new ones keeps the
# device's memory whole. torch reads this once, when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Without it cuBLAS may sum in another order each time, which torch refuses where order matters. cuBLAS reads this once, too.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_cores = os.sched_getaffinity(0) if sys.platform == "linux" else set()


def keep_cores() -> None:
    """Give this thread the cores back that it had before torch was imported, and with it the lanes, which inherit them.

    Where the environment tells OpenMP to bind threads, importing torch binds the importing thread to a single core.
    """
    if _cores:
        os.sched_setaffinity(0, _cores)
