"""Reports of earlier versions can be priced again: what they call things is translated."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import reprice
from campaign_draw import sketch
from planner.catalogue.models import find_model
from slideplan.codec import load
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.placement import Tier

REPORT = Path(__file__).parents[2] / "reports" / "validation-h100-80gb-125gib-2026-11-22-third"  # of version 0.6.0
GPU, HOST = "gpu", "host"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ({"state": HOST, "inner": "recompute"}, {"moments": HOST, "inner": None, "feed_forward": None, "update": HOST}),
        ({"state": HOST, "inner": "keep", "streams_state": False}, {"inner": GPU, "feed_forward": GPU, "update": HOST}),
        ({"state": HOST, "inner": "offload"}, {"inner": GPU, "feed_forward": HOST}),
        ({"state": GPU, "inner": "recompute"}, {"remainder": GPU, "moments": GPU, "update": GPU}),
        ({"state": HOST, "inner": "recompute", "streams_state": True}, {"remainder": HOST, "moments": HOST, "update": GPU}),
    ],
)
def test_placements_of_earlier_versions(before: dict[str, Any], expected: dict[str, Any]) -> None:
    found = reprice.placement({"weights": GPU, "boundary": HOST} | before)
    assert found.items() >= expected.items()
    assert (found["weights"], found["boundary"]) == (GPU, HOST)
    assert reprice.placement(found) == found, "of this version: as it is"


def test_launches_of_earlier_versions_get_lanes_and_are_said_once() -> None:
    def launch(kind: str, role: str | None = None, kernels: str = "eager", **lane: str) -> dict[str, Any]:
        return {"kind": kind, "role": role, "kernels": kernels, "duration_ns": 7} | lane

    before = [
        *map(launch, ("load_weights", "fetch_boundary", "fetch_inner", "load_state", "offload_gradient", "offload_state")),
        launch("update_gpu"),
        launch("forward", "layer", "graphed"),
        launch("forward", "embedding", "graphed"),
    ]
    expected = [
        launch("copy", lane="h2d"),
        launch("copy", lane="d2h"),
        launch("update", lane="gpu_update"),
        launch("forward", "layer", "graphed", lane="compute"),
        launch("forward", "embedding", "graphed", lane="compute"),
    ]
    assert reprice.launches(before) == expected
    assert reprice.launches(expected) == expected


def test_a_report_of_an_earlier_version_is_read() -> None:
    entries = reprice.manifest_of(REPORT).entries
    results = {result["name"]: result for result in json.loads((REPORT / "campaign.json").read_bytes())["runs"]}
    assert results.keys() == {entry.name for entry in entries}
    for entry in entries:
        model = find_model(entry.configuration.model)
        entry.policy.check(model, entry.configuration.workload)
        assert sketch(model, entry.policy) == results[entry.name]["sketch"]
    units = [unit for entry in entries for unit in entry.policy.units]
    assert any(unit.passing for unit in units)
    assert {unit.feed_forward for unit in units} == {None, Tier.GPU, Tier.HOST}
    machine, fit_errors = reprice.refitted(json.loads(gzip.decompress((REPORT / "profile.json.gz").read_bytes())))
    assert {(launch.kind, launch.lane) for launch in machine.launches} >= {
        (TaskKind.COPY, LaneKind.H2D), (TaskKind.COPY, LaneKind.D2H), (TaskKind.UPDATE, LaneKind.GPU_UPDATE),
    }  # fmt: skip
    kept = load(REPORT / "refit.json", reprice.Reprice).fit_errors
    assert {what: found[0] for what, found in fit_errors.items()} == pytest.approx(
        {what: each[0] for what, each in kept.items()}
    )
    assert fit_errors["memory"][1] <= 1.01 * kept["memory"][1]
