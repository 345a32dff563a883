"""Handlers that poison a slot as soon as its last reader has run: whoever reads it later shows."""

from __future__ import annotations

from runtime.lanes.executor import Handler
from runtime.memory.buffers import Buffers
from slideplan.graph.tasks import TENSOR_OF, Access, Role, Task, TaskGraph
from slideplan.lowering.pools import passage_pool, transit_pool
from slideplan.placement import Tier

POISON, POISON_INTEGER = float("nan"), 0x5555


class Poisoned:
    """Wraps a handler; not thread-safe, for runs in one thread or under a lock."""

    def __init__(self, handler: Handler, graph: TaskGraph, buffers: Buffers) -> None:
        self._handler = handler
        self._buffers = buffers
        self._readers = _readers_of_writes(graph)
        self._left: dict[tuple[str, int], int] = {}

    def run(self, task: Task, step: int) -> None:
        self._handler(task, step)
        for access in task.accesses:
            slot = access.pool, access.slot
            if _is_home_of_state(access):
                continue  # state lives as long as the run, also where copies take it away and bring it back
            if access.mode == "w":
                self._left[slot] = self._readers[task.name, slot]
            elif slot in self._left:
                self._left[slot] -= 1
                if self._left[slot] == 0 and access.pool in self._buffers.slots:
                    dead = self._buffers[slot]
                    dead.fill_(POISON if dead.dtype.is_floating_point else POISON_INTEGER)


def _is_home_of_state(access: Access) -> bool:
    """Where state lies between steps, also if copies take it away and bring it back. It lives as long as the run.

    So do weights that lie on the SSD.
    """
    if access.role is Role.WEIGHTS:
        return access.tier is Tier.SSD
    if access.role not in (Role.REMAINDER, Role.MOMENTS) or access.tier is Tier.GPU:
        return False
    tensor = TENSOR_OF[access.role]
    return access.pool not in (passage_pool(tensor, Tier.HOST), transit_pool(tensor))


def _readers_of_writes(graph: TaskGraph) -> dict[tuple[str, tuple[str, int]], int]:
    """For each overwriting access, how many accesses build on it or read it before the next overwrites."""
    accesses: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for task in graph.tasks:
        for access in (access for access in task.accesses if not _is_home_of_state(access)):
            accesses.setdefault((access.pool, access.slot), []).append((access.mode, task.name))
    counts: dict[tuple[str, tuple[str, int]], int] = {}
    for slot, uses in accesses.items():
        writes = [place for place, (mode, _) in enumerate(uses) if mode == "w"]
        if not writes:
            continue  # weights and optimizer state live as long as the run
        for place, following in zip(writes, [*writes[1:], len(uses)], strict=True):
            # A slot that is first read and then written in a step would carry its value into the next.
            assert writes[0] == 0, "transient slots are written first"
            counts[uses[place][1], slot] = following - place - 1
    return counts
