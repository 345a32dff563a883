"""What else could be had: the front of speed and memory, and the next-best value of each knob."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.search.candidate import Candidate
from planner.search.counts import evenly
from planner.search.searcher import Budget, Sample, Searcher
from slideplan.ledger import fixed_bytes_of
from slideplan.machine.profile import MachineProfile
from slideplan.placement import Tier
from slideplan.plan import Alternative, FrontPoint

FRONT_ROWS = 12
LEVELS = 5  # memory limits below the best's own, per tier, at which the fastest is looked for
SIDE_BUDGET = 12  # a side search costs at most this part of the search's budget


def _side_budget(searcher: Searcher) -> Budget:
    options, spent = searcher.builder.options, searcher.spent
    return Budget(
        spent.lowered_tasks + options.lowered_tasks // SIDE_BUDGET,
        spent.simulated_tasks + options.simulated_tasks // SIDE_BUDGET,
    )


def tokens_per_s(searcher: Searcher, step_ns: int) -> float:
    """Speed of a step of the searcher's workload."""
    return searcher.builder.workload.tokens * 1e9 / max(1, step_ns)


# -- the front ---------------------------------------------------------------------------------


def look_for_less_memory(searcher: Searcher) -> None:
    """Simulate the fastest candidates within several limits of each tier, down to the smallest need."""
    builder = searcher.builder
    searcher.number([builder.leaner(candidate) for candidate in tuple(searcher.candidates)])
    best = min(searcher.samples.values(), key=lambda sample: sample.step_ns)
    numbers = range(len(searcher.candidates))
    for tier, most in best.slot_bytes.items():
        taken = {number: searcher.taken_bytes(number, tier) for number in numbers}
        least = min(taken.values())
        for limit in evenly(least, max(least, most), LEVELS + 1)[:-1]:
            searcher.fastest([number for number in numbers if taken[number] <= limit], _side_budget(searcher))


def front(searchers: Sequence[Searcher], machine: MachineProfile) -> tuple[FrontPoint, ...]:
    """What was simulated and is beaten by nothing in speed and in memory of every tier at once, fastest first.

    Where there are more than FRONT_ROWS, some evenly spaced ones, the fastest and the slowest among them.
    """
    points: dict[tuple[float, tuple[int, ...], str], FrontPoint] = {}
    for searcher in searchers:
        for sample in searcher.samples.values():
            if searcher.builder.may_choose(sample.candidate):
                point = FrontPoint(
                    tokens_per_s=tokens_per_s(searcher, sample.step_ns),
                    global_batch=searcher.builder.workload.global_batch,
                    peak_bytes=peak_bytes(sample, machine),
                    policy=in_brief(sample.candidate),
                )
                # Nothing that comes later is faster; of equally fast ones those of less host memory come first.
                taken = tuple(point.peak_bytes[tier] for tier in (Tier.HOST, Tier.GPU))
                points[-point.tokens_per_s, taken, point.policy] = point
    kept: list[FrontPoint] = []
    for _, point in sorted(points.items()):
        if not any(all(other.peak_bytes[tier] <= taken for tier, taken in point.peak_bytes.items()) for other in kept):
            kept.append(point)
    return tuple(kept[place] for place in evenly(0, len(kept) - 1, FRONT_ROWS))


def peak_bytes(sample: Sample, machine: MachineProfile) -> dict[Tier, int]:
    """What a run of the candidate takes of each tier, fixed use included."""
    return {tier: taken + fixed_bytes_of(machine, tier) for tier, taken in sample.slot_bytes.items()}


def in_brief(candidate: Candidate) -> str:
    """The candidate in a line: micro-batches, window/depth, layers with weights/state on the GPU, kept + on the host, ..."""
    on_host = f"+{candidate.offloaded_inner}" if candidate.offloaded_inner else ""
    passing = f"+{candidate.streamed_state}" if candidate.streamed_state else ""
    ends = "".join(("E" if candidate.embedding_on_gpu else "", "H" if candidate.head_on_gpu else ""))
    return (
        f"{candidate.micro_batches}x{candidate.micro_batch} w{candidate.window}/{candidate.prefetch_depth} "
        f"res{candidate.weight_layers}/{candidate.state_layers}{passing}{ends} keep{candidate.kept_layers}{on_host} "
        f"away{candidate.offloaded_outputs} defer{candidate.deferred_updates} grad{candidate.gradient_slots}/"
        f"{candidate.host_gradient_slots} {candidate.gradient_dtype} {candidate.kernels}"
    )


# -- the next-best value of each knob -----------------------------------------------------------

_ENDS = {(False, False): "none", (True, False): "embedding", (True, True): "embedding, head"}

KNOBS: dict[str, Callable[[Candidate], str]] = {
    "micro-batches": lambda c: f"{c.micro_batches} of {c.micro_batch}",
    "window": lambda c: f"{c.window} slots",
    "prefetch depth": lambda c: f"{c.prefetch_depth}",
    "embedding, head on the GPU": lambda c: _ENDS[c.embedding_on_gpu, c.head_on_gpu],
    "layers with weights on the GPU": lambda c: f"{c.weight_layers}",
    "layers with state on the GPU": lambda c: f"{c.state_layers}",
    "layers with state passing through": lambda c: f"{c.streamed_state}",
    "layers keeping activations": lambda c: f"{c.kept_layers}",
    "layers with activations on the host": lambda c: f"{c.offloaded_inner}",
    "outputs waiting on the host": lambda c: f"{c.offloaded_outputs}",
    "updates after backward": lambda c: f"{c.deferred_updates}",
    "gradient type": lambda c: c.gradient_dtype,
    "GPU gradient slots": lambda c: f"{c.gradient_slots}",
    "host gradient slots": lambda c: f"{c.host_gradient_slots}",
    "GPU slots of outputs away": lambda c: f"{c.boundary_slots}",
    "GPU slots of activations away": lambda c: f"{c.inner_slots}",
    "GPU slots of state passing through": lambda c: f"{c.state_slots}",
}


def alternatives(searcher: Searcher, best: Sample, machine: MachineProfile) -> tuple[Alternative, ...]:
    """For each knob the fastest candidate with another value of it, among all candidates known and those around the best.

    The other gradient type is looked at for that knob alone: it is the user's to choose, not the search's.
    """
    builder = searcher.builder
    searcher.number(builder.neighbours(best.candidate))
    known = range(len(searcher.candidates))
    retyped = builder.other_dtype(best.candidate)
    other_type = searcher.number([retyped]) if retyped is not None else []
    closer = 1 - builder.options.tolerance
    found = []
    for knob, value_of in KNOBS.items():
        value = value_of(best.candidate)
        among = [*known, *other_type] if knob == "gradient type" else known
        numbers = [number for number in among if value_of(searcher.candidates[number]) != value]
        other = searcher.fastest(numbers, _side_budget(searcher)) if numbers else None
        if other is None:
            continue
        left = (searcher.bounds[number].step_ns for number in numbers if number not in searcher.samples)
        found.append(
            Alternative(
                knob=knob,
                value=value,
                other_value=value_of(other.candidate),
                tokens_per_s=tokens_per_s(searcher, other.step_ns),
                peak_bytes=peak_bytes(other, machine),
                proven=all(bound >= other.step_ns * closer for bound in left),
            )
        )
    return tuple(found)
