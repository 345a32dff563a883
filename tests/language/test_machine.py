from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import flat_curve, tiny_machine, tiny_model
from slideplan.machine.profile import Curve, LayerShape, RatePoint, Spread, ThreadPoint
from slideplan.model import UnitRole
from slideplan.plan import MachineReference


def curve(*points: tuple[int, int]) -> Curve:
    return Curve(points=tuple(RatePoint(size=size, rate=Spread.exact(rate)) for size, rate in points))


def test_time_is_linear_between_points_with_latency_below_and_rate_above():
    found = curve((100, 10**9), (300, 2 * 10**9))  # 100 ns and 150 ns
    assert [found.duration_ns(size) for size in (1, 100, 200, 300, 600)] == [100, 100, 125, 150, 300]


def test_durations_round_up():
    assert flat_curve(3 * 10**9).duration_ns(10) == 4


@given(st.lists(st.tuples(st.integers(1, 10**9), st.integers(1, 10**4)), min_size=2, max_size=5, unique_by=lambda p: p[0]))
def test_curve_passes_through_its_points(pairs: list[tuple[int, int]]):
    found = curve(*sorted(pairs))
    for point in found.points:
        assert found.duration_ns(point.size) == -(-point.size * 10**9 // point.rate.p50)


@pytest.mark.parametrize("points", [(), ((2, 1), (1, 1)), ((1, 1), (1, 2)), ((0, 1),)])
def test_curves_need_ascending_positive_sizes(points: tuple):
    with pytest.raises(ValueError, match="positive, ascending sizes"):
        curve(*points)


def test_curves_need_positive_rates():
    with pytest.raises(ValueError, match="positive rates"):
        curve((1, 0))


def test_shapes_ignore_what_does_not_touch_their_cost():
    model = tiny_model()
    deeper = tiny_model(name="other", layers=9, vocabulary=1000, tied_embeddings=True)
    assert LayerShape.of(model, UnitRole.LAYER) == LayerShape.of(deeper, UnitRole.LAYER)
    assert LayerShape.of(model, UnitRole.LAYER) != LayerShape.of(tiny_model(ffn=256), UnitRole.LAYER)
    assert LayerShape.of(model, UnitRole.EMBEDDING) == LayerShape.of(tiny_model(tied_embeddings=True), UnitRole.EMBEDDING)
    assert LayerShape.of(model, UnitRole.HEAD) != LayerShape.of(tiny_model(tied_embeddings=True), UnitRole.HEAD)


def test_identity_tells_in_what_machines_differ():
    mine = tiny_machine().identity()
    assert mine.differences(mine) == []
    other = msgspec.structs.replace(mine, gpu="other gpu", cores=8)
    assert mine.differences(other) == ["gpu: test gpu, other gpu", "cores: 4, 8"]


@pytest.mark.parametrize("percentiles", [(-1, 2, 3), (3, 2, 4), (1, 5, 4)])
def test_percentiles_must_ascend_from_zero(percentiles: tuple[int, int, int]):
    with pytest.raises(ValueError, match="must be zero or more and ascend"):
        Spread(*percentiles)


def test_plans_name_the_threads_of_the_profile():
    machine = tiny_machine()
    optimizer = msgspec.structs.replace(machine.optimizer, threads=3)
    machine = msgspec.structs.replace(machine, host=msgspec.structs.replace(machine.host, cores=4), optimizer=optimizer)
    assert MachineReference.of(machine).optimizer_threads == 3


@pytest.mark.parametrize(
    ("threads", "message"), [(0, "optimizer.threads is 0, must be positive"), (5, "is 5, must be at most")]
)
def test_the_optimizer_has_as_many_threads_as_there_are_cores_at_most(threads: int, message: str):
    machine = tiny_machine()
    with pytest.raises(ValueError, match=message):
        msgspec.structs.replace(
            machine,
            host=msgspec.structs.replace(machine.host, cores=4),
            optimizer=msgspec.structs.replace(machine.optimizer, threads=threads),
        )


def test_no_threads_have_no_rate():
    with pytest.raises(ValueError, match=r"by_threads: threads is 0\b"):
        ThreadPoint(threads=0, host_bytes_per_s=Spread.exact(1))
