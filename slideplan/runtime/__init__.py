"""Executes a plan: lanes, buffers, units, optimizer, data, and the probes that measure a machine."""

import os

# Kept activations come and go in sizes that differ: growing segments instead of new ones keeps the
# device's memory whole. torch reads this once, when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# An OpenMP library that is told to bind threads binds the one that imports torch to a single core, and every lane would
# inherit it. The system's placement is as fast (benchmarks/host_update.py).
os.environ["OMP_PROC_BIND"] = "false"
