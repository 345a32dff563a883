"""Random policies and the runs of a campaign."""

from __future__ import annotations

from collections import Counter
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders import SSD, tiny_machine, tiny_model
from campaign_draw import DRIVE_STEP_S, draw_entries, draw_policy, entry_plan, fixed_plan, waiting_gradients
from planner.catalogue.machines import with_budget
from simulator import footprint
from slideplan.graph.validate import validate
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.profile import MachineProfile
from slideplan.placement import Tier
from slideplan.policy import Policy, Workload
from slideplan.quantities import GIB, KIB

MODEL = tiny_model(layers=6)
WORKLOAD = Workload(seq_len=32, global_batch=8)


def tight_machine() -> MachineProfile:
    """Holds about half of what the greediest policies take of the GPU."""
    return with_budget(tiny_machine(), 4500 * KIB, 6000 * KIB)


def draws(count: int, machine: MachineProfile) -> list[Policy]:
    found = [draw_policy(MODEL, WORKLOAD, machine, Random(f"draw/{number}")) for number in range(count)]
    assert None not in found
    return [policy for policy in found if policy is not None]


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 6),
    tied=st.booleans(),
    batch=st.sampled_from([1, 2, 6, 16]),
    gpu_kib=st.integers(1000, 8000),
    host_kib=st.integers(1000, 12000),
    seed=st.integers(0, 10**6),
)
def test_what_is_drawn_fits_and_is_safe(layers: int, tied: bool, batch: int, gpu_kib: int, host_kib: int, seed: int) -> None:
    model, workload = tiny_model(layers=layers, tied_embeddings=tied), Workload(seq_len=32, global_batch=batch)
    machine = with_budget(tiny_machine(), gpu_kib * KIB, host_kib * KIB)
    policy = draw_policy(model, workload, machine, Random(seed))
    if policy is None:
        return
    graph = lower(model, policy, workload, footprint(model, policy, workload.seq_len, machine))
    validate(graph)
    assert ledger(graph, machine).fits
    plan = fixed_plan(model, policy, workload, machine)
    plan.check("drawn")
    assert plan.prediction.record.step_ns > 0


def test_every_knob_takes_its_values_in_200_draws() -> None:
    policies = draws(200, tight_machine())
    layers = range(1, MODEL.head_unit)
    seen: dict[str, set[object]] = {
        "micro_batches": {policy.micro_batches for policy in policies},
        "window": {policy.window for policy in policies},
        "prefetch_depth": {policy.prefetch_depth for policy in policies},
        "gradient_slots": {policy.gradient_slots for policy in policies},
        "gradient_dtype": {policy.gradient_dtype for policy in policies},
        "host_gradient_slots": {policy.host_gradient_slots for policy in policies},
        "boundary_slots": {policy.boundary_slots - policy.micro_batches for policy in policies if policy.boundary_slots},
        "boundaries": {sum(unit.boundary is Tier.HOST for unit in policy.units) for policy in policies},
        "kept": {sum(unit.feed_forward is Tier.GPU for unit in policy.units) for policy in policies},
        "state": {sum(policy.units[unit].moments is Tier.GPU for unit in layers) for policy in policies},
        "weights": {
            sum(policy.units[unit].weights is Tier.GPU and policy.units[unit].moments is Tier.HOST for unit in layers)
            for policy in policies
        },
        "embedding": {policy.units[0].moments for policy in policies},
        "head": {policy.units[-1].moments for policy in policies},
    }
    assert seen["micro_batches"] == {1, 2, 4, 8}
    assert seen["gradient_slots"] == {1, 2, 3}
    assert seen["gradient_dtype"] == {"bf16", "fp32"}
    assert seen["boundary_slots"] == {1, 2, 3, 4}
    assert seen["boundaries"] == set(range(MODEL.layers + 1))
    assert seen["embedding"] == seen["head"] == {Tier.GPU, Tier.HOST}
    assert {0, 2, 3, 4} <= seen["window"]
    assert {1, 2, 3} <= seen["prefetch_depth"]
    for knob in ("kept", "state", "weights", "host_gradient_slots"):
        assert len(seen[knob]) >= 4, knob
    orders = Counter(_order(policy.update_order) for policy in policies if len(policy.update_order) > 2)
    assert min(orders[kind] for kind in ("arrival", "need", "mixed")) >= 5


def _order(order: tuple[int, ...]) -> str:
    if list(order) == sorted(order):
        return "need"
    return "arrival" if list(order) == sorted(order, reverse=True) else "mixed"


def test_with_a_drive_every_policy_has_some_state_there_and_no_more_than_is_worth_measuring() -> None:
    machine = msgspec.structs.replace(tight_machine(), ssd=SSD)
    seen = set()
    for number in range(40):
        policy = draw_policy(MODEL, WORKLOAD, machine, Random(f"drive/{number}"), drive=True)
        assert policy is not None
        graph = lower(MODEL, policy, WORKLOAD, footprint(MODEL, policy, WORKLOAD.seq_len, machine))
        validate(graph)
        moved = sum(task.bytes_moved for task in graph.tasks if Tier.SSD in (task.operation.source, task.operation.target))
        assert 0 < moved < DRIVE_STEP_S * SSD.duplex_bytes_per_s
        seen |= {(unit.remainder, unit.moments) for unit in policy.units} | {policy.ssd_slots}
    assert {(Tier.HOST, Tier.SSD), (Tier.SSD, Tier.SSD)} | set(range(1, 7)) <= seen


def test_draws_depend_on_the_seed_alone() -> None:
    assert draws(20, tight_machine()) == draws(20, tight_machine())
    assert len(set(draws(20, tight_machine()))) > 15


def test_nothing_is_drawn_where_nothing_fits() -> None:
    assert draw_policy(MODEL, WORKLOAD, with_budget(tiny_machine(), 100 * KIB, None), Random(0)) is None


@pytest.mark.parametrize(
    ("order", "most"),
    [((5, 4, 3, 2, 1, 0), 1), ((0, 1, 2, 3, 4, 5), 4), ((5, 4, 0, 1, 2, 3), 3), ((4, 2), 1), ((2, 4), 2), ((0, 5), 0), ((), 0)],
)
def test_waiting_gradients(order: tuple[int, ...], most: int) -> None:
    assert waiting_gradients(tiny_model(), order) == most  # layers 1 to 4, head 5


# -- runs --------------------------------------------------------------------------------------

ARGUMENTS = (("tiny", "tiny-qwen3"), (32, 64, 128), (1, 2, 4, 8), (None, 4 << 20), 4, 3, 7)


def test_entries_are_spread_interleaved_and_deterministic() -> None:
    entries = draw_entries(tiny_machine(), *ARGUMENTS)
    assert entries == draw_entries(tiny_machine(), *ARGUMENTS)
    assert [entry.choice for entry in entries] == ["random"] * 4 + ["planned"] * 4 + ["random"] * 4
    assert [entry.configuration.model for entry in entries] == ["tiny", "tiny-qwen3"] * 6
    assert entries[0].configuration == entries[4].configuration == entries[8].configuration
    assert len({entry.name for entry in entries}) == 12
    workloads = [entry.configuration.workload for entry in entries[:4]]
    assert {workload.global_batch for workload in workloads} == {1, 2, 4, 8}
    assert {workload.seq_len for workload in workloads} == {32, 64, 128}
    assert Counter(entry.configuration.gpu_memory_bytes for entry in entries[:4]) == {None: 2, 4 << 20: 2}


def test_a_plan_made_again_is_the_one_predicted() -> None:
    machine = tiny_machine()
    for entry in draw_entries(machine, *ARGUMENTS)[2:6]:
        plan = entry_plan(entry, machine)
        assert plan.prediction.record.step_ns == entry.predicted_ns
        assert plan.policy == entry.policy
        assert plan.ledger.tiers[Tier.GPU].capacity_bytes == (entry.configuration.gpu_memory_bytes or GIB)


def test_too_few_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="tiny: fewer configurations fit on tiny than were asked for"):
        draw_entries(tiny_machine(), ("tiny",), (32,), (1, 2), (None,), 3, 1, 0)
