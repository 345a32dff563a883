"""A profile follows host memory, and nothing else of it moves."""

import msgspec
import pytest

from builders import GB_PER_S, flat_curve, tiny_machine
from slideplan.plan.graph import Lane
from slideplan.plan.machine import Curve, Interference, MachineProfile, RatePoint, Spread
from slideplan.plan.refresh import with_host_rate
from slideplan.plan.sharing import Resource, Sharing


def machine() -> MachineProfile:
    small, headline, large = (
        RatePoint(size=size, rate=Spread(p10=rate // 2, p50=rate, p90=rate * 2))
        for size, rate in ((GB_PER_S // 1000, 10 * GB_PER_S), (GB_PER_S, 30 * GB_PER_S), (2 * GB_PER_S, 32 * GB_PER_S))
    )
    fitted = Sharing(
        capacities={Resource.HOST_DRAM: 40 * GB_PER_S, Resource.PCIE: 16 * GB_PER_S},
        usage={Lane.HOST_UPDATE: {Resource.HOST_DRAM: 1.0}, Lane.H2D: {Resource.HOST_DRAM: 1.0, Resource.PCIE: 1.0}},
    )
    before = tiny_machine(
        interference=Interference(alone={}, together=(), fitted=fitted),
        spreads={"host.dram_bytes_per_s": Spread.exact(40 * GB_PER_S), "link.duplex_bytes_per_s": Spread.exact(16 * GB_PER_S)},
    )
    curve = Curve(points=(small, headline, large))
    return msgspec.structs.replace(before, optimizer=msgspec.structs.replace(before.optimizer, host_by_bytes=curve))


def test_rates_of_updates_and_capacities_follow() -> None:
    before, now = machine(), with_host_rate(machine(), Spread.exact(15 * GB_PER_S), "2026-01-02")
    assert now.optimizer.host_bytes_per_s == Spread.exact(15 * GB_PER_S)
    curve = now.optimizer.host_by_bytes
    assert curve is not None
    # Twice the time for every byte at the profile's size: 33.3 ms more for a GB, at other sizes as much a byte.
    assert [round(point.size / point.rate.p50 * 1e9) for point in curve.points] == [133_333, 66_666_667, 129_166_667]
    assert curve.points[1].rate == Spread(p10=15 * GB_PER_S // 2, p50=15 * GB_PER_S, p90=30 * GB_PER_S)
    assert now.host.dram_bytes_per_s == 20 * GB_PER_S
    assert now.spreads["host.dram_bytes_per_s"] == Spread.exact(20 * GB_PER_S)
    assert now.interference is not None
    assert now.interference.fitted.capacities == {Resource.HOST_DRAM: 20 * GB_PER_S, Resource.PCIE: 16 * GB_PER_S}
    # Two lanes meet in host memory as before, each taking the share of it that its demand is.
    alone = {Lane.HOST_UPDATE: 15e9, Lane.H2D: 5e9}
    assert now.interference.fitted.speeds(alone) == {Lane.HOST_UPDATE: 1.0, Lane.H2D: 1.0}
    assert min(now.interference.fitted.speeds(alone | {Lane.H2D: 10e9}).values()) < 1
    assert (now.link, now.gpu, now.costs, now.efficiency) == (before.link, before.gpu, before.costs, before.efficiency)


def test_the_same_rate_changes_nothing_but_the_note() -> None:
    before = machine()
    now = with_host_rate(before, before.optimizer.host_bytes_per_s, "2026-01-02")
    assert msgspec.structs.replace(now, provenance=before.provenance) == before
    assert now.provenance.notes == "AdamW on the host found at 30.0 GB/s on 2026-01-02"


def test_the_last_refreshment_is_noted_beside_what_else_is() -> None:
    before = machine()
    before = msgspec.structs.replace(before, provenance=msgspec.structs.replace(before.provenance, notes="4x4096 does not fit"))
    once = with_host_rate(before, Spread.exact(15 * GB_PER_S), "monday")
    again = with_host_rate(once, Spread.exact(30 * GB_PER_S), "tuesday")
    assert again.provenance.notes == "4x4096 does not fit; AdamW on the host found at 30.0 GB/s on tuesday"
    assert again.optimizer.host_by_bytes is not None
    rates = [point.rate.p50 for point in again.optimizer.host_by_bytes.points]
    assert rates == pytest.approx([10e9, 30e9, 32e9], rel=1e-6)


def test_a_machine_without_sizes_or_interference() -> None:
    before = tiny_machine()
    now = with_host_rate(before, Spread.exact(60 * GB_PER_S), "today")
    assert (now.optimizer.host_by_bytes, now.interference, now.host.dram_bytes_per_s) == (None, None, 80 * GB_PER_S)
    far = msgspec.structs.replace(before.optimizer, host_by_bytes=flat_curve(300 * GB_PER_S, GB_PER_S))
    # Faster than its own size allows for: no update takes less than a tenth of what it took.
    now = with_host_rate(msgspec.structs.replace(before, optimizer=far), Spread.exact(600 * GB_PER_S), "today")
    assert now.optimizer.host_by_bytes is not None
    assert now.optimizer.host_by_bytes.points[0].rate.p50 == 3000 * GB_PER_S
