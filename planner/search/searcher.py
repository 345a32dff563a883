"""Finding the fastest or the leanest among candidates, with bounds, and remembering what was learnt.

Best first, in three stages of rising cost: a bound from counts alone (`bounds`), the bound of the lowered
graph, and the simulation. What a bound shows to be of no interest is dropped. Budgets count tasks, not
seconds: the same inputs give the same answer anywhere.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

from planner.search.bounds import Bound, BoundModel, durations
from planner.search.candidate import Candidate
from planner.search.space import SpaceBuilder
from simulator import TaskCost, capacities, lower_bound, price, simulate
from slideplan.graph.tasks import TaskGraph
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.profile import MachineProfile
from slideplan.placement import Tier
from slideplan.policy import ComputeKnobs
from slideplan.progress import Progress, Show, silent
from slideplan.quantities import format_ns

GRAPHS_KEPT = 48  # lowered graphs in memory: what is lowered is often simulated soon after
FOREVER = float("inf")


class Sample(NamedTuple):
    """A simulated candidate; `slot_bytes` is what its slots take in each tier."""

    candidate: Candidate
    step_ns: int
    slot_bytes: dict[Tier, int]

    @property
    def host_bytes(self) -> int:
        return self.slot_bytes[Tier.HOST]

    @property
    def gpu_bytes(self) -> int:
        return self.slot_bytes[Tier.GPU]


class Budget(NamedTuple):
    """Sizes of all task graphs lowered, and of all simulated, since the searcher began."""

    lowered_tasks: int
    simulated_tasks: int


class Searcher:
    """What is known of the candidates of one workload, by number, in the order in which they came up."""

    def __init__(self, builder: SpaceBuilder, machine: MachineProfile, show: Show = silent) -> None:
        self.builder = builder
        self.samples: dict[int, Sample] = {}
        self.candidates: list[Candidate] = []
        self.bounds: list[Bound] = []  # the best known for each
        self.spent = Budget(0, 0)
        self._machine = machine
        self._show = show
        self._numbers: dict[Candidate, int] = {}
        self._lowered: dict[int, int] = {}  # the bound of each graph lowered
        self._graphs: dict[int, tuple[TaskGraph, tuple[TaskCost, ...]]] = {}
        self._models: dict[ComputeKnobs, BoundModel] = {}

    def number(self, candidates: Iterable[Candidate]) -> list[int]:
        """Numbers of these, new ones with their bounds from counts."""
        found = []
        for candidate in candidates:
            number = self._numbers.setdefault(candidate, len(self._numbers))
            if number == len(self.candidates):
                self.candidates.append(candidate)
                self.bounds.append(self._bound_model(candidate).bound(candidate))
            found.append(number)
        self._show(Progress(f"searching: {len(self.candidates):,} candidates"))
        return found

    def fastest(self, numbers: Sequence[int], budget: Budget, slower_than: float = FOREVER) -> Sample | None:
        """The shortest step among these candidates, if it is shorter than `slower_than`; bounds drop the rest.

        What is no shorter by more than the search's tolerance may be dropped, and the budget may end the
        search; without a limit and without any sample so far, at least one candidate is simulated.
        """
        known = [self.samples[number] for number in numbers if number in self.samples]
        best = min((sample for sample in known if sample.step_ns < slower_than), key=lambda s: s.step_ns, default=None)
        closer = 1 - self.builder.options.tolerance
        threshold = (best.step_ns if best else slower_than) * closer
        queue = [(self.bounds[n].estimate_ns, n) for n in dict.fromkeys(numbers) if n not in self.samples]
        heapq.heapify(queue)
        shortest = threshold
        while queue:
            _, number = heapq.heappop(queue)
            if self.bounds[number].step_ns >= threshold:
                continue
            must = best is None and slower_than == FOREVER
            if number not in self._lowered:
                if self.spent.lowered_tasks >= budget.lowered_tasks and not must:
                    continue
                bound = self.sharpen(number)
                if bound.step_ns >= threshold:
                    continue
                # The most promising so far goes first: with a good plan in hand, bounds drop the rest sooner.
                if bound.step_ns >= shortest:
                    heapq.heappush(queue, (bound.estimate_ns, number))
                    continue
                shortest = bound.step_ns
            if self.spent.simulated_tasks < budget.simulated_tasks or must:
                sample = self.sample(number)
                if sample.step_ns < (best.step_ns if best else slower_than):
                    best = sample
                    threshold = sample.step_ns * closer
        return best

    def leanest(self, numbers: Sequence[int], budget: Budget, slowest_ns: float, best: Sample) -> Sample:
        """The least host memory among these at a step of at most `slowest_ns`, the shortest step among equals.

        `best` is what is had already.
        """
        for number in sorted(set(numbers), key=lambda n: (self.taken_bytes(n, Tier.HOST), self.bounds[n].estimate_ns, n)):
            if self.taken_bytes(number, Tier.HOST) >= best.host_bytes:
                break
            if number not in self.samples:
                if self.bounds[number].step_ns > slowest_ns or self.spent.lowered_tasks >= budget.lowered_tasks:
                    continue
                if number not in self._lowered and self.sharpen(number).step_ns > slowest_ns:
                    continue
                if self.spent.simulated_tasks >= budget.simulated_tasks:
                    continue
            sample = self.sample(number)
            if sample.step_ns <= slowest_ns:
                return sample
        return best

    def sharpen(self, number: int) -> Bound:
        """Lower the candidate and take the bound of its graph."""
        graph, costs = self._graph(number)
        self.spent = self.spent._replace(lowered_tasks=self.spent.lowered_tasks + len(graph.tasks))
        self._lowered[number] = graph_ns = lower_bound(graph, costs, capacities(self._machine), self._machine.handoffs)
        bound = self.bounds[number]
        self.bounds[number] = bound = msgspec.structs.replace(bound, step_ns=max(bound.step_ns, graph_ns))
        return bound

    def sample(self, number: int) -> Sample:
        """Simulate the candidate, once."""
        if number not in self.samples:
            if number not in self._lowered:
                self.sharpen(number)
            graph, costs = self._graph(number)
            self.spent = self.spent._replace(simulated_tasks=self.spent.simulated_tasks + len(graph.tasks))
            candidate = self.candidates[number]
            assert ledger(graph, self._machine).fits, f"the byte count let through a policy that does not fit: {candidate}"
            step_ns, _ = simulate(graph, costs, capacities(self._machine), self._machine.handoffs)
            step_ns = max(step_ns, self._lowered[number])  # as in `predict`
            self.samples[number] = Sample(candidate, step_ns, self.builder.slot_bytes(candidate))
            shortest = min(sample.step_ns for sample in self.samples.values())
            found = f"{len(self.candidates):,} candidates, {len(self.samples)} simulated"
            self._show(Progress(f"searching: {found}, best step {format_ns(shortest)}"))
        return self.samples[number]

    def taken_bytes(self, number: int, tier: Tier) -> int:
        """Bytes of a tier that the candidate's slots take."""
        return self.builder.slot_bytes(self.candidates[number])[tier]

    def lower(self, candidate: Candidate) -> TaskGraph:
        """The candidate's task graph."""
        builder = self.builder
        return lower(builder.model, candidate.policy(builder.model), builder.workload, builder.footprint(candidate))

    # -- helpers ---------------------------------------------------------------------------------

    def _graph(self, number: int) -> tuple[TaskGraph, tuple[TaskCost, ...]]:
        if number not in self._graphs:
            candidate, builder = self.candidates[number], self.builder
            graph = self.lower(candidate)
            costs = price(graph, builder.model, candidate, builder.workload.seq_len, self._machine)
            if len(self._graphs) == GRAPHS_KEPT:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[number] = graph, costs
        return self._graphs[number]

    def _bound_model(self, candidate: Candidate) -> BoundModel:
        key = ComputeKnobs.of(candidate)
        if key not in self._models:
            builder = self.builder
            footprint = builder.footprint(candidate)
            times = durations(builder.model, candidate, builder.workload.seq_len, self._machine, footprint)
            self._models[key] = BoundModel(builder.model, times)
        return self._models[key]
