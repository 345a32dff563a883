"""Shared bandwidth as a fluid: running flows are slowed together, max-min fair in relative speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simpy import Environment, Event

from slideplan.simulator.resources import Resource

# Work left is counted in 2^-40 ns of a flow's time alone, so that sums over many changes of speed stay
# exact integers. Speeds are rounded up to this grid: ten minutes of work then end within a nanosecond.
FRACTION_BITS = 40
_ONE = 1 << FRACTION_BITS


def fair_speeds(demands: Sequence[Mapping[Resource, int]], capacities: Mapping[Resource, int]) -> list[float]:
    """Speed of each flow in (0, 1], relative to the flow alone, by progressive filling.

    `demands`: bytes/s that each flow takes at full speed; `capacities`: bytes/s of each resource. All
    speeds rise together until a resource is full; its flows keep that speed, the others rise on. So the
    smallest speed is as large as can be, then the next. Flows on one full resource slow by one factor,
    which is what optimizer and copies do on shared DRAM: 158 + 54 GB/s wanted, 127 + 43 measured.
    """
    speeds = [1.0] * len(demands)
    rising = {flow for flow, demand in enumerate(demands) if demand}
    spare = {resource: float(capacities[resource]) for demand in demands for resource in demand}
    while rising:
        load = {resource: sum(demands[flow].get(resource, 0) for flow in rising) for resource in spare}
        # The level at which each resource is full if all rising flows reach it.
        levels = {resource: spare[resource] / load[resource] for resource in spare if load[resource]}
        level = min(levels.values(), default=1.0)
        if level >= 1.0:
            break
        full = {resource for resource, reached in levels.items() if reached == level}
        for flow in sorted(rising):
            if any(demands[flow].get(resource) for resource in full):
                speeds[flow] = level
                rising.remove(flow)
                for resource, rate in demands[flow].items():
                    spare[resource] -= rate * level
    return speeds


class Speeds:
    """Speeds of flows that run together, in units of 2^-FRACTION_BITS, whatever their order.

    `demands` lists all demands that flows may have; a flow names its own by number. A demand beyond
    a capacity counts as that capacity: a flow alone runs at full speed, whatever the profile claims.
    """

    def __init__(self, demands: Sequence[Mapping[Resource, int]], capacities: Mapping[Resource, int]) -> None:
        self._demands = [{r: min(rate, capacities[r]) for r, rate in demand.items()} for demand in demands]
        self._capacities = capacities
        self._known: dict[tuple[int, ...], list[int]] = {}

    def of(self, flows: tuple[int, ...]) -> list[int]:
        """One speed for each flow, given by the number of its demand."""
        speeds = self._known.get(flows)
        if speeds is None:
            # Sorted, so that sums of floats do not depend on who came first; equal demands have equal speeds.
            order = sorted(flows)
            fair = fair_speeds([self._demands[demand] for demand in order], self._capacities)
            speed_of = {demand: -int(-speed * _ONE // 1) for demand, speed in zip(order, fair, strict=True)}
            speeds = self._known[flows] = [speed_of[demand] for demand in flows]
        return speeds


class _Flow:
    """A task in the pool. `left` in units of 2^-40 ns alone, `speed` in units of 2^-40."""

    __slots__ = ("demand", "done", "end_ns", "left", "speed")

    def __init__(self, duration_ns: int, demand: int, done: Event) -> None:
        self.left = duration_ns << FRACTION_BITS
        self.demand = demand
        self.done = done
        self.speed = 0
        self.end_ns = 0


class FluidPool:
    """Flows that share `capacities` (bytes/s) on an environment whose clock counts nanoseconds. `demands` as in `Speeds`."""

    def __init__(self, env: Environment, demands: Sequence[Mapping[Resource, int]], capacities: Mapping[Resource, int]) -> None:
        self._env = env
        self._speeds = Speeds(demands, capacities)
        self._flows: list[_Flow] = []
        self._since = 0  # when progress was last accounted
        self._timer: Event | None = None

    def start(self, duration_ns: int, demand: int) -> Event:
        """Begin a flow of `duration_ns` alone; the event fires at its end, rounded up to a nanosecond."""
        self._account()
        flow = _Flow(duration_ns, demand, self._env.event())
        self._flows.append(flow)
        self._reschedule()
        return flow.done

    def _account(self) -> None:
        now = int(self._env.now)
        elapsed = now - self._since
        if elapsed:
            for flow in self._flows:
                flow.left -= flow.speed * elapsed
            self._since = now

    def _reschedule(self) -> None:
        """Progress is accounted: give every flow its speed and set the timer to the first end; timers set before are void."""
        flows = self._flows
        if not flows:
            self._timer = None
            return
        speeds = self._speeds.of(tuple([flow.demand for flow in flows]))
        now = self._since
        for flow, speed in zip(flows, speeds, strict=True):
            flow.speed = speed
            # Rounding up lets a flow overshoot; slowed in the very instant of its end, it still ends now.
            flow.end_ns = now + max(0, -(-flow.left // speed))
        self._timer = self._env.timeout(min([flow.end_ns for flow in flows]) - now)
        self._timer.callbacks.append(self._finish)

    def _finish(self, timer: Event) -> None:
        if timer is not self._timer:
            return
        self._account()
        now = self._since
        ended = [flow for flow in self._flows if flow.end_ns <= now]
        self._flows = [flow for flow in self._flows if flow.end_ns > now]
        self._reschedule()
        for flow in ended:
            flow.done.succeed()
