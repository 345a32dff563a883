"""A lower bound on the step time of a candidate, from the time each kind of task takes, without a task graph.

Three things bound a step. A lane cannot be busy for longer than the step. A shared resource gives no more
than its capacity. And a cycle of dependencies that leads from a task to the same task of the next step must
be walked once a step: a unit's backward, its gradient's way to the host, the updates from there on to some
other unit's, that unit's load, and the compute from its forward back to the first unit's backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from msgspec import UNSET

from planner.search.candidate import AWAY, Candidate
from planner.search.counts import state_chunks
from simulator import Resource, TaskCost, capacities, price, resource_time
from slideplan.codec import Spec
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import (
    BACKWARD,
    BACKWARD_RECOMPUTE,
    FETCH_BOUNDARY,
    FETCH_FEED_FORWARD,
    FORWARD,
    FORWARD_KEEP,
    LOAD_WEIGHTS,
    LOSS,
    OFFLOAD_BOUNDARY,
    OFFLOAD_FEED_FORWARD,
    OFFLOAD_GRADIENT,
    READ_BOUNDARY,
    READ_WEIGHTS,
    UPDATE_GPU,
    UPDATE_HOST,
    WRITE_BOUNDARY,
    WRITE_WEIGHTS,
    Operation,
    copy,
)
from slideplan.lowering.lower import lower
from slideplan.lowering.pools import PASSING, Holding
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.policy import ComputePolicy, Workload, state_classes

LAYERS_PRICED = 3  # layers are alike, so a short model has every kind of task of a long one


class Way(NamedTuple):
    """What tells tasks of different cost apart: whether they add to gradients of earlier micro-batches, and of units
    that are updated in chunks, whose chunks count as a whole.
    """

    operation: Operation
    role: UnitRole
    adds: bool = False
    in_chunks: bool = False


class Durations(Spec, frozen=True):
    """What each kind of task on each role of unit takes alone on an idle machine, by whether it adds to gradients.

    time_ns:    duration, the least of several
    work:       what it takes of each shared resource, in bytes/s x ns
    capacities: bytes/s that each resource offers
    """

    time_ns: dict[Way, int]
    work: dict[Way, dict[Resource, int]]
    capacities: dict[Resource, int]


def durations(
    model: ModelSpec,
    knobs: ComputePolicy,
    seq_len: int,
    machine: MachineProfile,
    footprint: Footprint,
) -> Durations:
    """Prices of all kinds of task at one micro-batch size, gradient type and kind of kernels.

    Passes over complete gradients are left out: bounds hold without them, a little lower.
    """
    micro_batch, dtype, kernels, state = knobs.micro_batch, knobs.gradient_dtype, knobs.kernels, knobs.state
    short = msgspec.structs.replace(model, layers=LAYERS_PRICED)
    streamed = Candidate(
        micro_batch=micro_batch, micro_batches=2, gradient_dtype=dtype, kernels=kernels, window=2, prefetch_depth=1,
        host_gradient_slots=2, boundary_slots=4, offloaded_outputs=LAYERS_PRICED, deferred_updates=1,
        state=state,
    )  # fmt: skip
    away = 0 if kernels == "eager" else 1
    resident = Candidate(
        micro_batch=micro_batch, micro_batches=2, gradient_dtype=dtype, kernels=kernels, state_layers=LAYERS_PRICED,
        weight_layers=LAYERS_PRICED, embedding_on_gpu=True, head_on_gpu=True, kept_layers=LAYERS_PRICED - away,
        offloaded_inner=away, inner_slots=away, state=state,
    )  # fmt: skip
    passing = msgspec.structs.replace(
        resident, state_layers=0, streamed_state=LAYERS_PRICED, state_slots=1, state_chunks=state_chunks(model)
    )
    on_drive = msgspec.structs.replace(
        streamed, ssd_layers=LAYERS_PRICED, ssd_ends=True, ssd_slots=1, ssd_chunks=state_chunks(model, Tier.HOST)
    )
    whole = msgspec.structs.replace(
        on_drive,
        ssd_whole=True,
        ssd_weights=LAYERS_PRICED,
        host_weight_slots=1,
        ssd_outputs=LAYERS_PRICED,
        host_boundary_slots=1,
    )
    drives = (on_drive, whole) if machine.ssd is not None else ()
    workload = Workload(seq_len=seq_len, global_batch=2 * micro_batch)
    offered = capacities(machine)
    found = Durations({}, {}, offered)
    for candidate in (streamed, resident, passing, *drives):
        graph = lower(short, candidate.policy(short), workload, footprint)
        of_wholes: dict[tuple[Way, int | str], list[TaskCost]] = {}
        for task, cost in zip(graph.tasks, price(graph, short, knobs, seq_len, machine), strict=True):
            way = Way(task.operation, short.role(task.unit), task.accumulates, task.chunk is not UNSET)
            of_wholes.setdefault((way, task.unit if way.in_chunks else task.name), []).append(cost)
        for (way, _), costs in of_wholes.items():
            duration_ns = sum(cost.duration_ns for cost in costs)
            if duration_ns <= found.time_ns.get(way, duration_ns):
                found.time_ns[way] = duration_ns
                found.work[way] = {
                    resource: sum(min(cost.demand[resource], offered[resource]) * cost.duration_ns for cost in costs)
                    for resource in costs[0].demand
                }
    return found


class Bound(Spec, frozen=True):
    """No step of the candidate is shorter than `step_ns`. `other_ns`: work on lanes beside the busiest."""

    step_ns: int
    other_ns: int

    @property
    def estimate_ns(self) -> int:
        """Not a bound, but an order to look at candidates in: work elsewhere brings contention.

        A thirty-second of it is what simulated steps of offloaded 8B to 32B models take beyond their
        longest path, give or take as much.
        """
        return self.step_ns + self.other_ns // 32


_LANES = (
    LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE, LaneKind.GPU_UPDATE, LaneKind.SSD_READ,
    LaneKind.SSD_WRITE,
)  # fmt: skip


class _HostUnits:
    """Units that the host updates, in unit order, without listing them."""

    def __init__(self, model: ModelSpec, candidate: Candidate) -> None:
        self._head = model.head_unit
        self._gpu_updated = candidate.gpu_updated
        self._embedding = int(not candidate.embedding_on_gpu)
        self._layers = model.layers - candidate.gpu_updated
        self.count = self._embedding + self._layers + int(not candidate.head_on_gpu)

    def __getitem__(self, place: int) -> int:
        if place < self._embedding:
            return 0
        layer = place - self._embedding
        return self._gpu_updated + 1 + layer if layer < self._layers else self._head

    def roles(self, count: int) -> dict[UnitRole, int]:
        """How many of each role the first `count` are."""
        embedding = min(count, self._embedding)
        layers = min(count - embedding, self._layers)
        return {UnitRole.EMBEDDING: embedding, UnitRole.LAYER: layers, UnitRole.HEAD: count - embedding - layers}


class BoundModel:
    """Bounds for candidates that compute alike."""

    def __init__(self, model: ModelSpec, times: Durations) -> None:
        self.model = model
        self._times = times

    def bound(self, candidate: Candidate) -> Bound:
        counts = self._counts(candidate)
        lanes = self._busy(counts)
        busiest = max(lanes.values())
        step_ns = max(busiest, self._resources(counts), *self._cycles(candidate, lanes[LaneKind.COMPUTE]))
        return Bound(step_ns=step_ns, other_ns=sum(lanes.values()) - busiest)

    def lanes(self, candidate: Candidate) -> dict[LaneKind, int]:
        """Busy time of each lane in one step. Nanoseconds."""
        return self._busy(self._counts(candidate))

    def _busy(self, counts: dict[Way, int]) -> dict[LaneKind, int]:
        busy = dict.fromkeys(_LANES, 0)
        for way, count in counts.items():
            busy[way.operation.lane] += count * self._times.time_ns[way]
        return busy

    def _resources(self, counts: dict[Way, int]) -> int:
        """How long the busiest shared resource takes for what the step needs of it. Nanoseconds."""
        work = dict.fromkeys(self._times.capacities, 0)
        for way, count in counts.items():
            for resource, amount in self._times.work[way].items():
                work[resource] += count * amount
        return resource_time(work, self._times.capacities)

    def _counts(self, candidate: Candidate) -> dict[Way, int]:
        """How many tasks of each way a step has."""
        layers, micros = self.model.layers, candidate.micro_batches
        kept = candidate.kept_layers + candidate.offloaded_inner
        found: dict[Way, int] = {}
        for operation, role, count in (
            (FORWARD, UnitRole.EMBEDDING, micros),
            (FORWARD, UnitRole.LAYER, micros * (layers - kept)),
            (FORWARD_KEEP, UnitRole.LAYER, micros * kept),
            (LOSS, UnitRole.HEAD, micros),
            (BACKWARD, UnitRole.LAYER, micros * kept),
            (BACKWARD_RECOMPUTE, UnitRole.LAYER, micros * (layers - kept)),
            (BACKWARD, UnitRole.EMBEDDING, micros),
        ):
            found.update(self._ways(operation, role, count, micros))
        found.update({way: count for way, count in self._moves(candidate).items() if count})
        return found

    def _ways(self, operation: Operation, role: UnitRole, count: int, micros: int) -> dict[Way, int]:
        """Tasks by way: of those that may add to gradients, one in `micros` does not."""
        first, more = Way(operation, role), Way(operation, role, adds=True)
        if more not in self._times.time_ns:
            return {first: count}
        if first not in self._times.time_ns:  # a tied embedding's gradient builds on the head's
            return {more: count}
        return {first: count // micros, more: count - count // micros}

    def _moves(self, candidate: Candidate) -> dict[Way, int]:
        """Copies and updates of a step, from what units hold where."""
        held, layers, micros = candidate.holdings(self.model), self.model.layers, candidate.micro_batches
        found: dict[Way, int] = {}
        for role in UnitRole:
            hosted = sum(held.get(Holding(TensorClass.WEIGHTS, tier, role), 0) for tier in (Tier.HOST, Tier.SSD))
            found |= {Way(operation, role): hosted for operation in (LOAD_WEIGHTS, OFFLOAD_GRADIENT, UPDATE_HOST)}
            group = PASSING if role is UnitRole.LAYER else role
            on_drive = held[Holding(TensorClass.MOMENTS, Tier.SSD, group, Tier.HOST)]
            found[Way(UPDATE_HOST, role)] -= on_drive
            moved = state_classes(candidate.state) if candidate.ssd_whole else (TensorClass.MOMENTS,)
            moves = copy(Tier.SSD, Tier.HOST, *moved), copy(Tier.HOST, Tier.SSD, *moved)
            found |= {Way(operation, role, in_chunks=True): on_drive for operation in (UPDATE_HOST, *moves)}
            found[Way(UPDATE_GPU, role)] = held.get(Holding(TensorClass.MOMENTS, Tier.GPU, role, Tier.GPU), 0)
        # A streaming layer is loaded for forward and for backward, but for those still in the window at
        # the turn-around; any other unit that the host updates is loaded once.
        streaming = layers - held[Holding(TensorClass.WEIGHTS, Tier.GPU, UnitRole.LAYER)]
        found[Way(LOAD_WEIGHTS, UnitRole.LAYER)] += streaming - min(candidate.window, streaming)
        # What leaves is the embedding's output and the layers', all of one size.
        far = held[Holding(TensorClass.BOUNDARY, Tier.SSD, "")]
        boundaries = held[Holding(TensorClass.BOUNDARY, Tier.HOST, "")] + far
        products = held[Holding(TensorClass.FEED_FORWARD, Tier.HOST, "")]
        passing = held[Holding(TensorClass.MOMENTS, Tier.HOST, PASSING, Tier.GPU)]
        for operations, count in (
            ((OFFLOAD_BOUNDARY, FETCH_BOUNDARY), boundaries * micros),
            ((WRITE_BOUNDARY, READ_BOUNDARY), far * micros),
            ((OFFLOAD_FEED_FORWARD, FETCH_FEED_FORWARD), products * micros),
        ):
            found |= {Way(operation, UnitRole.LAYER): count for operation in operations}
        # Weights on the SSD are read before forward; once more, but for those that wait in a host slot from there on.
        away = held[Holding(TensorClass.WEIGHTS, Tier.SSD, UnitRole.LAYER)]
        found[Way(READ_WEIGHTS, UnitRole.LAYER)] = 2 * away - min(away, candidate.host_weight_slots)
        found[Way(WRITE_WEIGHTS, UnitRole.LAYER)] = away
        passes = state_classes(candidate.state)
        arrive, leave = copy(Tier.HOST, Tier.GPU, *passes), copy(Tier.GPU, Tier.HOST, *passes)
        for operation in (arrive, UPDATE_GPU, leave):
            found[Way(operation, UnitRole.LAYER, in_chunks=True)] = passing
        return found

    def _cycles(self, candidate: Candidate, compute_ns: int) -> Iterator[int]:
        hosted = _HostUnits(self.model, candidate)
        deferred, every = candidate.deferred_updates, hosted.count
        if every:
            assert 1 <= deferred <= every, "the first unit that the host updates is its last but for deferred ones"
            late, all_updates = (self._updates(candidate, hosted, count) for count in (deferred, every))
            opening = every - 1 if deferred < every else 0  # which gradient starts the updates
            yield self._cycle(candidate, hosted[opening], all_updates, hosted[deferred - 1])
            yield self._cycle(candidate, hosted[0], late, hosted[deferred - 1])
            if deferred < every:
                first = self._updates(candidate, hosted, 1)
                yield self._cycle(candidate, hosted[every - 1], all_updates - late, hosted[deferred])
                yield self._cycle(candidate, hosted[every - 1], all_updates - late + first, hosted[0])
        yield from self._slot_cycles(candidate, compute_ns)
        yield from self._window_cycles(candidate)
        # A unit's own update on the GPU stands between its backward and its next forward.
        unit = 0 if candidate.embedding_on_gpu else 1
        if candidate.state_on_gpu(self.model, unit):
            update = self._unit_time(UPDATE_GPU, unit)
            yield self._forward(candidate, unit) + self._loss(candidate) + self._backward(candidate, unit) + update

    def _slot_cycles(self, candidate: Candidate, compute_ns: int) -> Iterator[int]:
        """Cycles through shared gradient slots, of which a layer takes the one that is free for longest.

        With one slot on the GPU, every gradient leaves before the next layer's backward begins. And the
        layer number k that the host updates, in order of arrival, leaves when the update of number k - slots
        has freed its host slot; until then the backward that needs the GPU slot cannot begin.
        """
        layers, hosted = self.model.layers, self.model.layers - candidate.gpu_updated
        offload, update = self._time(OFFLOAD_GRADIENT, UnitRole.LAYER), self._host_update(candidate, UnitRole.LAYER)
        if candidate.gradient_slots == 1:
            # The first layer's gradient is the last: none waits for its slot.
            on_gpu, resident = (max(0, count - 1) for count in (candidate.gpu_updated, candidate.state_layers))
            leave = (layers - 1 - on_gpu) * offload + resident * self._time(UPDATE_GPU, UnitRole.LAYER)
            passing = Way(UPDATE_GPU, UnitRole.LAYER, in_chunks=True)
            yield compute_ns + leave + (on_gpu - resident) * self._times.time_ns[passing]
        slots = candidate.host_gradient_slots
        for number in (slots, min(hosted - 1, layers - 1 - candidate.gradient_slots)):
            waiting = layers - number - candidate.gradient_slots  # the layer whose backward needs the GPU slot
            if slots <= number < hosted and waiting >= 1:
                rest = self._backward(candidate, 0) - self._backward(candidate, waiting + 1)
                top = self._forward(candidate, 0) + self._loss(candidate) + self._backward(candidate, layers)
                yield top + 2 * offload + (number - slots + 1) * update + rest

    def _window_cycles(self, candidate: Candidate) -> Iterator[int]:
        """Through the window: a load waits until the unit that held its slot is done, and later loads for it."""
        layers, first = self.model.layers, candidate.weight_layers + 1  # of those that stream
        waiting = layers - candidate.weight_layers - candidate.window  # loads of one pass that wait for a slot
        if candidate.window and waiting > 0:
            loads = waiting * self._time(LOAD_WEIGHTS, UnitRole.LAYER)
            forward, backward = self._forward(candidate, 0), self._backward(candidate, 0)
            until_first = forward - self._forward(candidate, first + 1)
            from_first = backward - self._backward(candidate, first + 1)
            yield until_first + loads + self._forward(candidate, layers) + self._loss(candidate) + backward
            yield forward + self._loss(candidate) + self._backward(candidate, layers) + loads + from_first

    def _cycle(self, candidate: Candidate, first: int, updates_ns: int, last: int) -> int:
        """From the gradient of unit `first` through updates to the load of unit `last`, and back by compute.

        Forward loads follow each other in unit order, so the way leads along compute or along loads.
        """
        layers = self.model.layers
        offload, load = self._unit_time(OFFLOAD_GRADIENT, first), self._unit_time(LOAD_WEIGHTS, last)
        later = max(0, layers - max(last, candidate.gpu_updated))  # layers after `last` that the host updates
        loads = later * self._time(LOAD_WEIGHTS, UnitRole.LAYER) + self._forward(candidate, layers) if later else 0
        compute = self._loss(candidate) + self._backward(candidate, first)
        return offload + updates_ns + load + max(self._forward(candidate, last), loads) + compute

    def _updates(self, candidate: Candidate, hosted: _HostUnits, count: int) -> int:
        """Updates of the first `count` host-state units."""
        return sum(number * self._host_update(candidate, role) for role, number in hosted.roles(count).items())

    def _host_update(self, candidate: Candidate, role: UnitRole) -> int:
        """A unit's update by the host; where some are made chunk by chunk, which may be faster, no longer than those."""
        whole = self._time(UPDATE_HOST, role)
        if not candidate.ssd_chunks:
            return whole
        return min(whole, self._times.time_ns[Way(UPDATE_HOST, role, in_chunks=True)])

    # -- times of runs of tasks ------------------------------------------------------------------

    def _forward(self, candidate: Candidate, unit: int) -> int:
        """Forward of all micro-batches from `unit` to the last layer."""
        kinds = FORWARD_KEEP, FORWARD
        embedding = self._micros(candidate, FORWARD, UnitRole.EMBEDDING) if unit == 0 else 0
        return embedding + self._layer_run(candidate, unit, *kinds)

    def _backward(self, candidate: Candidate, unit: int) -> int:
        """Backward of all micro-batches from the last layer down to `unit`."""
        kinds = BACKWARD, BACKWARD_RECOMPUTE
        embedding = self._micros(candidate, BACKWARD, UnitRole.EMBEDDING) if unit == 0 else 0
        return embedding + self._layer_run(candidate, unit, *kinds)

    def _layer_run(self, candidate: Candidate, unit: int, kept_kind: Operation, other_kind: Operation) -> int:
        first = max(unit, 1)
        run = self.model.layers - first + 1
        kept = min(run, candidate.kept_layers)
        if candidate.offloaded_inner:
            kept += candidate.inner(self.model)[first - 1 :].count(AWAY)
        kept_ns, other_ns = (self._micros(candidate, kind, UnitRole.LAYER) for kind in (kept_kind, other_kind))
        return kept * kept_ns + (run - kept) * other_ns

    def _micros(self, candidate: Candidate, operation: Operation, role: UnitRole) -> int:
        """One unit's tasks of a kind, of all micro-batches."""
        ways = self._ways(operation, role, candidate.micro_batches, candidate.micro_batches)
        return sum(count * self._times.time_ns[way] for way, count in ways.items())

    def _loss(self, candidate: Candidate) -> int:
        return self._micros(candidate, LOSS, UnitRole.HEAD)

    def _unit_time(self, operation: Operation, unit: int) -> int:
        return self._time(operation, self.model.role(unit))

    def _time(self, operation: Operation, role: UnitRole) -> int:
        return self._times.time_ns[Way(operation, role)]
