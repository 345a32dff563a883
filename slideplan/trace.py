"""Chrome/Perfetto trace with predicted and measured tracks under the same task names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slideplan.codec import write_atomic
from slideplan.graph.tasks import TaskGraph
from slideplan.timeline import StepRecord


def trace_events(graph: TaskGraph, records: dict[str, StepRecord]) -> list[dict[str, Any]]:
    """Complete events of the Trace Event Format: one process per record, one thread per lane, microseconds."""
    events: list[dict[str, Any]] = []
    for process, (name, record) in enumerate(records.items(), start=1):
        # Perfetto wants times from zero on; loads issued in the step before start below it.
        origin = min((span.start_ns for span in record.spans), default=0)
        events.append({"ph": "M", "name": "process_name", "pid": process, "tid": 0, "args": {"name": name}})
        threads = {lane: thread for thread, lane in enumerate(graph.lanes, start=1)}
        for lane, thread in threads.items():
            named = {"ph": "M", "pid": process, "tid": thread}
            events.append(named | {"name": "thread_name", "args": {"name": lane.name}})
            events.append(named | {"name": "thread_sort_index", "args": {"sort_index": thread}})
        for number, (task, span) in enumerate(zip(graph.tasks, record.spans, strict=True)):
            events.append({
                "ph": "X", "name": task.name, "cat": str(task.operation), "pid": process, "tid": threads[task.lane],
                "ts": (span.start_ns - origin) / 1e3, "dur": span.duration_ns / 1e3,
                "args": {"bytes_moved": task.bytes_moved, "flops": task.flops, "waits for": "; ".join(graph.why(number))},
            })  # fmt: skip
    return events


def write_trace(path: str | Path, graph: TaskGraph, records: dict[str, StepRecord]) -> None:
    """Write a trace file that chrome://tracing and Perfetto open."""
    document = {"displayTimeUnit": "ms", "traceEvents": trace_events(graph, records)}
    write_atomic(Path(path), json.dumps(document).encode())
