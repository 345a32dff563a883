from __future__ import annotations

import msgspec
import pytest
from hypothesis import given

from builders import GB_PER_S, flat_curve, tiny_machine, tiny_model, tiny_policy, tiny_workload
from slideplan.graph.tasks import SlotPool, TaskGraph, tier_bytes
from slideplan.graph.validate import validate
from slideplan.ledger import ledger, slot_capacities, slot_capacity
from slideplan.lowering.lower import lower
from slideplan.machine.profile import MachineProfile, SsdProfile
from slideplan.model import UnitRole
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.quantities import GIB
from strategies import FOOTPRINT, Case, cases


def machine_with(gpu_bytes: int, context_bytes: int = 0):
    gpu = msgspec.structs.replace(tiny_machine().gpu, memory_bytes=gpu_bytes, context_bytes=context_bytes)
    return tiny_machine(gpu=gpu)


def pool(name: str, tensor_class: TensorClass, slot_bytes: int, count: int, tier: Tier = Tier.GPU) -> SlotPool:
    return SlotPool(name=name, tier=tier, tensor_class=tensor_class, slot_bytes=slot_bytes, count=count)


GRAPH = TaskGraph(
    pools=(
        pool("a", TensorClass.WEIGHTS, 100, 3),
        pool("b", TensorClass.WEIGHTS, 50, 1),
        pool("c", TensorClass.GRADIENT, 20, 2),
        pool("d", TensorClass.MOMENTS, 1000, 4, Tier.HOST),
    ),
    tasks=(),
)


def test_sums_per_tensor_class_and_tier():
    found = ledger(GRAPH, machine_with(1000, context_bytes=7))
    gpu = found.tiers[Tier.GPU]
    assert gpu.items == {TensorClass.WEIGHTS: 350, TensorClass.GRADIENT: 40}
    assert (gpu.used_bytes, gpu.reserve_bytes, gpu.headroom_bytes) == (397, 30, 573)
    assert found.tiers[Tier.HOST].items == {TensorClass.MOMENTS: 4000}
    assert found.peak_bytes() == {Tier.GPU: 397, Tier.HOST: 4000}
    assert found.fits
    assert found.lacking() == []


def test_a_tier_too_small_is_named_with_what_it_lacks():
    found = ledger(GRAPH, machine_with(400, context_bytes=7))
    assert not found.fits
    assert found.lacking() == ["lacks 9 B of GPU memory (needs 409 B, has 400 B)"]


def test_slot_capacity_is_what_headroom_leaves():
    machine = machine_with(1000, context_bytes=100)
    assert slot_capacity(machine, Tier.GPU) == 870
    assert slot_capacity(machine_with(50, context_bytes=100), Tier.GPU) == -51


def with_drive(capacity_bytes: int) -> MachineProfile:
    curve = flat_curve(GB_PER_S)
    ssd = SsdProfile(path="/", capacity_bytes=capacity_bytes, read=curve, write=curve, duplex_bytes_per_s=GB_PER_S)
    return tiny_machine(ssd=ssd)


def on_a_drive(slots: int, slot_bytes: int = 1000) -> TaskGraph:
    """A graph that fits on the machine, but for slots on a drive."""
    model = tiny_model()
    graph = lower(model, tiny_policy(model), tiny_workload(), FOOTPRINT)
    drive = pool("ssd.moments.layer", TensorClass.MOMENTS, slot_bytes, slots, Tier.SSD)
    return TaskGraph(pools=(*graph.pools, drive), tasks=graph.tasks)


@pytest.mark.parametrize(
    ("machine", "lacking"),
    [
        (tiny_machine(), "lacks 10.0 KiB of SSD memory (needs 10.0 KiB, has 0 B)"),
        (with_drive(10 * 1024), "lacks 307 B of SSD memory (needs 10.3 KiB, has 10.0 KiB)"),
    ],
    ids=["no drive", "a drive too small"],
)
def test_what_does_not_fit_on_the_drive_does_not_fit(machine: MachineProfile, lacking: str):
    found = ledger(on_a_drive(10, 1024), machine)
    assert not found.fits
    assert found.lacking() == [lacking]
    assert found.tiers[Tier.GPU].headroom_bytes > 0
    assert found.tiers[Tier.HOST].headroom_bytes > 0


def test_a_drive_counts_where_a_graph_uses_it():
    graph = on_a_drive(9)
    found = ledger(graph, with_drive(10_000))
    assert found.fits
    ssd = found.tiers[Tier.SSD]
    assert ssd.items == {TensorClass.MOMENTS: 9000}
    assert (ssd.used_bytes, ssd.fixed_bytes, ssd.reserve_bytes, ssd.headroom_bytes) == (9000, 0, 300, 700)
    assert found.peak_bytes() == {tier: tier_bytes(graph.pools, tier) for tier in Tier}
    assert not ledger(on_a_drive(10), with_drive(10_000)).fits
    without = TaskGraph(pools=graph.pools[:-1], tasks=graph.tasks)
    assert set(ledger(without, with_drive(10_000)).tiers) == {Tier.GPU, Tier.HOST}
    assert Tier.SSD not in ledger(without, tiny_machine()).peak_bytes()


def test_slots_may_lie_on_a_drive_where_there_is_one():
    assert slot_capacities(tiny_machine())[Tier.SSD] == 0
    with pytest.raises(ValueError, match=r"of ssd memory, 0 B are there: lacks"):
        validate(on_a_drive(1), slot_capacities(tiny_machine()))
    assert slot_capacities(with_drive(10_000))[Tier.SSD] == slot_capacity(with_drive(10_000), Tier.SSD) == 9700
    validate(on_a_drive(9), slot_capacities(with_drive(10_000)))
    with pytest.raises(ValueError, match=r"needs 9\.8 KiB of ssd memory, 9\.5 KiB are there: lacks 300 B"):
        validate(on_a_drive(10), slot_capacities(with_drive(10_000)))


@given(cases())
def test_ledger_adds_up_to_the_pools(case: Case):
    graph = case.graph()
    found = ledger(graph, machine_with(GIB))
    for tier in (Tier.GPU, Tier.HOST):
        assert sum(found.tiers[tier].items.values()) == tier_bytes(graph.pools, tier)
        fits = tier_bytes(graph.pools, tier) <= slot_capacity(machine_with(GIB), tier)
        assert fits == (found.tiers[tier].headroom_bytes >= 0)


@given(cases())
def test_state_bytes_are_twelve_per_element_wherever_they_lie(case: Case):
    """Remainder and moments 10, and 2 of bf16 weights on the tier that updates them; moments in bf16 4 fewer, lean state 8.

    State that passes through another tier is cut into chunks of whole blocks, and has slots there as well.
    """
    model, policy = case.model, case.policy
    items = {tier: {p.name: p.total_bytes for p in case.graph().pools if p.tier is tier} for tier in Tier}

    def size(tensor: TensorClass, elements: int, pages: bool = False) -> int:
        eight_bit = 2 * elements + 8 * -(-elements // 256)
        found = {"exact": 8 * elements, "bf16-moments": 4 * elements, "lean": eight_bit}[policy.state]
        if tensor is TensorClass.REMAINDER:
            found = 0 if policy.state == "lean" else 2 * elements
        return -(-found // 4096) * 4096 if pages else found

    layer = model.flat_elements(UnitRole.LAYER)
    blocks = {Tier.GPU: (policy.state_chunks, 256), Tier.HOST: (policy.ssd_chunks, 2048)}
    chunk = {update: -(-layer // (block * chunks)) * block for update, (chunks, block) in blocks.items() if chunks}
    slots = {Tier.GPU: policy.state_slots, Tier.HOST: policy.ssd_slots}
    expected = dict.fromkeys(Tier, 0)
    shared, far = set(), {}
    for unit, placement in enumerate(policy.units):
        elements, update = model.flat_elements(model.role(unit)), placement.update
        for tensor in STATE:
            (tier,) = placement.tiers(tensor)
            if tensor in policy.passing(unit):
                shared.add((tensor, update))
                each = size(tensor, chunk[update], tier is Tier.SSD)
                if (tier, update) == (Tier.SSD, Tier.GPU):
                    far[tensor] = policy.host_state_slots * each
                expected[tier] += -(-elements // chunk[update]) * each
            else:
                expected[tier] += size(tensor, elements, tier is Tier.SSD)
    for tensor, update in shared:
        expected[update] += slots[update] * size(tensor, chunk[update], update is Tier.HOST)
    expected[Tier.HOST] += sum(far.values())
    for tier, pools in items.items():
        assert sum(taken for name, taken in pools.items() if ".moments." in name or ".remainder." in name) == expected[tier]
    weights = {
        tier: sum(taken for name, taken in items.get(tier, {}).items() if ".weights." in name) for tier in (Tier.HOST, Tier.SSD)
    }
    hosted = [unit for unit, placement in enumerate(policy.units) if placement.update is Tier.HOST]
    away = [unit for unit in hosted if policy.units[unit].weights is Tier.SSD]
    there = [model.role(unit) for unit in hosted if unit not in away]
    page = 4096
    slot = -(-2 * model.flat_elements(UnitRole.LAYER) // page) * page  # passed on to a drive, or lying there
    assert weights[Tier.HOST] == 2 * sum(map(model.flat_elements, there)) + policy.host_weight_slots * slot
    assert weights[Tier.SSD] == len(away) * slot
