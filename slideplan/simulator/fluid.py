"""Shared bandwidth as a fluid: running flows are slowed together, max-min fair in relative speed by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from simpy import Environment, Event

from slideplan.plan.sharing import Demand, Resource, fair_speeds, within

# Work left is counted in 2^-40 ns of a flow's time alone, so that sums over many changes of speed stay
# exact integers. Speeds are rounded up to this grid: ten minutes of work then end within a nanosecond.
_FRACTION_BITS = 40
_ONE = 1 << _FRACTION_BITS


class Draw(NamedTuple):
    """What a flow takes at full speed, in bytes/s of each resource, and its share weight."""

    demand: Demand
    weight: float


class _Flow:
    """A task in the pool.

    `left` in units of 2^-40 ns alone, as of `since`; `speed` in units of 2^-40. Both stand until the
    speed changes, and so does `end_ns`.
    """

    __slots__ = ("done", "draw", "end_ns", "left", "since", "speed")

    def __init__(self, duration_ns: int, draw: int, now: int, done: Event) -> None:
        self.left = duration_ns << _FRACTION_BITS
        self.draw = draw
        self.since = now
        self.speed = 0
        self.end_ns = 0
        self.done = done

    def run_at(self, speed: int, now: int) -> None:
        """Go on from now at this speed."""
        self.left -= self.speed * (now - self.since)
        self.since = now
        self.speed = speed
        # Rounding up lets a flow overshoot; slowed in the very instant of its end, it still ends now.
        self.end_ns = now + max(0, -(-self.left // speed))


class FluidPool:
    """Flows that share `capacities` (bytes/s) on an environment whose clock counts nanoseconds.

    `draws` lists all that flows may draw; a flow names its own by number. A demand beyond a capacity
    counts as that capacity: a flow alone runs at full speed, whatever the profile claims.
    """

    def __init__(self, env: Environment, draws: Sequence[Draw], capacities: Mapping[Resource, int]) -> None:
        self._env = env
        self._capacities = capacities
        self._draws = [Draw(within(draw.demand, capacities), draw.weight) for draw in draws]
        self._flows: list[_Flow] = []
        self._timer: Event | None = None
        self._timer_ns = 0  # when it fires
        self._speeds: dict[tuple[int, ...], list[int]] = {}

    def start(self, duration_ns: int, draw: int) -> Event:
        """Begin a flow of `duration_ns` alone; the event fires at its end, rounded up to a nanosecond."""
        flow = _Flow(duration_ns, draw, int(self._env.now), self._env.event())
        self._flows.append(flow)
        self._reschedule()
        return flow.done

    def _reschedule(self) -> None:
        """Give every flow its speed and see that the timer is set to the first end; one set to another time is void."""
        flows = self._flows
        if not flows:
            return
        key = tuple([flow.draw for flow in flows])
        speeds = self._speeds.get(key)
        if speeds is None:
            demands, weights = zip(*(self._draws[draw] for draw in key), strict=True)
            fair = fair_speeds(demands, self._capacities, weights)
            speeds = self._speeds[key] = [-int(-speed * _ONE // 1) for speed in fair]
        now = int(self._env.now)
        for flow, speed in zip(flows, speeds, strict=True):
            if speed != flow.speed:
                flow.run_at(speed, now)
        end_ns = min([flow.end_ns for flow in flows])
        if self._timer is None or end_ns != self._timer_ns:
            self._timer = self._env.timeout(end_ns - now)
            self._timer.callbacks.append(self._finish)
            self._timer_ns = end_ns

    def _finish(self, timer: Event) -> None:
        if timer is not self._timer:
            return
        self._timer = None
        now = int(self._env.now)
        ended = [flow for flow in self._flows if flow.end_ns <= now]
        self._flows = [flow for flow in self._flows if flow.end_ns > now]
        self._reschedule()
        for flow in ended:
            flow.done.succeed()
