"""Costs of sizes that nobody measured, from those that somebody did."""

from __future__ import annotations

import pytest

from builders import GB_PER_S, flat_curve, tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import price
from slideplan.footprint import Footprint
from slideplan.graph.operations import LOAD_WEIGHTS, TaskKind
from slideplan.lowering.lower import lower
from slideplan.machine.profile import ComputeCost, Curve, Efficiency, LayerShape, LinkProfile, MachineProfile, RatePoint, Spread
from slideplan.model import UnitRole

MODEL = tiny_model()


def machine(first_ns: int, second_ns: int) -> MachineProfile:
    """A layer's forward measured at 64 and 128 tokens; attention takes no time."""
    return tiny_machine(
        efficiency=Efficiency(gemm=flat_curve(10**12), attention_flops_per_s=10**18, elementwise_bytes_per_s=10**12),
        costs=tuple(
            ComputeCost(
                shape=LayerShape.of(MODEL, UnitRole.LAYER), kind=TaskKind.FORWARD, micro_batch=micro, seq_len=32,
                duration_ns=Spread.exact(ns), saved_bytes=0, workspace_bytes=0,
            )
            for micro, ns in ((2, first_ns), (4, second_ns))
        ),
    )  # fmt: skip


def forward_ns(at: MachineProfile, micro_batch: int) -> int:
    policy = tiny_policy(MODEL, micro_batch=micro_batch, micro_batches=1)
    graph = lower(MODEL, policy, tiny_workload(global_batch=micro_batch), Footprint(1, 1))
    costs = price(graph, MODEL, policy, 32, at)
    (found,) = {c.duration_ns for t, c in zip(graph.tasks, costs, strict=True) if t.kind is TaskKind.FORWARD and t.unit}
    return found


@pytest.mark.parametrize(
    ("measured", "micro_batch", "expected"),
    [
        ((1000, 1600), 3, 1300),  # between both: on the line
        ((1000, 1600), 1, 700),  # beyond: on the line, where that lies between no and full growth with tokens
        ((1000, 1600), 8, 2800),
        ((1000, 5000), 1, 500),  # a line too steep: in proportion to the nearer one's time
        ((1000, 5000), 8, 10_000),
        ((5000, 1000), 1, 5000),  # one that falls: the nearer one's time
        ((5000, 1000), 8, 1000),
    ],
)
def test_a_line_beyond_measurements_stays_between_none_and_full_growth(
    measured: tuple[int, int], micro_batch: int, expected: int
) -> None:
    assert forward_ns(machine(*measured), micro_batch) == expected


def test_a_copy_is_as_uncertain_as_the_measurement_of_the_nearest_size() -> None:
    rates = [Spread(p10=9 * GB_PER_S, p50=10 * GB_PER_S, p90=11 * GB_PER_S), Spread.exact(10 * GB_PER_S)]
    policy = tiny_policy(MODEL)
    graph = lower(MODEL, policy, tiny_workload(), Footprint(1, 1))
    loads = [number for number, task in enumerate(graph.tasks) if task.operation == LOAD_WEIGHTS]
    size = graph.tasks[loads[1]].bytes_moved
    assert {graph.tasks[number].bytes_moved for number in loads[1:3]} == {size}
    for near, far, expected in ((rates[0], rates[1], 1 + 10.0), (rates[1], rates[0], 1.0)):
        for points in (((size - 10, near), (size + 1000, far)), ((size - 1000, far), (size + 10, near))):
            curve = Curve(points=tuple(RatePoint(size=at, rate=rate) for at, rate in points))
            at = tiny_machine(link=LinkProfile(h2d=curve, d2h=curve, duplex_bytes_per_s=16 * GB_PER_S))
            assert price(graph, MODEL, policy, 32, at)[loads[1]].uncertainty_percent == pytest.approx(expected)
