"""Measured figures that cannot be are refused where they are read, by the name of their field."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import pytest

from builders import tiny_machine, tiny_model, tiny_workload
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import ComputeCost, LayerShape, Spread
from slideplan.measurement import Measurement
from slideplan.model import UnitRole
from slideplan.placement import Tier
from slideplan.timeline import Span, StepRecord


def compute_cost(**fields: Any) -> ComputeCost:
    known: dict[str, Any] = {
        "shape": LayerShape.of(tiny_model(), UnitRole.LAYER), "kind": TaskKind.FORWARD, "micro_batch": 1, "seq_len": 1,
        "duration_ns": Spread.exact(1), "saved_bytes": 0, "workspace_bytes": None,
    }  # fmt: skip
    return ComputeCost(**known | fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0, must be at least 1"),
        ({"seq_len": 0}, "seq_len is 0, must be at least 1"),
        ({"duration_ns": Spread.exact(0)}, "duration_ns.p50 is 0, must be at least 1"),
        ({"saved_bytes": -1}, "saved_bytes is -1, must be zero or more"),
        ({"workspace_bytes": -1}, "workspace_bytes is -1, must be zero or more"),
    ],
)
def test_costs(fields: dict[str, Any], message: str) -> None:
    compute_cost()
    with pytest.raises(ValueError, match=f"^cost of forward: {re.escape(message)}$"):
        compute_cost(**fields)


def record(step_ns: int = 10, spans: tuple[Span, ...] = (Span(0, 5),)) -> StepRecord:
    return StepRecord(step_ns=step_ns, tokens_per_s=1.0, lanes={}, peak_bytes={Tier.GPU: 0}, spans=spans)


def measurement(**fields: Any) -> Measurement:
    known: dict[str, Any] = {
        "version": "0", "plan_digest": "", "machine": tiny_machine().identity(), "versions": {}, "date": "", "command": "",
        "steady_steps": (1,), "step_ns": (10, 10), "losses": (2.0, 1.0), "task_ns": (5,), "record": record(),
    }  # fmt: skip
    return Measurement(**known | fields)


POSITIVE = "step times must be positive and task times not negative"
NAMED = "steady_steps must name some of the steps, and every step has one time and one loss"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"step_ns": (10, 0)}, POSITIVE),
        ({"task_ns": (-1,)}, POSITIVE),
        ({"record": record(step_ns=0)}, POSITIVE),
        ({"losses": (1.0,)}, NAMED),
        ({"steady_steps": ()}, NAMED),
        ({"steady_steps": (2,)}, NAMED),
        ({"rehearsed_ns": 0}, "rehearsed_ns is 0, must be positive"),
        ({"task_ns": (5, 5)}, "record.spans and task_ns must have one entry per task each"),
    ],
)
def test_measurements(fields: dict[str, Any], message: str) -> None:
    measurement(task_ns=(0,), step_ns=(1, 1), rehearsed_ns=1, record=record(step_ns=1))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        measurement(**fields)


@pytest.mark.parametrize("field", ["seq_len", "global_batch"])
def test_workloads(field: str) -> None:
    for value in (1, 1 << 30):
        msgspec.structs.replace(tiny_workload(), **{field: value})
    for value in (0, (1 << 30) + 1):
        with pytest.raises(ValueError, match=rf"^{field} is {value}, must be in 1\.\.1073741824$"):
            type(tiny_workload())(**{"seq_len": 1, "global_batch": 1} | {field: value})
