"""Measurements of a kind of task: of other ways of writing gradients, of the nearest size, of two sizes for a line."""

from __future__ import annotations

import msgspec
import pytest

from builders import tiny_machine, tiny_model
from simulator.measured import measurements, nearest, neighbours
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import ComputeCost, LayerShape, Spread
from slideplan.model import UnitRole
from slideplan.policy import ComputeKnobs

MODEL = tiny_model()
BYTE_NS = 10**9  # bytes/s at which a byte takes a nanosecond
ELEMENTS = 36_992  # of a layer's gradient
Way = tuple[str, bool]  # data type of gradients, and whether they are added to a sum
WAYS: tuple[Way, ...] = (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True))
TRAFFIC = {("bf16", False): 2, ("bf16", True): 4, ("fp32", False): 4, ("fp32", True): 8}  # bytes an element


def cost(way: Way = WAYS[0], ns: int = 10**6, micro_batch: int = 1, seq_len: int = 32) -> ComputeCost:
    return ComputeCost(
        shape=LayerShape.of(MODEL, UnitRole.LAYER), kind=TaskKind.BACKWARD, micro_batch=micro_batch, seq_len=seq_len,
        duration_ns=Spread(p10=ns - 10, p50=ns, p90=ns + 20), saved_bytes=0, workspace_bytes=0,
        gradient_dtype=way[0], accumulate=way[1],  # type: ignore[arg-type]
    )  # fmt: skip


def found(wanted: Way, *measured: ComputeCost) -> tuple[list[Spread], bool]:
    machine = tiny_machine(costs=measured)
    machine = msgspec.structs.replace(
        machine, efficiency=msgspec.structs.replace(machine.efficiency, elementwise_bytes_per_s=BYTE_NS)
    )
    knobs = ComputeKnobs(1, 2, wanted[0], "eager", False, "exact")  # type: ignore[arg-type]
    costs, converted = measurements(MODEL, UnitRole.LAYER, TaskKind.BACKWARD, knobs, wanted[1], machine)
    return [each.duration_ns for each in costs], converted


@pytest.mark.parametrize("wanted", WAYS)
@pytest.mark.parametrize("measured", WAYS)
def test_another_way_takes_longer_by_the_traffic_that_it_has_more(wanted: Way, measured: Way) -> None:
    more_ns = (TRAFFIC[wanted] - TRAFFIC[measured]) * ELEMENTS
    spread = Spread(p10=10**6 - 10 + more_ns, p50=10**6 + more_ns, p90=10**6 + 20 + more_ns)
    assert found(wanted, cost(measured)) == ([spread], wanted != measured)


def test_what_is_most_often_measured_stands_for_what_is_not() -> None:
    for place, wanted in enumerate(WAYS):
        others = [way for way in WAYS if way != wanted]
        times = {way: 10**6 * (number + 1) for number, way in enumerate(others)}
        # Whatever the order in the profile: bf16 before fp32, written before added.
        durations, converted = found(wanted, *(cost(way, times[way]) for way in reversed(others)))
        assert converted
        assert durations[0].p50 == 10**6 + (TRAFFIC[wanted] - TRAFFIC[others[0]]) * ELEMENTS, place


def test_a_quarter_of_the_time_is_left_at_least() -> None:
    durations, _ = found(("bf16", False), cost(("fp32", True), 40_000))
    assert durations == [Spread(p10=39_990 // 4, p50=10_000, p90=40_020 // 4)]
    assert found(("bf16", False), cost(("fp32", True), 20))[0][0].p10 == 2


def test_nothing_measured_is_nothing_found() -> None:
    assert found(WAYS[0]) == ([], False)


SIZES = [cost(micro_batch=micro, seq_len=seq) for micro, seq in ((1, 64), (2, 32), (4, 32), (8, 32), (8, 64))]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1, 64), (1, 64)), ((2, 32), (2, 32)), ((3, 32), (4, 32)), ((100, 32), (8, 32)), ((1, 128), (1, 64))],
)
def test_the_nearest_size_counts_tokens_and_the_length_of_sequences(size: tuple[int, int], expected: tuple[int, int]) -> None:
    taken = nearest(SIZES, *size)
    assert taken is not None
    assert (taken.micro_batch, taken.seq_len) == expected
    assert nearest([], *size) is None


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((3, 32), [(2, 32), (4, 32)]),  # around 96 tokens
        ((4, 32), [(4, 32), (8, 32)]),  # an equal size is the lower one of the two
        ((1, 32), [(2, 32), (4, 32)]),  # below all
        ((32, 32), [(8, 32), (8, 64)]),  # above all
        ((1, 96), [(1, 64), (4, 32)]),  # of 64 tokens there are two: the one of a length nearer to 96
    ],
)
def test_a_line_goes_through_the_sizes_around(size: tuple[int, int], expected: list[tuple[int, int]]) -> None:
    pair = neighbours(SIZES, *size)
    assert pair is not None
    assert [(each.micro_batch, each.seq_len) for each in pair] == expected
    assert neighbours(SIZES[:2], *size) is None  # both of 64 tokens
