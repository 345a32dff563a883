"""From model, workload and machine to the best plan found, or to what is missing.

A coarse grid of candidates comes first, then those around the best, as long as they find a better one.
What is best says the objective: speed at the given global batch, speed at any batch within a number of
tokens a step, or least host memory at nearly the best speed. Every answer comes with what is proven of
the candidates considered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from planner.search.alternatives import alternatives, front, look_for_less_memory
from planner.search.searcher import FOREVER, Budget, Sample, Searcher
from planner.search.shortfall import DoesNotFit, shortfall
from planner.search.space import SearchOptions, Space, SpaceBuilder
from simulator import predict
from slideplan import __version__
from slideplan.codec import digest
from slideplan.graph.validate import validate
from slideplan.ledger import RESERVE_PERCENT, ledger
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.plan import Alternative, MachineReference, Plan, SearchRecord
from slideplan.policy import Workload
from slideplan.progress import Progress, Show, silent
from slideplan.quantities import format_bytes

BATCHES = 16  # global batches tried where the batch is searched too


class Found(NamedTuple):
    """A search of one workload and its answer."""

    searcher: Searcher
    space: Space
    best: Sample

    def ns_per_sequence(self) -> float:
        return self.best.step_ns / self.searcher.builder.workload.global_batch


def search(
    model: ModelSpec,
    workload: Workload,
    machine: MachineProfile,
    options: SearchOptions | None = None,
    show: Show = silent,
) -> Plan | DoesNotFit:
    """The best plan that the budget found, as the options' objective has it. Deterministic.

    With `max_tokens_per_step` the workload's global batch is not looked at. `show` is told how far
    the search is. Raises ValueError where workload or options make no sense for the model.
    """
    options = options or SearchOptions()
    batches = batches_within(workload.seq_len, options)
    looked: list[tuple[Searcher, Space]] = []
    found: list[Found] = []
    for batch in batches or (workload.global_batch,):
        builder = SpaceBuilder.on(model, Workload(seq_len=workload.seq_len, global_batch=batch), machine, options)
        show(Progress(f"searching: listing what fits at a global batch of {batch}"))
        space = builder.build()
        if space.fitting:
            searcher = Searcher(builder, machine, show)
            looked.append((searcher, space))
            slowest = min((each.ns_per_sequence() for each in found), default=FOREVER) * batch
            best = fastest(searcher, space, slowest)
            if best is not None:
                found.append(Found(searcher, space, best))
    if not found:
        return shortfall(builder, machine)
    chosen = min(found, key=Found.ns_per_sequence)
    slowest_ns = int(chosen.best.step_ns * 100 / options.at_least_percent) if options.least_host_memory else 0
    if options.least_host_memory:
        chosen, slowest_ns = leanest_of_all(looked, chosen, slowest_ns)
    if options.pareto:
        look_for_less_memory(chosen.searcher)
    chosen = chosen_again(chosen, slowest_ns)
    others: tuple[Alternative, ...] = ()
    while options.explain:
        others, before = alternatives(chosen.searcher, chosen.best, machine), chosen
        chosen = chosen_again(chosen, slowest_ns)
        if chosen == before:
            break
    if options.explain:
        others += _in_memory(chosen, machine, show)
    record = msgspec.structs.replace(
        certificate(looked, chosen, slowest_ns),
        batches=batches,
        front=front([searcher for searcher, _ in looked], machine),
        alternatives=others,
    )
    return _plan(chosen, machine, record)


def _in_memory(found: Found, machine: MachineProfile, show: Show) -> tuple[Alternative, ...]:
    """The same workload with as much more RAM as lies on the drive, at the same rates; nothing where nothing lies there."""
    builder, on_drive = found.searcher.builder, found.best.slot_bytes[Tier.SSD]
    if not on_drive:
        return ()
    host = machine.host
    enough = host.memory_bytes - (-on_drive * 100 // (100 - RESERVE_PERCENT[Tier.HOST]))
    larger = msgspec.structs.replace(machine, host=msgspec.structs.replace(host, memory_bytes=enough), ssd=None)
    options = msgspec.structs.replace(builder.options, max_tokens_per_step=None, pareto=False, explain=False)
    other = search(builder.model, builder.workload, larger, options, show)
    assert isinstance(other, Plan), "the same policy fits without the drive"
    record = other.prediction.record
    return (
        Alternative(
            knob="RAM in place of the drive",
            value=format_bytes(host.memory_bytes),
            other_value=format_bytes(enough),
            tokens_per_s=record.tokens_per_s,
            peak_bytes={Tier.SSD: 0} | record.peak_bytes,
            proven=not other.search.unpriced,
        ),
    )


def batches_within(seq_len: int, options: SearchOptions) -> tuple[int, ...]:
    """Global batches to try, largest first: the largest multiple of each micro-batch, and parts of the largest.

    Empty where the batch is given. Raises ValueError where not one sequence is within the limit.
    """
    limit = options.max_tokens_per_step
    if limit is None:
        return ()
    largest = limit // seq_len
    if largest < 1:
        raise ValueError(f"{limit} tokens per step are fewer than one sequence of {seq_len}; allow more, or shorten sequences")
    unit = options.micro_batch or 1
    if largest < unit:
        raise ValueError(f"{limit} tokens per step are fewer than one micro-batch of {unit} sequences of {seq_len}")
    whole = (largest // (unit << power) * (unit << power) for power in range(largest.bit_length()))
    parts = ((largest >> power) // unit * unit for power in range(largest.bit_length()))
    return tuple(sorted({*whole, *parts} - {0}, reverse=True)[:BATCHES])


def _budget(searcher: Searcher, thirds: int = 3) -> Budget:
    options = searcher.builder.options
    return Budget(options.lowered_tasks * thirds // 3, options.simulated_tasks * thirds // 3)


def fastest(searcher: Searcher, space: Space, slower_than: float = FOREVER) -> Sample | None:
    """The best of the grid and of what lies around the best; None where all steps are `slower_than` or slower."""
    best = searcher.fastest(searcher.number(space.fitting), _budget(searcher, 2), slower_than)
    while best is not None and space.offloads:
        around = searcher.number(searcher.builder.neighbours(best.candidate))
        better = searcher.fastest([*around, *searcher.number([best.candidate])], _budget(searcher))
        # Equals are neighbours of each other: only a shorter step is worth another look around.
        if better is None or better.step_ns >= best.step_ns:
            break
        best = better
    return best


def chosen_again(found: Found, slowest_ns: int) -> Found:
    """The best of all that was simulated by now: looking for other things finds faster policies within the tolerance.

    Of equally fast ones the one that needs the least memory; slowest_ns: as of `leanest`, 0 where speed is sought.
    """
    samples = [sample for sample in found.searcher.samples.values() if found.searcher.builder.may_choose(sample.candidate)]
    if slowest_ns:
        fast = [sample for sample in samples if sample.step_ns <= slowest_ns]
        best = min(fast, key=lambda sample: (sample.host_bytes, sample.step_ns, sample.gpu_bytes))
        better = (best.host_bytes, best.step_ns) < (found.best.host_bytes, found.best.step_ns)
    else:
        best = min(samples, key=lambda sample: (sample.step_ns, sample.host_bytes, sample.gpu_bytes))
        better = (best.step_ns, best.host_bytes) < (found.best.step_ns, found.best.host_bytes)
    return found._replace(best=best) if better else found


def leanest_of_all(looked: Sequence[tuple[Searcher, Space]], chosen: Found, slowest_ns: int) -> tuple[Found, int]:
    """The least host memory at any of the batches looked at, and the longest step allowed at its batch.

    slowest_ns: the longest step at the batch of `chosen`, which is the fastest there is.
    """
    batch = chosen.searcher.builder.workload.global_batch
    best, limit_ns = chosen._replace(best=leanest(chosen, slowest_ns)), slowest_ns
    for searcher, space in looked:
        here_ns = slowest_ns * searcher.builder.workload.global_batch // batch
        start = fastest(searcher, space, here_ns + 1) if searcher is not chosen.searcher else None
        if start is None:
            continue
        found = Found(searcher, space, start)
        found = found._replace(best=leanest(found, here_ns))
        if (found.best.host_bytes, found.ns_per_sequence()) < (best.best.host_bytes, best.ns_per_sequence()):
            best, limit_ns = found, here_ns
    return best, limit_ns


def leanest(found: Found, slowest_ns: int) -> Sample:
    """The least host memory at a step of at most `slowest_ns`: all candidates, their leaner forms, and around the best."""
    searcher, builder = found.searcher, found.searcher.builder
    spent = searcher.spent
    budget = Budget(*(was + more for was, more in zip(spent, _budget(searcher), strict=True)))
    best = before = found.best
    searcher.number([builder.leaner(candidate) for candidate in tuple(searcher.candidates)])
    while found.space.offloads:
        best = searcher.leanest(range(len(searcher.candidates)), budget, slowest_ns, best)
        if best is before:
            break
        before = best
        around = [*builder.neighbours(best.candidate)]
        searcher.number([*around, *map(builder.leaner, around)])
    return best


def certificate(looked: Sequence[tuple[Searcher, Space]], chosen: Found, slowest_ns: int = 0) -> SearchRecord:
    """What became of all candidates of all workloads looked at, and what is proven of them."""
    options, best = chosen.searcher.builder.options, chosen.best
    batch = chosen.searcher.builder.workload.global_batch
    left = still = simulated = considered = 0
    objective, bound_host_bytes = "tokens/s", best.host_bytes if slowest_ns else 0
    if slowest_ns:
        objective = f"least host memory at {options.at_least_percent:g} % of the best speed or more"
    bound_ns = best.step_ns
    for searcher, space in looked:
        here = searcher.builder.workload.global_batch
        threshold = best.step_ns * here / batch * (1 - options.tolerance)
        considered += len(searcher.candidates) + space.too_large
        simulated += len(searcher.samples)
        for number, bound in enumerate(searcher.bounds):
            sample = searcher.samples.get(number)
            bound_ns = min(bound_ns, (sample.step_ns if sample else bound.step_ns) * batch // here)
            if sample is None:
                left += 1
                if not slowest_ns:
                    still += bound.step_ns < threshold
                elif bound.step_ns <= slowest_ns * here // batch:
                    host_bytes = searcher.taken_bytes(number, Tier.HOST)
                    still += host_bytes < best.host_bytes
                    bound_host_bytes = min(bound_host_bytes, host_bytes)
    return SearchRecord(
        candidates=considered,
        pruned_by_capacity=sum(space.too_large for _, space in looked),
        pruned_by_bound=left - still,
        simulated=simulated,
        unpriced=still,
        bound_ns=bound_ns,
        objective=objective,
        slowest_ns=slowest_ns,
        bound_host_bytes=bound_host_bytes,
    )


def _plan(found: Found, machine: MachineProfile, record: SearchRecord) -> Plan:
    searcher, space, best = found
    builder = searcher.builder
    graph = searcher.lower(best.candidate)
    validate(graph, dict(builder.capacity))
    memory = ledger(graph, machine)
    policy = best.candidate.policy(builder.model)
    prediction = predict(graph, builder.model, policy, builder.workload, machine, memory)
    assert prediction.record.step_ns == best.step_ns, "one graph, one step time"
    return Plan(
        version=__version__,
        model=builder.model,
        model_digest=digest(builder.model),
        machine=MachineReference.of(machine),
        workload=builder.workload,
        policy=policy,
        footprint=builder.footprint(best.candidate),
        graph=graph,
        ledger=memory,
        prediction=prediction,
        search=record,
        offloads=space.offloads,
    )
