"""Runs a task graph on labels instead of numbers: every task must find in its slots what it is meant to read.

Knows the meaning of each task kind and nothing of how slots and edges were derived.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET

from slideplan.graph.lanes import Lane
from slideplan.graph.operations import (
    CAST_WEIGHTS,
    CLIP_GRADIENT,
    LOAD_WEIGHTS,
    READ_WEIGHTS,
    REFRESH_WEIGHTS,
    WRITE_WEIGHTS,
    TaskKind,
)
from slideplan.graph.tasks import COPIED_AS, TENSOR_OF, Role, Task, TaskGraph
from slideplan.lowering.pools import transit_pool
from slideplan.model import ModelSpec
from slideplan.placement import STATE, TensorClass, Tier

STATE_ROLES = (Role.REMAINDER, Role.MOMENTS)
Choose = Callable[[list[Lane]], Lane]


class Contents:
    """What each slot holds, as a label."""

    def __init__(self, model: ModelSpec, micro_batches: int, graph: TaskGraph) -> None:
        self.model = model
        self.micros = range(micro_batches)
        self.slots: dict[tuple[str, int], Any] = {}
        self.last_chunk = {task.unit: task.chunk for task in graph.tasks if task.chunk is not UNSET}
        self.clips = any(task.operation == CLIP_GRADIENT for task in graph.tasks)
        self.copied = copied = {}
        for task in graph.tasks:
            if task.kind is TaskKind.COPY and set(task.operation.tensors) & set(STATE) and task.unit not in copied:
                copied[task.unit] = task.operation.tensors
        for task in graph.tasks:
            if task.kind is TaskKind.UPDATE:
                for role in self._state(task):
                    if TENSOR_OF[role] not in copied.get(task.unit, ()):
                        self.slots[self._at(task, role)] = (role, task.unit, None, 0)
                self.slots[self._at(task, self._master(task))] = ("weights", task.unit, 0)
            elif task.operation == READ_WEIGHTS:  # where they lie
                self.slots[task.slot(Role.WEIGHTS, Tier.SSD)] = ("weights", task.unit, 0)
            elif task.kind is TaskKind.COPY and self._from_home(task):
                for tensor in set(task.operation.tensors) & set(STATE):  # where it lies, before it comes for the first time
                    role = COPIED_AS[tensor]
                    self.slots[task.slot(role, task.operation.source)] = (role, task.unit, task.chunk, 0)
            elif task.operation == REFRESH_WEIGHTS:
                self.slots[self._at(task, Role.WEIGHTS)] = ("weights", task.unit, 0)
            if task.has(Role.BARRIER):
                self.slots[self._at(task, Role.BARRIER)] = ("updated", 0)

    @staticmethod
    def _leaves(task: Task) -> bool:
        """Whether a copy leads away from the GPU, be it from the host on."""
        line = list(Tier)
        return line.index(task.operation.source) < line.index(task.operation.target)

    def _from_home(self, task: Task) -> bool:
        """Whether a copy brings state from where it lies: all the way from the SSD, or from the host."""
        in_transit = {access.pool for access in task.accesses} & {transit_pool(tensor) for tensor in STATE}
        return not self._leaves(task) and (task.operation.source is Tier.SSD or not in_transit)

    @staticmethod
    def _at(task: Task, role: Role) -> tuple[str, int]:
        return next((access.pool, access.slot) for access in task.accesses if access.role is role)

    @staticmethod
    def _master(task: Task) -> Role:
        return Role.MASTER if task.has(Role.MASTER) else Role.WEIGHTS

    @staticmethod
    def _state(task: Task) -> list[Role]:
        return [role for role in STATE_ROLES if task.has(role)]

    def _find(self, task: Task, role: Role, label: Any) -> None:
        found = self.slots.get(self._at(task, role))
        assert found == label, f"{task.name} finds {found} as {role}, needs {label}"

    def _put(self, task: Task, role: Role, label: Any) -> None:
        self.slots[self._at(task, role)] = label

    def _add(self, task: Task, role: Role, step: int) -> None:
        access = next(access for access in task.accesses if access.role is role)
        before: frozenset[Any] = frozenset() if access.mode == "w" else self.slots[access.pool, access.slot]
        self._put(task, role, before | {(task.unit, task.micro, step)})

    def _whole_gradient(self, unit: int, step: int) -> frozenset[Any]:
        tied = unit == 0 and self.model.tied_embeddings
        sources = (unit, self.model.head_unit) if tied else (unit,)
        return frozenset((source, micro, step) for source in sources for micro in self.micros)

    def run(self, task: Task, step: int) -> None:
        unit = task.unit
        if task.has(Role.BARRIER):
            if task.operation in (CAST_WEIGHTS, LOAD_WEIGHTS):
                self._find(task, Role.BARRIER, ("updated", step))
            else:
                self._put(task, Role.BARRIER, ("updated", step + 1))
        if task.operation in (CAST_WEIGHTS, REFRESH_WEIGHTS):
            version = step + (task.operation == REFRESH_WEIGHTS)
            self._find(task, Role.MASTER, ("weights", unit, version))
            self._put(task, Role.WEIGHTS, ("weights", unit, version))
        elif task.operation == CLIP_GRADIENT:
            self._find(task, Role.GRADIENT, self._whole_gradient(unit, step))
            self._put(task, Role.GRADIENT, ("clipped", self._whole_gradient(unit, step)))
        elif task.kind is TaskKind.COPY:
            for tensor in task.operation.tensors:
                self._copy(task, tensor, step)
        elif task.kind is TaskKind.UPDATE:
            self._update(task, step)
        else:
            self._compute(task, step)

    def _copy(self, task: Task, tensor: TensorClass, step: int) -> None:
        """What a class of the unit must be when it is copied; whatever it is, the copy is the same."""
        role, unit = COPIED_AS[tensor], task.unit
        source, target = (task.slot(role, tier) for tier in (task.operation.source, task.operation.target))
        leaves = self._leaves(task)
        wanted = {
            TensorClass.WEIGHTS: ("weights", unit, step + (task.operation == WRITE_WEIGHTS)),
            TensorClass.BOUNDARY: ("boundary", unit, task.micro, step),
            TensorClass.FEED_FORWARD: ("wide", unit, task.micro, step),
            TensorClass.GRADIENT: self._whole_gradient(unit, step),
            TensorClass.REMAINDER: (role, unit, task.chunk, step + leaves),
            TensorClass.MOMENTS: (role, unit, task.chunk, step + leaves),
        }[tensor]
        assert self.slots.get(source) == wanted, f"{task.name} finds {self.slots.get(source)} as {role}, needs {wanted}"
        self.slots[target] = wanted

    def _update(self, task: Task, step: int) -> None:
        unit, whole = task.unit, self._whole_gradient(task.unit, step)
        chunk = None if task.chunk is UNSET else task.chunk
        self._find(task, Role.GRADIENT, ("clipped", whole) if self.clips else whole)
        for role in self._state(task):
            if TENSOR_OF[role] in self.copied.get(unit, ()):
                self._find(task, role, (role, unit, chunk, step))
                self._put(task, role, (role, unit, chunk, step + 1))
            else:
                self._advance(task, role, chunk, (role, unit, None, step), (role, unit, None, step + 1))
        self._advance(task, self._master(task), chunk, ("weights", unit, step), ("weights", unit, step + 1))

    def _advance(self, task: Task, role: Role, chunk: int | None, before: Any, after: Any) -> None:
        """What stays where it is: chunks of a unit are updated one after the other."""
        self._find(task, role, ("partly", chunk, before) if chunk else before)
        last = chunk is None or chunk == self.last_chunk[task.unit]
        self._put(task, role, after if last else ("partly", chunk + 1, before))

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
