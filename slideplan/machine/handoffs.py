"""How long it takes until a lane goes on once another one has finished what it waits for."""

from __future__ import annotations

from collections.abc import Collection

from slideplan.codec import Spec
from slideplan.graph.lanes import HOST_LANES, Lane


class Handoffs(Spec, frozen=True):
    """From the end of a task to the start of one on another lane that waited for it alone. Nanoseconds.

    Device lanes are streams, which wait for each other's events; host lanes are threads, which the system wakes,
    and which then issue what they have.
    """

    device_to_device_ns: int = 0
    device_to_host_ns: int = 0
    host_to_device_ns: int = 0

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if getattr(self, field) < 0:
                raise ValueError(f"handoffs.{field} is {getattr(self, field)}, must be zero or more")

    def between(self, before: Lane, after: Lane) -> int:
        """From one lane to another. Between host lanes: a thread wakes another, as one that feeds a stream."""
        if before == after:
            return 0
        if before.kind in HOST_LANES:
            return self.host_to_device_ns
        return self.device_to_host_ns if after.kind in HOST_LANES else self.device_to_device_ns

    def table(self, lanes: Collection[Lane]) -> dict[Lane, dict[Lane, int]]:
        """The same for all of these lanes: first the lane that goes on, then the one that it waited for."""
        return {after: {before: self.between(before, after) for before in lanes} for after in lanes}


IMMEDIATE = Handoffs()
