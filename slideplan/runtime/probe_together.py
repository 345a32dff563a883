"""Probes of lanes that run at the same time, and the fit of the fluid model to them."""

from __future__ import annotations

from collections.abc import Iterator

from slideplan.plan.fitting import fit
from slideplan.plan.graph import Lane
from slideplan.plan.machine import Interference, LaneSpeed, Spread
from slideplan.runtime.backend import Backend
from slideplan.runtime.probing import Work, together

# What meets in schedules: copies and updates in host memory, all of them beside compute, the disk beside itself
# and the optimizer.
COMBINATIONS: tuple[tuple[Lane, ...], ...] = (
    (Lane.H2D, Lane.D2H),
    (Lane.HOST_UPDATE, Lane.H2D),
    (Lane.HOST_UPDATE, Lane.D2H),
    (Lane.HOST_UPDATE, Lane.H2D, Lane.D2H),
    (Lane.COMPUTE, Lane.H2D),
    (Lane.COMPUTE, Lane.D2H),
    (Lane.COMPUTE, Lane.H2D, Lane.D2H),
    (Lane.COMPUTE, Lane.HOST_UPDATE),
    (Lane.COMPUTE, Lane.GPU_UPDATE),
    (Lane.SSD_READ, Lane.SSD_WRITE),
    (Lane.HOST_UPDATE, Lane.SSD_READ),
    (Lane.HOST_UPDATE, Lane.SSD_WRITE),
)

Rates = dict[Lane, Spread]


class TogetherProbe:
    """Lanes alone and together, as far as they were measured."""

    def __init__(self) -> None:
        self.alone: Rates = {}
        self.combined: dict[tuple[Lane, ...], Rates] = {}

    def measure(self, backend: Backend, work: dict[Lane, Work], window_ns: int) -> Iterator[str]:
        """Run each lane alone, then every combination of these; yields what comes next, for progress."""
        for lane, alone in work.items():
            yield str(lane)
            self.alone |= together(backend, {lane: alone}, window_ns)
        for lanes in COMBINATIONS:
            if set(lanes) <= set(work):
                yield " with ".join(lanes)
                self.combined[lanes] = together(backend, {lane: work[lane] for lane in lanes}, window_ns)

    def total(self, *lanes: Lane) -> Spread | None:
        """Bytes/s of these lanes added up while they ran together; None where they did not."""
        rates = self.combined.get(lanes)
        if rates is None:
            return None
        return Spread(*(sum(getattr(rate, field) for rate in rates.values()) for field in ("p10", "p50", "p90")))

    def interference(self, gpu_bytes_per_s: int) -> Interference:
        """What was measured, with the model fitted to it and its residuals."""
        speeds = [
            # A lane that stood still is told from one that was not measured, and has a logarithm.
            {lane: max(1e-3, rate.p50 / self.alone[lane].p50) for lane, rate in rates.items()}
            for rates in self.combined.values()
        ]
        alone = {lane: float(rate.p50) for lane, rate in self.alone.items()}
        # No lane gains by company: what is above 1 is noise in the rate alone.
        fitted = fit(alone, [{lane: min(1.0, speed) for lane, speed in each.items()} for each in speeds], gpu_bytes_per_s)
        demands = alone | {Lane.COMPUTE: float(gpu_bytes_per_s)}
        combinations = []
        for measured, rates in zip(speeds, self.combined.values(), strict=True):
            predicted = fitted.speeds({lane: demands[lane] for lane in measured})
            combinations.append(
                tuple(
                    LaneSpeed(lane=lane, rate=rates[lane], speed=round(measured[lane], 4), predicted=round(predicted[lane], 4))
                    for lane in measured
                )
            )
        return Interference(alone=self.alone, together=tuple(combinations), fitted=fitted)
