"""Executes a plan: lanes, buffers, units, optimizer, data, and the probes that measure a machine."""

import os

# Kept activations come and go in sizes that differ: growing segments instead of new ones keeps the
# device's memory whole. torch reads this once, when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
