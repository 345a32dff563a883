"""From model, workload and machine to the best plan found, or to what is missing.

Best first, in three stages of rising cost: a bound from counts alone (`bounds`), the longest path through
the lowered graph (a bound too, since contention only slows tasks down), and the simulation. What a bound
shows to be no better than the best simulated step is dropped. A coarse grid of candidates comes first,
then those around the best. Budgets count tasks, not seconds: the same inputs give the same plan anywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from slideplan import __version__
from slideplan.plan.codec import digest
from slideplan.plan.graph import TaskGraph
from slideplan.plan.ledger import ledger
from slideplan.plan.lowering import lower
from slideplan.plan.machine import MachineProfile
from slideplan.plan.model import ModelSpec
from slideplan.plan.plan import MachineReference, Plan, Prediction, SearchRecord
from slideplan.plan.policy import Workload
from slideplan.plan.quantities import format_ns
from slideplan.plan.replay import replay
from slideplan.plan.validate import validate
from slideplan.planner.bounds import Bound, BoundModel, durations
from slideplan.planner.shortfall import DoesNotFit, shortfall
from slideplan.planner.space import Candidate, GradientDtype, SearchOptions, Space, SpaceBuilder
from slideplan.simulator import predict, price

Progress = Callable[[str], None]


def search(
    model: ModelSpec,
    workload: Workload,
    machine: MachineProfile,
    options: SearchOptions | None = None,
    progress: Progress = lambda _: None,
) -> Plan | DoesNotFit:
    """The plan with the shortest simulated step that the budget found. Deterministic.

    `progress` is told in words how far the search is.
    Raises ValueError where workload or options make no sense for the model.
    """
    options = options or SearchOptions()
    builder = SpaceBuilder.on(machine, model, workload, options)
    progress("listing what fits")
    space = builder.build()
    if not space.fitting:
        return shortfall(builder, machine)
    searcher = Searcher(builder, machine, progress)
    best = searcher.run(space)
    policy = best.candidate.policy(model)
    graph = lower(model, policy, workload, builder.footprints[policy.micro_batch])
    validate(graph, dict(builder.capacity))
    return Plan(
        version=__version__,
        model=model,
        model_digest=digest(model),
        machine=MachineReference.of(machine),
        workload=workload,
        policy=policy,
        graph=graph,
        ledger=ledger(graph, machine),
        prediction=best.prediction,
        search=searcher.record(space),
        offloads=space.offloads,
    )


class Best(NamedTuple):
    """The best simulated candidate."""

    step_ns: int
    candidate: Candidate
    prediction: Prediction


class _Entry(NamedTuple):
    """A candidate in the queue: least estimate first, in order of enumeration among equals."""

    estimate_ns: int
    number: int
    candidate: Candidate
    bound: Bound
    lowered: bool


class Searcher:
    """What is known of the candidates looked at so far."""

    def __init__(self, builder: SpaceBuilder, machine: MachineProfile, progress: Progress = lambda _: None) -> None:
        self.best: Best | None = None
        self._builder = builder
        self._machine = machine
        self._progress = progress
        self._candidates: dict[Candidate, int] = {}  # in the order in which they came up
        self._bounds: list[int] = []  # the best known for each
        self._simulated: set[int] = set()
        self._models: dict[tuple[int, GradientDtype], BoundModel] = {}
        self._lowered_tasks = self._simulated_tasks = 0

    def run(self, space: Space) -> Best:
        """Search the grid, then around the best found."""
        options = self._builder.options
        self.explore(space.fitting, options.lowered_tasks * 2 // 3, options.simulated_tasks * 2 // 3)
        while True:
            assert self.best is not None, "the first candidate is simulated, whatever the budget"
            before = self.best
            around = self._builder.neighbours(before.candidate) if space.offloads else ()
            self.explore(around, options.lowered_tasks, options.simulated_tasks)
            if self.best is before:
                return before

    def explore(self, candidates: Iterable[Candidate], lowered_tasks: int, simulated_tasks: int) -> None:
        """Find the best of these and of what was found before. Budgets count tasks since the search began."""
        queue = self._queue(candidates)
        shortest_path = self._threshold()
        while queue:
            entry = heapq.heappop(queue)
            if entry.bound.step_ns >= self._threshold() or entry.number in self._simulated:
                continue
            if not entry.lowered:
                if self._lowered_tasks >= lowered_tasks and self.best:
                    continue
                entry = self._lowered(entry)
                heapq.heappush(queue, entry)
                # The most promising so far goes first: with a good plan in hand, bounds drop the rest sooner.
                if entry.bound.step_ns >= shortest_path:
                    continue
                shortest_path = entry.bound.step_ns
            if self._simulated_tasks < simulated_tasks or not self.best:
                self._simulate(entry.number, entry.candidate)

    def record(self, space: Space) -> SearchRecord:
        """Counts of what became of all candidates."""
        assert self.best is not None
        left = [bound for number, bound in enumerate(self._bounds) if number not in self._simulated]
        open_bounds = [bound for bound in left if bound < self._threshold()]
        return SearchRecord(
            candidates=len(self._candidates) + space.too_large,
            pruned_by_capacity=space.too_large,
            pruned_by_bound=len(left) - len(open_bounds),
            simulated=len(self._simulated),
            unpriced=len(open_bounds),
            bound_ns=min([*left, self.best.step_ns]),
        )

    # -- the three stages ------------------------------------------------------------------------

    def _queue(self, candidates: Iterable[Candidate]) -> list[_Entry]:
        """Candidates not seen before, with their bounds."""
        queue = []
        for candidate in candidates:
            if candidate not in self._candidates:
                bound = self._bound_model(candidate).bound(candidate)
                number = self._candidates[candidate] = len(self._candidates)
                self._bounds.append(bound.step_ns)
                queue.append(_Entry(bound.estimate_ns, number, candidate, bound, lowered=False))
        self._progress(f"{len(self._candidates):,} candidates")
        heapq.heapify(queue)
        return queue

    def _lowered(self, entry: _Entry) -> _Entry:
        """With the longest path of its graph for a bound."""
        candidate = entry.candidate
        graph = self._graph(candidate)
        self._lowered_tasks += len(graph.tasks)
        model, seq_len = self._builder.model, self._builder.workload.seq_len
        costs = price(graph, model, candidate.micro_batch, seq_len, self._machine)
        path_ns, _ = replay(graph, [cost.duration_ns for cost in costs])
        bound = msgspec.structs.replace(entry.bound, step_ns=max(path_ns, entry.bound.step_ns))
        self._bounds[entry.number] = bound.step_ns
        return entry._replace(estimate_ns=bound.estimate_ns, bound=bound, lowered=True)

    def _simulate(self, number: int, candidate: Candidate) -> None:
        self._simulated.add(number)
        # Graphs are made anew rather than kept: a hundred of them take more memory than time.
        graph = self._graph(candidate)
        self._simulated_tasks += len(graph.tasks)
        memory = ledger(graph, self._machine)
        assert memory.fits, f"the byte count let through a policy that does not fit: {candidate}"
        builder = self._builder
        prediction = predict(graph, builder.model, candidate.micro_batch, builder.workload, self._machine, memory)
        step_ns = prediction.record.step_ns
        if self.best is None or step_ns < self.best.step_ns:
            self.best = Best(step_ns, candidate, prediction)
        self._progress(
            f"{len(self._candidates):,} candidates, {len(self._simulated)} simulated, best step {format_ns(self.best.step_ns)}"
        )

    # -- helpers ---------------------------------------------------------------------------------

    def _threshold(self) -> float:
        """Bounds from here on are of no interest."""
        return self.best.step_ns * (1 - self._builder.options.tolerance) if self.best else float("inf")

    def _graph(self, candidate: Candidate) -> TaskGraph:
        builder = self._builder
        footprint = builder.footprints[candidate.micro_batch]
        return lower(builder.model, candidate.policy(builder.model), builder.workload, footprint)

    def _bound_model(self, candidate: Candidate) -> BoundModel:
        key = candidate.micro_batch, candidate.gradient_dtype
        if key not in self._models:
            builder = self._builder
            footprint = builder.footprints[candidate.micro_batch]
            times = durations(builder.model, *key, builder.workload.seq_len, self._machine, footprint)
            self._models[key] = BoundModel(builder.model, times)
        return self._models[key]
