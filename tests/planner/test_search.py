from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from builders import GB_PER_S, SSD, flat_curve, tiny_machine, tiny_model, tiny_workload
from planner.search.best import Found, batches_within, certificate, fastest, search
from planner.search.bounds import BoundModel, durations
from planner.search.candidate import AWAY, RECOMPUTED, Candidate
from planner.search.counts import divisors, evenly
from planner.search.searcher import Budget, Searcher
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions, SpaceBuilder
from simulator import capacities, lower_bound, predict, price
from slideplan import codec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import COMPUTE_KINDS, UPDATE_GPU
from slideplan.graph.replay import replay
from slideplan.graph.validate import validate
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.profile import LaunchCost, LinkProfile, MachineProfile, OptimizerProfile, Spread, SsdProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.policy import Workload
from slideplan.quantities import GIB, KIB, MIB

PLENTY = 10**12


def machine(
    gpu_bytes: int = GIB, host_bytes: int = 4 * GIB, link: int = 10**9, optimizer: int = 10**9, ssd: SsdProfile | None = None
) -> MachineProfile:
    """`tiny_machine` with other capacities in bytes and other rates in bytes/s."""
    base = tiny_machine()
    return msgspec.structs.replace(
        base,
        gpu=msgspec.structs.replace(base.gpu, memory_bytes=gpu_bytes),
        host=msgspec.structs.replace(base.host, memory_bytes=host_bytes),
        link=LinkProfile(h2d=flat_curve(link), d2h=flat_curve(link), duplex_bytes_per_s=link * 3 // 2),
        optimizer=OptimizerProfile(
            threads=4, host_bytes_per_s=Spread.exact(optimizer), gpu_bytes_per_s=Spread.exact(800 * GB_PER_S)
        ),
        ssd=ssd,
    )


def builder(model: ModelSpec, at: MachineProfile, workload: Workload, **options: object) -> SpaceBuilder:
    return SpaceBuilder.on(model, workload, at, SearchOptions(**options))  # type: ignore[arg-type]


def predicted_ns(space: SpaceBuilder, at: MachineProfile, candidate: Candidate) -> int:
    policy = candidate.policy(space.model)
    graph = lower(space.model, policy, space.workload, space.footprint(candidate))
    prediction = predict(graph, space.model, policy, space.workload, at, ledger(graph, at))
    return prediction.record.step_ns


@st.composite
def candidates(draw: st.DrawFn) -> tuple[SpaceBuilder, MachineProfile, Candidate]:
    """Any candidate that a search may meet, be it of the grid, around it, or of the least demanding."""
    model = tiny_model(layers=draw(st.integers(1, 6)), tied_embeddings=draw(st.booleans()))
    at = machine(
        gpu_bytes=draw(st.integers(500, 6000)) * KIB,
        host_bytes=draw(st.integers(500, 12000)) * KIB,
        link=draw(st.sampled_from([10**8, 10**10])),
        optimizer=draw(st.sampled_from([10**8, 10**10])),
        ssd=draw(st.sampled_from([None, SSD, msgspec.structs.replace(SSD, read=flat_curve(10**8), write=flat_curve(10**8))])),
    )
    space = builder(
        model, at, Workload(seq_len=32, global_batch=draw(st.sampled_from([1, 2, 4]))),
        placement=draw(st.sampled_from(["auto", "host"])), gradient_dtype=draw(st.sampled_from(["auto", "bf16", "fp32"])),
        kernels=draw(st.sampled_from(["eager", "fused"])), state=draw(st.sampled_from(["exact", "bf16-moments", "lean"])),
    )  # fmt: skip
    fitting = space.build().fitting
    if not fitting:
        return space, at, draw(st.sampled_from(list(space.least_demanding())))
    candidate = draw(st.sampled_from(fitting))
    around = list(space.neighbours(candidate))
    return space, at, draw(st.sampled_from(around)) if around and draw(st.booleans()) else candidate


@settings(max_examples=100, deadline=None)
@given(candidates())
def test_byte_count_agrees_with_the_ledger_and_bounds_hold(case: tuple[SpaceBuilder, MachineProfile, Candidate]) -> None:
    space, at, candidate = case
    model, seq_len, footprint = space.model, space.workload.seq_len, space.footprint(candidate)
    graph = lower(model, candidate.policy(model), space.workload, footprint)
    validate(graph)
    memory = ledger(graph, at)
    counted = {tier: size for tier, size in space.slot_bytes(candidate).items() if size or tier is not Tier.SSD}
    assert {tier: sum(part.items.values()) for tier, part in memory.tiers.items()} == counted
    assert memory.fits == (min(space.spare(candidate).values()) >= 0)

    times = durations(model, candidate, seq_len, at, footprint)
    bounds = BoundModel(model, times)
    priced = price(graph, model, candidate, seq_len, at)
    costs = [cost.duration_ns for cost in priced]
    counted_lanes = {lane: busy for lane, busy in bounds.lanes(candidate).items() if busy}
    busy = {lane.kind: sum(costs[number] for number in queue) for lane, queue in graph.lanes.items()}
    if candidate.ssd_weights:  # how often host slots still have weights is known once a graph is lowered
        assert counted_lanes[LaneKind.SSD_READ] <= busy[LaneKind.SSD_READ]
        del counted_lanes[LaneKind.SSD_READ], busy[LaneKind.SSD_READ]
    assert counted_lanes == busy
    longest_path, _ = replay(graph, costs)
    proven = lower_bound(graph, priced, capacities(at))
    assert bounds.bound(candidate).step_ns <= max(longest_path, proven)
    assert proven <= predicted_ns(space, at, candidate)


@pytest.mark.parametrize("link, optimizer", [(10**8, 10**10), (10**10, 10**9), (10**9, 10**9)])
def test_search_agrees_with_brute_force(link: int, optimizer: int) -> None:
    at = machine(gpu_bytes=1600 * KIB, host_bytes=8 * MIB, link=link, optimizer=optimizer)
    options = {"tolerance": 0.0, "lowered_tasks": PLENTY, "simulated_tasks": PLENTY}
    space_of = builder(tiny_model(layers=3), at, Workload(seq_len=32, global_batch=2), **options)
    space = space_of.build()
    assert space.offloads
    assert 20 < len(space.fitting) < 1000
    searcher = Searcher(space_of, at)
    best = searcher.fastest(searcher.number(space.fitting), Budget(PLENTY, PLENTY))
    assert best is not None
    assert best.step_ns == min(predicted_ns(space_of, at, candidate) for candidate in space.fitting)
    record = certificate([(searcher, space)], Found(searcher, space, best))
    assert (record.unpriced, record.bound_ns) == (0, best.step_ns)
    assert record.pruned_by_bound > 0
    around = fastest(searcher, space)
    assert around is not None
    assert around.step_ns <= best.step_ns  # around the best there may be better


def test_declines_to_offload_what_fits() -> None:
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), machine())
    assert isinstance(plan, Plan)
    assert not plan.offloads
    assert all(unit.moments is Tier.GPU and unit.weights is Tier.GPU for unit in plan.policy.units)
    assert plan.ledger.tiers[Tier.HOST].items == {}


def test_forced_offload_streams_everything() -> None:
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), machine(), SearchOptions(placement="host"))
    assert isinstance(plan, Plan)
    assert plan.offloads
    assert all(unit.moments is Tier.HOST and unit.weights is Tier.HOST for unit in plan.policy.units)


def test_spends_spare_gpu_memory() -> None:
    """With a slow link and a slow CPU, what fits on the GPU goes there: more memory, shorter steps."""
    steps = []
    for gpu in (900 * KIB, 1500 * KIB, 2200 * KIB):
        plan = search(tiny_model(), Workload(seq_len=32, global_batch=2), machine(gpu_bytes=gpu, link=10**8, optimizer=10**8))
        assert isinstance(plan, Plan)
        steps.append(plan.prediction.record.step_ns)
    assert steps[0] > steps[1] > steps[2]


def test_moments_of_8_bits_leave_room_for_more_state() -> None:
    found = []
    for state in ("exact", "lean"):
        at = machine(gpu_bytes=2200 * KIB, link=10**8, optimizer=10**8)
        plan = search(tiny_model(), Workload(seq_len=32, global_batch=2), at, SearchOptions(state=state))
        assert isinstance(plan, Plan)
        assert plan.policy.state == state
        found.append(plan)
    exact, lossy = found
    assert exact.offloads
    on_gpu = [sum(unit.moments is Tier.GPU for unit in plan.policy.units) for plan in found]
    assert on_gpu[0] < on_gpu[1]
    assert lossy.prediction.record.step_ns < exact.prediction.record.step_ns


def test_state_passes_through_the_gpu_where_the_cpu_is_slow() -> None:
    """A GPU with room for the weights and not for their state, a slow CPU, a fast link: hardly anything is left to the CPU."""
    at = machine(gpu_bytes=1800 * KIB, link=10**11, optimizer=10**8)
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=2), at)
    assert isinstance(plan, Plan)
    passing = [unit for unit in plan.policy.units if unit.passing]
    assert len(passing) >= 2
    kinds = Counter(task.operation for task in plan.graph.tasks if task.chunk is not UNSET)
    assert kinds[UPDATE_GPU] == len(passing) * plan.policy.state_chunks
    without = search(tiny_model(), Workload(seq_len=32, global_batch=2), at, SearchOptions(placement="host"))
    assert isinstance(without, Plan)
    assert plan.prediction.record.step_ns < without.prediction.record.step_ns / 100


def test_activations_wait_on_the_host_where_recomputing_costs_more() -> None:
    """A GPU too small to keep them, a host with room, a link faster than compute: nothing is left to recompute."""
    at = machine(gpu_bytes=1600 * KIB, link=10**12, optimizer=10**11)
    slow = msgspec.structs.replace(at.efficiency, gemm=flat_curve(10**9))
    at = msgspec.structs.replace(at, efficiency=slow)
    steps = {}
    for kernels in ("eager", "fused"):
        plan = search(tiny_model(), Workload(seq_len=64, global_batch=4), at, SearchOptions(kernels=kernels, micro_batch=1))
        assert isinstance(plan, Plan)
        steps[kernels] = [(unit.inner, unit.feed_forward) for unit in plan.policy.units[1:-1]]
    assert RECOMPUTED in steps["eager"]
    assert AWAY not in steps["eager"]
    assert AWAY in steps["fused"]
    assert steps["fused"].count(RECOMPUTED) < steps["eager"].count(RECOMPUTED)


@settings(max_examples=15, deadline=None)
@given(gpu=st.integers(500, 4000), host=st.integers(500, 6000), batch=st.sampled_from([1, 2, 6]))
def test_answers_are_sound(gpu: int, host: int, batch: int) -> None:
    """A plan fits and passes its own checks; where there is none, some tier lacks memory."""
    at = machine(gpu_bytes=gpu * KIB, host_bytes=host * KIB)
    answer = search(tiny_model(layers=3), Workload(seq_len=32, global_batch=batch), at, SearchOptions(simulated_tasks=1000))
    assert answer.ledger.fits == isinstance(answer, Plan)
    if isinstance(answer, Plan):
        answer.check("plan.json")
        found = answer.search
        assert found.candidates == found.pruned_by_capacity + found.pruned_by_bound + found.simulated + found.unpriced
        assert 0 < found.bound_ns <= answer.prediction.record.step_ns
    else:
        assert answer.ledger.lacking()


def test_a_small_budget_says_what_it_left_unpriced() -> None:
    at = machine(gpu_bytes=1200 * KIB, link=10**8, optimizer=10**8)
    options = SearchOptions(tolerance=0.0, lowered_tasks=1, simulated_tasks=1)
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=2), at, options)
    assert isinstance(plan, Plan)
    assert plan.search.unpriced > 0
    assert plan.search.bound_ns < plan.prediction.record.step_ns


def test_same_inputs_same_bytes() -> None:
    at = machine(gpu_bytes=1200 * KIB)
    first, second = (search(tiny_model(), Workload(seq_len=32, global_batch=4), at) for _ in range(2))
    assert msgspec.json.encode(first) == msgspec.json.encode(second)


SAME_PLAN = """
import sys
from builders import SSD, tiny_model
from test_search import machine, KIB, Workload, SearchOptions, search
import msgspec, hashlib
options = SearchOptions(pareto=True, explain=True, least_host_memory=True)
plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), machine(gpu_bytes=1200 * KIB), options)
print(hashlib.sha256(msgspec.json.encode(plan)).hexdigest())
"""


def test_same_inputs_same_bytes_in_another_process() -> None:
    tests = Path(__file__).parent
    path = os.pathsep.join(map(str, (tests.parents[1], tests.parent, tests.parent / "simulator", tests)))
    digests = [
        subprocess.run(
            [sys.executable, "-c", SAME_PLAN], capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert digests[0] == digests[1] != ""


# -- objectives, front, alternatives -------------------------------------------------------------


def test_least_host_memory_keeps_the_speed_asked_for() -> None:
    at = machine(gpu_bytes=1600 * KIB, link=10**8, optimizer=10**9)
    workload, model = Workload(seq_len=32, global_batch=4), tiny_model()
    fast = search(model, workload, at)
    assert isinstance(fast, Plan)
    taken = [fast.prediction.record.peak_bytes[Tier.HOST]]
    for percent in (99, 80, 50):
        lean = search(model, workload, at, SearchOptions(least_host_memory=True, at_least_percent=percent))
        assert isinstance(lean, Plan)
        assert lean.prediction.record.step_ns <= fast.prediction.record.step_ns * 100 / percent
        assert lean.search.bound_host_bytes <= lean.prediction.record.peak_bytes[Tier.HOST]
        taken.append(lean.prediction.record.peak_bytes[Tier.HOST])
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0]


def test_least_host_memory_agrees_with_brute_force() -> None:
    at = machine(gpu_bytes=1600 * KIB, host_bytes=8 * MIB, link=10**8, optimizer=10**9)
    space_of = builder(tiny_model(layers=3), at, Workload(seq_len=32, global_batch=2))
    fitting = space_of.build().fitting
    searcher = Searcher(space_of, at)
    numbers = searcher.number(fitting)
    best = searcher.fastest(numbers, Budget(PLENTY, PLENTY))
    assert best is not None
    for slack in (1.02, 1.3, 3.0):
        lean = searcher.leanest(numbers, Budget(PLENTY, PLENTY), best.step_ns * slack, best)
        allowed = [n for n in numbers if predicted_ns(space_of, at, searcher.candidates[n]) <= best.step_ns * slack]
        assert lean.host_bytes == min(searcher.taken_bytes(number, Tier.HOST) for number in allowed)


def test_least_host_memory_at_any_batch_is_no_more_than_at_each() -> None:
    at = machine(gpu_bytes=1600 * KIB, host_bytes=8 * MIB)
    within = {"least_host_memory": True, "at_least_percent": 40.0}
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=1), at, SearchOptions(max_tokens_per_step=32 * 8, **within))
    assert isinstance(plan, Plan)
    bar_tokens_per_s = 32 * plan.workload.global_batch * 1e9 / plan.search.slowest_ns
    used = plan.ledger.tiers[Tier.HOST].used_bytes
    for batch in plan.search.batches:
        alone = search(tiny_model(), Workload(seq_len=32, global_batch=batch), at, SearchOptions(**within))
        assert isinstance(alone, Plan)
        if alone.prediction.record.tokens_per_s >= bar_tokens_per_s:
            assert used <= alone.ledger.tiers[Tier.HOST].used_bytes, batch


def test_the_best_batch_within_a_number_of_tokens() -> None:
    at, model = machine(gpu_bytes=1200 * KIB), tiny_model()
    options = SearchOptions(max_tokens_per_step=32 * 7)
    plan = search(model, Workload(seq_len=32, global_batch=1), at, options)
    assert isinstance(plan, Plan)
    assert plan.search.batches == (7, 6, 4, 3, 1) == batches_within(32, options)
    rates = {}
    for batch in plan.search.batches:
        one = search(model, Workload(seq_len=32, global_batch=batch), at)
        rates[batch] = one.prediction.record.tokens_per_s if isinstance(one, Plan) else 0.0
    assert plan.prediction.record.tokens_per_s >= max(rates.values()) * (1 - 2 * options.tolerance)
    with pytest.raises(ValueError, match=r"fewer than one sequence of 32\b"):
        search(model, Workload(seq_len=32, global_batch=1), at, SearchOptions(max_tokens_per_step=31))


def test_the_front_holds_what_nothing_beats() -> None:
    at = machine(gpu_bytes=1600 * KIB, link=10**8, optimizer=10**8)
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), at, SearchOptions(pareto=True))
    assert isinstance(plan, Plan)
    front = plan.search.front
    assert 2 <= len(front) <= 12
    assert front[0].tokens_per_s == pytest.approx(plan.prediction.record.tokens_per_s)
    assert front[0].peak_bytes == {Tier.SSD: 0} | plan.prediction.record.peak_bytes
    for slow in front:
        for other in front:
            better = (
                other.tokens_per_s >= slow.tokens_per_s,
                *(other.peak_bytes[tier] <= taken for tier, taken in slow.peak_bytes.items()),
            )
            assert other == slow or not all(better)


def test_alternatives_differ_in_their_knob_and_are_no_faster() -> None:
    at = machine(gpu_bytes=1600 * KIB, link=10**8, optimizer=10**8)
    options = SearchOptions(explain=True, tolerance=0.0, gradient_dtype="fp32", lowered_tasks=PLENTY, simulated_tasks=PLENTY)
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), at, options)
    assert isinstance(plan, Plan)
    assert {"window", "micro-batches", "layers with state on the GPU"} <= {other.knob for other in plan.search.alternatives}
    for other in plan.search.alternatives:
        assert other.value != other.other_value
        assert other.proven
        assert other.tokens_per_s <= plan.prediction.record.tokens_per_s


def test_fixed_knobs_are_kept() -> None:
    at = machine(gpu_bytes=1200 * KIB)
    options = SearchOptions(micro_batch=2, gradient_dtype="bf16")
    plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), at, options)
    assert isinstance(plan, Plan)
    assert (plan.policy.micro_batch, plan.policy.micro_batches, plan.policy.gradient_dtype) == (2, 2, "bf16")
    with pytest.raises(ValueError, match=r"micro-batch 3 does not divide the global batch 4\b"):
        search(tiny_model(), Workload(seq_len=32, global_batch=4), at, SearchOptions(micro_batch=3))


def test_gradients_of_several_micro_batches_are_summed_in_fp32() -> None:
    for micro_batch, dtype in ((4, "bf16"), (1, "fp32")):
        plan = search(tiny_model(), Workload(seq_len=32, global_batch=4), machine(), SearchOptions(micro_batch=micro_batch))
        assert isinstance(plan, Plan)
        assert plan.policy.gradient_dtype == dtype


# -- does not fit ------------------------------------------------------------------------------


def test_names_the_tier_that_lacks_and_by_how_much() -> None:
    model, capacity = tiny_model(), 1_000_000
    at = machine(host_bytes=capacity)
    answer = search(model, Workload(seq_len=32, global_batch=1), at, SearchOptions(placement="host"))
    assert isinstance(answer, DoesNotFit)
    # fp32 master and moments of all units, bf16 gradients of embedding and head and of one layer slot.
    embedding, layer, head = 256 * 64, 64 * (64 + 2 * 32 + 64 + 3 * 128 + 2), 256 * 64 + 64
    need = 12 * (embedding + 4 * layer + head) + 2 * (embedding + layer + head)
    assert -answer.ledger.tiers[Tier.HOST].headroom_bytes == need - (capacity - capacity * 3 // 100)
    assert [phrase.split(" (")[0] for phrase in answer.ledger.lacking()] == ["lacks 1.3 MiB of HOST memory"]
    assert answer.bytes_needed[Tier.GPU] is None  # forced to the host, no GPU would help


@pytest.mark.parametrize("placement", ["auto", "host"])
def test_the_memory_asked_for_is_what_it_takes(placement: str) -> None:
    model, workload, options = tiny_model(), Workload(seq_len=32, global_batch=2), SearchOptions(placement=placement)  # type: ignore[arg-type]
    gpu = 900 * KIB
    answer = search(model, workload, machine(gpu_bytes=gpu, host_bytes=MIB), options)
    assert isinstance(answer, DoesNotFit)
    needed = answer.bytes_needed[Tier.HOST]
    assert needed is not None
    assert isinstance(search(model, workload, machine(gpu_bytes=gpu, host_bytes=needed), options), Plan)
    assert isinstance(search(model, workload, machine(gpu_bytes=gpu, host_bytes=needed - 3), options), DoesNotFit)


def test_a_gpu_too_small_for_one_layer_says_so() -> None:
    model, workload = tiny_model(), Workload(seq_len=32, global_batch=2)
    answer = search(model, workload, machine(gpu_bytes=100 * KIB))
    assert isinstance(answer, DoesNotFit)
    assert answer.ledger.tiers[Tier.GPU].headroom_bytes < 0
    assert answer.bytes_needed[Tier.HOST] is None
    assert answer.bytes_needed[Tier.GPU] is not None
    assert isinstance(search(model, workload, machine(gpu_bytes=answer.bytes_needed[Tier.GPU])), Plan)
    assert "rtx4090-128gib" in answer.machines


def test_a_smaller_batch_is_offered_where_it_fits() -> None:
    options = SearchOptions(placement="host")
    fits = search(tiny_model(), Workload(seq_len=32, global_batch=2), machine(gpu_bytes=900 * KIB), options)
    assert isinstance(fits, Plan)
    answer = search(tiny_model(), Workload(seq_len=32, global_batch=256), machine(gpu_bytes=900 * KIB), options)
    assert isinstance(answer, DoesNotFit)
    assert answer.global_batch is not None
    assert 2 <= answer.global_batch < 256
    smaller = Workload(seq_len=32, global_batch=answer.global_batch)
    assert isinstance(search(tiny_model(), smaller, machine(gpu_bytes=900 * KIB), options), Plan)


def test_answers_survive_the_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    answer = search(tiny_model(), Workload(seq_len=32, global_batch=2), machine(gpu_bytes=100 * KIB))
    assert isinstance(answer, DoesNotFit)
    codec.save(tmp_path / "answer.json", answer)
    assert codec.load(tmp_path / "answer.json", DoesNotFit) == answer


def test_evenly() -> None:
    assert evenly(0, 10, 3) == [0, 5, 10]
    assert evenly(2, 3, 4) == [2, 3]
    assert evenly(7, 7, 5) == [7]


def test_equal_steps_do_not_send_the_search_around_in_circles() -> None:
    """Where every layer takes as long as any, neighbours of the best are as good as it: the search must end."""
    flat = tiny_machine(
        gpu=msgspec.structs.replace(tiny_machine().gpu, memory_bytes=2 << 20),
        launches=tuple(
            LaunchCost(kind=kind, lane=LaneKind.COMPUTE, role=role, duration_ns=Spread.exact(10**7))
            for kind in COMPUTE_KINDS
            for role in UnitRole
        ),
    )
    answer = search(tiny_model(), tiny_workload(), flat)
    assert isinstance(answer, Plan)


def test_a_host_too_small_for_the_process_alone_does_not_fit() -> None:
    host = msgspec.structs.replace(tiny_machine().host, memory_bytes=1 << 20, process_bytes=1 << 30)
    assert isinstance(search(tiny_model(), tiny_workload(), tiny_machine(host=host)), DoesNotFit)


def test_divisors() -> None:
    assert divisors(1) == [1]
    assert divisors(36) == [size for size in range(1, 37) if 36 % size == 0]
    assert divisors(1_000_000_007) == [1, 1_000_000_007]
