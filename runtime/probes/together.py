"""Probes of lanes that run at the same time, and the fit of the fluid model to them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from runtime.lanes.backend import Backend
from runtime.probes.timing import ROUNDS, Work, spread, together
from slideplan.graph.lanes import LaneKind
from slideplan.machine.fitting import interference
from slideplan.machine.profile import Interference, Spread

# What meets in schedules: copies and updates in host memory, all of them beside compute, the disk beside itself,
# the optimizer and copies.
COMBINATIONS: tuple[tuple[LaneKind, ...], ...] = (
    (LaneKind.H2D, LaneKind.D2H),
    (LaneKind.HOST_UPDATE, LaneKind.H2D),
    (LaneKind.HOST_UPDATE, LaneKind.D2H),
    (LaneKind.HOST_UPDATE, LaneKind.H2D, LaneKind.D2H),
    (LaneKind.COMPUTE, LaneKind.H2D),
    (LaneKind.COMPUTE, LaneKind.D2H),
    (LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H),
    (LaneKind.COMPUTE, LaneKind.HOST_UPDATE),
    (LaneKind.COMPUTE, LaneKind.GPU_UPDATE),
    (LaneKind.SSD_READ, LaneKind.SSD_WRITE),
    (LaneKind.HOST_UPDATE, LaneKind.SSD_READ),
    (LaneKind.HOST_UPDATE, LaneKind.SSD_WRITE),
    (LaneKind.HOST_UPDATE, LaneKind.SSD_READ, LaneKind.SSD_WRITE),
    (LaneKind.H2D, LaneKind.D2H, LaneKind.SSD_READ, LaneKind.SSD_WRITE),
)

Rates = dict[LaneKind, Spread]


class TogetherProbe:
    """Lanes alone and together, as far as they were measured."""

    def __init__(self) -> None:
        self._measured: dict[tuple[LaneKind, ...], dict[LaneKind, list[float]]] = {}

    @staticmethod
    def runs(lanes: Collection[LaneKind]) -> list[tuple[LaneKind, ...]]:
        """What is measured where these lanes can be: each alone, then combinations of them; all of it in rounds."""
        once = [*((lane,) for lane in lanes), *(each for each in COMBINATIONS if set(each) <= set(lanes))]
        return once * ROUNDS

    def measure(self, backend: Backend, work: dict[LaneKind, Work], together_ns: int) -> Iterator[str]:
        """Measure; yields what comes next, for progress."""
        for lanes in self.runs(work):
            yield " with ".join(lanes)
            found = together(backend, {lane: work[lane] for lane in lanes}, together_ns)
            pooled = self._measured.setdefault(lanes, {lane: [] for lane in lanes})
            for lane, rates in found.items():
                pooled[lane] += rates

    @property
    def alone(self) -> Rates:
        """Each lane by itself."""
        return {lane: spread(rates[lane]) for (lane, *others), rates in self._measured.items() if not others}

    @property
    def combined(self) -> dict[tuple[LaneKind, ...], Rates]:
        """Lanes together."""
        return {
            lanes: {lane: spread(rates) for lane, rates in found.items()}
            for lanes, found in self._measured.items()
            if len(lanes) > 1
        }

    def total(self, *lanes: LaneKind) -> Spread | None:
        """Bytes/s of these lanes added up while they ran together; None where they did not."""
        rates = self.combined.get(lanes)
        if rates is None:
            return None
        return Spread(*(sum(getattr(rate, field) for rate in rates.values()) for field in ("p10", "p50", "p90")))

    def interference(self, gpu_bytes_per_s: int) -> Interference:
        """What was measured, with the model fitted to it and its residuals."""
        return interference(self.alone, [*self.combined.values()], gpu_bytes_per_s)
