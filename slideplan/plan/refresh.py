"""A profile whose host memory is as fast as it was found just now.

Of all that a profile holds this lasts least: what else a machine does takes its share of memory bandwidth, and on
a shared one that is other people's work, from minute to minute.
"""

from __future__ import annotations

import msgspec

from slideplan.plan.machine import Curve, MachineProfile, RatePoint, Spread
from slideplan.plan.sharing import Resource

_NOTE = "AdamW on the host found at"


def with_host_rate(machine: MachineProfile, now: Spread, date: str) -> MachineProfile:
    """The profile with this rate of AdamW on the host, bytes/s of updates as large as `optimizer.host_bytes_per_s`'s.

    An update of another size takes as much more or less time for each of its bytes; capacities of host memory go with
    the rate. What was measured of lanes together and over threads stays as it was measured.
    """
    optimizer, host = machine.optimizer, machine.host
    before = optimizer.host_bytes_per_s
    share = now.p50 / before.p50
    per_byte_s = 1 / now.p50 - 1 / before.p50

    def moved(point: RatePoint) -> RatePoint:
        seconds = point.size / point.rate.p50
        faster = seconds / max(seconds + point.size * per_byte_s, 0.1 * seconds)
        return RatePoint(size=point.size, rate=_scaled(point.rate, faster))

    sizes = optimizer.host_by_bytes
    changed = {
        "optimizer": msgspec.structs.replace(
            optimizer,
            host_bytes_per_s=now,
            host_by_bytes=None if sizes is None else Curve(points=tuple(map(moved, sizes.points))),
        ),
        "host": msgspec.structs.replace(host, dram_bytes_per_s=max(now.p50, round(host.dram_bytes_per_s * share))),
        "spreads": {
            name: _scaled(spread, share) if name == "host.dram_bytes_per_s" else spread
            for name, spread in machine.spreads.items()
        },
        "provenance": msgspec.structs.replace(
            machine.provenance, notes="; ".join([*_lasting(machine), f"{_NOTE} {now.p50 / 1e9:.1f} GB/s on {date}"])
        ),
    }
    met = machine.interference
    if met is not None and Resource.HOST_DRAM in met.fitted.capacities:
        capacities = met.fitted.capacities
        capacities = capacities | {Resource.HOST_DRAM: max(1, round(capacities[Resource.HOST_DRAM] * share))}
        fitted = msgspec.structs.replace(met.fitted, capacities=capacities)
        changed["interference"] = msgspec.structs.replace(met, fitted=fitted)
    return msgspec.structs.replace(machine, **changed)


def _scaled(rate: Spread, by: float) -> Spread:
    return Spread(p10=max(1, round(rate.p10 * by)), p50=max(1, round(rate.p50 * by)), p90=max(1, round(rate.p90 * by)))


def _lasting(machine: MachineProfile) -> list[str]:
    """Notes of the profile but those of earlier refreshments."""
    return [note for note in machine.provenance.notes.split("; ") if note and not note.startswith(_NOTE)]
