"""The task graph: one training step as data, its checks, and its replay on given durations."""
