"""Runs a task graph on labels instead of numbers: every task must find in its slots what it is meant to read.

Knows the meaning of each task kind and nothing of how slots and edges were derived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from slideplan.graph.tasks import Lane, Role, Task, TaskGraph, TaskKind
from slideplan.model import ModelSpec

HOST_STATE = {Role.HOST_REMAINDER: Role.REMAINDER, Role.HOST_MOMENTS: Role.MOMENTS}
Choose = Callable[[list[Lane]], Lane]


class Contents:
    """What each slot holds, as a label."""

    def __init__(self, model: ModelSpec, micro_batches: int, graph: TaskGraph) -> None:
        self.model = model
        self.micros = range(micro_batches)
        self.slots: dict[tuple[str, int], Any] = {}
        self.chunks = 1 + max((task.chunk for task in graph.tasks if task.chunk is not UNSET), default=0)
        self.clips = any(task.kind is TaskKind.CLIP_GRADIENT for task in graph.tasks)
        for task in graph.tasks:
            if task.kind in (TaskKind.UPDATE_HOST, TaskKind.UPDATE_GPU):
                for role in self._state(task):
                    self.slots[task.slot(role)] = (role, task.unit, 0)
                self.slots[task.slot(self._master(task))] = ("weights", task.unit, 0)
            elif task.kind is TaskKind.LOAD_STATE:
                for on_host, role in HOST_STATE.items():
                    self.slots[task.slot(on_host)] = (role, task.unit, task.chunk, 0)
            elif task.kind is TaskKind.UPDATE_PASSING:
                self.slots[task.slot(Role.WEIGHTS)] = ("weights", task.unit, 0)
            elif task.kind is TaskKind.REFRESH_WEIGHTS:
                self.slots[task.slot(Role.HOST_WEIGHTS)] = ("weights", task.unit, 0)
            if task.has(Role.BARRIER):
                self.slots[task.slot(Role.BARRIER)] = ("updated", 0)

    @staticmethod
    def _master(task: Task) -> Role:
        if task.has(Role.MASTER):
            return Role.MASTER
        return Role.HOST_WEIGHTS if task.kind is TaskKind.UPDATE_HOST else Role.WEIGHTS

    @staticmethod
    def _state(task: Task) -> list[Role]:
        return [role for role in (Role.REMAINDER, Role.MOMENTS) if task.has(role)]

    def _find(self, task: Task, role: Role, label: Any) -> None:
        found = self.slots.get(task.slot(role))
        assert found == label, f"{task.name} finds {found} as {role}, needs {label}"

    def _put(self, task: Task, role: Role, label: Any) -> None:
        self.slots[task.slot(role)] = label

    def _add(self, task: Task, role: Role, step: int) -> None:
        access = next(access for access in task.accesses if access.role is role)
        before: frozenset[Any] = frozenset() if access.mode == "w" else self.slots[access.pool, access.slot]
        self._put(task, role, before | {(task.unit, task.micro, step)})

    def _whole_gradient(self, unit: int, step: int) -> frozenset[Any]:
        tied = unit == 0 and self.model.tied_embeddings
        sources = (unit, self.model.head_unit) if tied else (unit,)
        return frozenset((source, micro, step) for source in sources for micro in self.micros)

    def run(self, task: Task, step: int) -> None:
        unit, micro = task.unit, task.micro
        if task.has(Role.BARRIER):
            if task.kind in (TaskKind.CAST_WEIGHTS, TaskKind.LOAD_WEIGHTS):
                self._find(task, Role.BARRIER, ("updated", step))
            else:
                self._put(task, Role.BARRIER, ("updated", step + 1))
        if task.kind in (TaskKind.CAST_WEIGHTS, TaskKind.REFRESH_WEIGHTS):
            version = step + (task.kind is TaskKind.REFRESH_WEIGHTS)
            self._find(task, Role.MASTER, ("weights", unit, version))
            self._put(task, Role.HOST_WEIGHTS, ("weights", unit, version))
        elif task.kind is TaskKind.CLIP_GRADIENT:
            self._find(task, Role.HOST_GRADIENT, self._whole_gradient(unit, step))
            self._put(task, Role.HOST_GRADIENT, ("clipped", self._whole_gradient(unit, step)))
        elif task.kind is TaskKind.LOAD_WEIGHTS:
            self._find(task, Role.HOST_WEIGHTS, ("weights", unit, step))
            self._put(task, Role.WEIGHTS, ("weights", unit, step))
        elif task.kind is TaskKind.OFFLOAD_BOUNDARY:
            self._find(task, Role.INPUT, ("boundary", unit, micro, step))
            self._put(task, Role.HOST_BOUNDARY, ("boundary", unit, micro, step))
        elif task.kind is TaskKind.FETCH_BOUNDARY:
            self._find(task, Role.HOST_BOUNDARY, ("boundary", unit, micro, step))
            self._put(task, Role.INPUT, ("boundary", unit, micro, step))
        elif task.kind is TaskKind.OFFLOAD_INNER:
            self._find(task, Role.FEED_FORWARD, ("wide", unit, micro, step))
            self._put(task, Role.HOST_FEED_FORWARD, ("wide", unit, micro, step))
        elif task.kind is TaskKind.FETCH_INNER:
            self._find(task, Role.HOST_FEED_FORWARD, ("wide", unit, micro, step))
            self._put(task, Role.FEED_FORWARD, ("wide", unit, micro, step))
        elif task.kind is TaskKind.LOAD_STATE:
            for on_host, role in HOST_STATE.items():
                self._find(task, on_host, (role, unit, task.chunk, step))
                self._put(task, role, (role, unit, task.chunk, step))
        elif task.kind is TaskKind.UPDATE_PASSING:
            self._find(task, Role.GRADIENT, self._whole_gradient(unit, step))
            for role in HOST_STATE.values():
                self._find(task, role, (role, unit, task.chunk, step))
                self._put(task, role, (role, unit, task.chunk, step + 1))
            # Its chunks are updated one after the other.
            self._find(task, Role.WEIGHTS, ("weights", unit, step) if not task.chunk else ("partly", unit, task.chunk, step))
            last = task.chunk == self.chunks - 1
            self._put(task, Role.WEIGHTS, ("weights", unit, step + 1) if last else ("partly", unit, task.chunk + 1, step))
        elif task.kind is TaskKind.OFFLOAD_STATE:
            for on_host, role in HOST_STATE.items():
                self._find(task, role, (role, unit, task.chunk, step + 1))
                self._put(task, on_host, (role, unit, task.chunk, step + 1))
        elif task.kind is TaskKind.OFFLOAD_GRADIENT:
            self._find(task, Role.GRADIENT, self._whole_gradient(unit, step))
            self._put(task, Role.HOST_GRADIENT, self._whole_gradient(unit, step))
        elif task.kind in (TaskKind.UPDATE_HOST, TaskKind.UPDATE_GPU):
            source = Role.HOST_GRADIENT if task.kind is TaskKind.UPDATE_HOST else Role.GRADIENT
            whole = self._whole_gradient(unit, step)
            self._find(task, source, ("clipped", whole) if self.clips else whole)
            for role in self._state(task):
                self._find(task, role, (role, unit, step))
                self._put(task, role, (role, unit, step + 1))
            self._find(task, self._master(task), ("weights", unit, step))
            self._put(task, self._master(task), ("weights", unit, step + 1))
        else:
            self._compute(task, step)

    def _compute(self, task: Task, step: int) -> None:
        unit, micro = task.unit, task.micro
        forward = task.kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP)
        if forward or unit > 0:
            self._find(task, Role.WEIGHTS, ("weights", unit, step))
        if unit > 0:
            self._find(task, Role.INPUT, ("boundary", unit - 1, micro, step))
        if forward:
            self._put(task, Role.OUTPUT, ("boundary", unit, micro, step))
            if task.kind is TaskKind.FORWARD_KEEP:
                self._put(task, Role.INNER, ("inner", unit, micro, step))
                if task.has(Role.FEED_FORWARD):
                    self._put(task, Role.FEED_FORWARD, ("wide", unit, micro, step))
            return
        if task.kind is TaskKind.LOSS:
            if self.model.tied_embeddings:
                self._find(task, Role.TIED_WEIGHTS, ("weights", 0, step))
                self._add(task, Role.TIED_GRADIENT, step)
        else:
            self._find(task, Role.BOUNDARY_GRADIENT, ("flow", unit + 1, micro, step))
            if task.kind is TaskKind.BACKWARD and unit > 0:
                self._find(task, Role.INNER, ("inner", unit, micro, step))
                if task.has(Role.FEED_FORWARD):
                    self._find(task, Role.FEED_FORWARD, ("wide", unit, micro, step))
                    self._put(task, Role.FEED_FORWARD, "overwritten")
        if unit > 0:
            self._put(task, Role.BOUNDARY_GRADIENT, ("flow", unit, micro, step))
        self._add(task, Role.GRADIENT, step)


def run_lanes(graph: TaskGraph, contents: Contents, steps: int, choose: Choose) -> None:
    """Run the unrolled graph, picking the next lane among those whose head task may start."""
    done: set[tuple[int, int]] = set()
    heads = dict.fromkeys(graph.lanes, 0)

    def head(lane: Lane) -> tuple[int, int]:
        step, place = divmod(heads[lane], len(graph.lanes[lane]))
        return step, graph.lanes[lane][place]

    def ready(lane: Lane) -> bool:
        step, number = head(lane)
        return step < steps and all(
            step < dependency.distance or (step - dependency.distance, dependency.task) in done
            for dependency in graph.tasks[number].dependencies
        )

    for _ in range(steps * len(graph.tasks)):
        candidates = [lane for lane in heads if ready(lane)]
        assert candidates, "deadlock"
        lane = choose(candidates)
        step, number = head(lane)
        contents.run(graph.tasks[number], step)
        done.add((step, number))
        heads[lane] += 1
