"""Seconds that a search takes to a proven answer, and its certificate: run with --benchmark-enable."""

from __future__ import annotations

import pytest

from planner.catalogue.machines import DEFAULT_MACHINE, find_machine
from planner.catalogue.models import find_model
from planner.search.best import search
from planner.search.space import SearchOptions
from slideplan.plan import Plan
from slideplan.policy import Workload

SEQ_LEN = 1024
H100 = "h100-80gb-125gib"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "machine", "global_batch"),
    [("123b", DEFAULT_MACHINE, 8), ("llama-3.1-8b", H100, 1), ("llama-3.1-8b", H100, 16), ("llama-3.1-8b", H100, 64)],
)
def test_search_speed(benchmark, model: str, machine: str, global_batch: int) -> None:
    workload = Workload(seq_len=SEQ_LEN, global_batch=global_batch)
    plan = benchmark.pedantic(
        search, (find_model(model), workload, find_machine(machine), SearchOptions()), rounds=3, warmup_rounds=0
    )
    assert isinstance(plan, Plan)
    found = plan.search
    assert found.unpriced == 0
    gap = plan.prediction.record.step_ns / found.bound_ns - 1
    assert gap <= SearchOptions().tolerance / (1 - SearchOptions().tolerance)
    benchmark.extra_info |= {
        "policies": found.candidates, "too_large": found.pruned_by_capacity, "ruled_out_by_bounds": found.pruned_by_bound,
        "simulated": found.simulated, "unpriced": found.unpriced, "gap": round(gap, 5),
    }  # fmt: skip
