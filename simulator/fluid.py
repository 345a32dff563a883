"""Shared bandwidth as a fluid: running flows are slowed together, by their shares (see `slideplan.machine.sharing`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from simpy import Environment, Event

from slideplan.machine.sharing import Demand, Resource, Shares, fair_speeds, within

# Work left is counted in 2^-40 ns of a flow's time alone, so that sums over many changes of speed stay
# exact integers. Speeds are rounded up to this grid: ten minutes of work then end within a nanosecond.
FRACTION_BITS = 40
_ONE = 1 << FRACTION_BITS


class Draw(NamedTuple):
    """What a flow takes at full speed, in bytes/s of each resource, and its shares there."""

    demand: Demand
    shares: Shares


class Speeds:
    """Speeds of flows that run together, in units of 2^-FRACTION_BITS, whatever their order.

    `draws` lists all that flows may draw; a flow names its own by number. A demand beyond a capacity
    counts as that capacity: a flow alone runs at full speed, whatever the profile claims.
    """

    def __init__(self, draws: Sequence[Draw], capacities: Mapping[Resource, int]) -> None:
        self._draws = [Draw(within(draw.demand, capacities), draw.shares) for draw in draws]
        self._capacities = capacities
        self._known: dict[tuple[int, ...], list[int]] = {}

    def of(self, flows: tuple[int, ...]) -> list[int]:
        """One speed for each flow, given by the number of its draw."""
        speeds = self._known.get(flows)
        if speeds is None:
            # Sorted, so that sums of floats do not depend on who came first; equal draws have equal speeds.
            order = sorted(flows)
            draws = [self._draws[draw] for draw in order]
            fair = fair_speeds([draw.demand for draw in draws], self._capacities, [draw.shares for draw in draws])
            speed_of = {draw: -int(-speed * _ONE // 1) for draw, speed in zip(order, fair, strict=True)}
            speeds = self._known[flows] = [speed_of[draw] for draw in flows]
        return speeds


class _Flow:
    """A task in the pool. `left` in units of 2^-40 ns alone, `speed` in units of 2^-40."""

    __slots__ = ("done", "draw", "end_ns", "left", "speed")

    def __init__(self, duration_ns: int, draw: int, done: Event) -> None:
        self.left = duration_ns << FRACTION_BITS
        self.draw = draw
        self.done = done
        self.speed = 0
        self.end_ns = 0


class FluidPool:
    """Flows that share `capacities` (bytes/s) on an environment whose clock counts nanoseconds. `draws` as in `Speeds`."""

    def __init__(self, env: Environment, draws: Sequence[Draw], capacities: Mapping[Resource, int]) -> None:
        self._env = env
        self._speeds = Speeds(draws, capacities)
        self._flows: list[_Flow] = []
        self._since = 0  # when progress was last accounted
        self._timer: Event | None = None

    def start(self, duration_ns: int, draw: int) -> Event:
        """Begin a flow of `duration_ns` alone; the event fires at its end, rounded up to a nanosecond."""
        self._account()
        flow = _Flow(duration_ns, draw, self._env.event())
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
        speeds = self._speeds.of(tuple([flow.draw for flow in flows]))
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
