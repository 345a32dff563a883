"""Lanes: streams and threads, the executor that walks a task graph, how cores are divided."""
