"""What saves cost: bytes by hand, lanes that empty by hand-made graphs, and what room and a drive are worth."""

from __future__ import annotations

from math import prod

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import GB_PER_S, SSD, flat_curve, tiny_machine, tiny_model, tiny_policy, tiny_workload
from handmade import cost, graph
from random_graphs import CAPACITIES, handoffs, priced_graphs, tied
from simulator import Resource, footprint, lower_bound, predict, simulate
from simulator.engine import FastEngine
from simulator.reference import SimPyEngine
from simulator.saves import drain_ns, slowed_by_writing
from slideplan.graph.lanes import LaneKind
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower
from slideplan.machine.handoffs import Handoffs
from slideplan.machine.profile import MachineProfile, OptimizerProfile, Spread
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import Policy
from slideplan.quantities import MIB
from slideplan.saving import (
    COPIER_BYTES_PER_S,
    LEAST_STAGING_BYTES,
    MOST_COPIERS,
    SaveCost,
    checkpoint_bytes,
    staging_bytes,
    unit_optimizer_bytes,
    weights_bytes,
)

COMPUTE, H2D, D2H, UPDATE = LaneKind.COMPUTE, LaneKind.H2D, LaneKind.D2H, LaneKind.HOST_UPDATE
ENGINES = (FastEngine, SimPyEngine)


def predicted(model: ModelSpec, policy: Policy, machine: MachineProfile) -> SaveCost:
    lowered = lower(model, policy, tiny_workload(), footprint(model, policy, 32, machine))
    found = predict(lowered, model, policy, tiny_workload(), machine, ledger(lowered, machine)).save
    assert found is not None
    return found


class TestBytes:
    def test_of_a_checkpoint_are_the_sum_over_its_tensors(self) -> None:
        """By hand, untied: parameters in bf16; remainder and moments of buffers whose parameters begin at multiples of 64."""
        model = tiny_model(hidden=10, head_dim=6, heads=2, kv_heads=1, ffn=15, vocabulary=33, layers=2)
        layer = [(12, 10), (6, 10), (6, 10), (10, 12), (15, 10), (15, 10), (10, 15), (10,), (10,)]
        flat = 128 + 64 + 64 + 128 + 192 + 192 + 192 + 64 + 64
        weights = 2 * (2 * sum(map(prod, layer)) + 33 * 10 + 10 + 33 * 10)
        assert weights_bytes(model) == weights == 2 * model.parameter_count
        assert checkpoint_bytes(model, tiny_policy(model)) == weights + 10 * (2 * flat + 384 + 64 + 384)

    def test_of_tied_weights_count_once(self) -> None:
        model = tiny_model(hidden=10, head_dim=6, heads=2, kv_heads=1, ffn=15, vocabulary=33, layers=2)
        tied_model = msgspec.structs.replace(model, tied_embeddings=True)
        assert weights_bytes(model) - weights_bytes(tied_model) == 2 * 33 * 10
        found = [checkpoint_bytes(each, tiny_policy(each)) for each in (model, tied_model)]
        assert found[0] - found[1] == 2 * 33 * 10 + 10 * 384

    def test_of_moments_are_those_that_the_policy_keeps(self) -> None:
        """Of lean state in 8 bits with two scales for every 256 elements, and no remainder, wherever it lies."""
        model = tiny_model()
        layer, vocabulary = 36_992, 64 * 256
        exact = checkpoint_bytes(model, tiny_policy(model))
        assert exact == 2 * model.parameter_count + 10 * (4 * layer + vocabulary + 64 + vocabulary)
        lean = tiny_policy(model, resident_state=(0, 1), stream_state=(2,), state="lean")
        elements = 4 * layer + 2 * vocabulary + 64
        saved = 8 * elements - 8 * (4 * 145 + 2 * vocabulary // 256 + 1)
        assert layer > 144 * 256  # the last of 145 blocks is not full
        assert checkpoint_bytes(model, lean) == exact - saved

    def test_of_a_checkpoint_are_those_of_the_pools_that_hold_it(self) -> None:
        model = tiny_model()
        for policy in (tiny_policy(model), tiny_policy(model, resident_state=(0, 1), state="lean")):
            machine = tiny_machine()
            lowered = lower(model, policy, tiny_workload(), footprint(model, policy, 32, machine))
            state = ("remainder", "moments")
            held = sum(pool.total_bytes for pool in lowered.pools if pool.name.split(".")[1] in state)
            assert checkpoint_bytes(model, policy) == weights_bytes(model) + held


class TestRing:
    def test_takes_what_the_ledger_leaves_on_the_host(self) -> None:
        model, policy = tiny_model(), tiny_policy(tiny_model())
        lowered = lower(model, policy, tiny_workload(), footprint(model, policy, 32, tiny_machine()))
        taken = ledger(lowered, tiny_machine()).tiers[Tier.HOST].used_bytes
        room = 100 * MIB
        capacity = -(-(taken + room) * 100 // 97)
        host = msgspec.structs.replace(tiny_machine().host, memory_bytes=capacity)
        memory = ledger(lowered, tiny_machine(host=host))
        assert 0 <= staging_bytes(memory, 10**12) - room < 2
        assert staging_bytes(memory, 80 * MIB) == 80 * MIB  # no more than there is to save
        assert staging_bytes(memory, 1000) == LEAST_STAGING_BYTES == 64 * MIB

    def test_is_never_without_a_few_blocks(self) -> None:
        model, policy = tiny_model(), tiny_policy(tiny_model())
        host = msgspec.structs.replace(tiny_machine().host, memory_bytes=2 * MIB)
        machine = tiny_machine(host=host)
        lowered = lower(model, policy, tiny_workload(), footprint(model, policy, 32, machine))
        assert staging_bytes(ledger(lowered, machine), 10**12) == LEAST_STAGING_BYTES


class TestDrain:
    def test_of_steps_that_do_not_overlap_is_nothing(self) -> None:
        chain = graph((H2D, (), (2,)), (COMPUTE, (0,), ()), (UPDATE, (1,), ()))
        costs = [cost(10), cost(20), cost(30)]
        step_ns, _ = simulate(chain, costs, {})
        assert step_ns == 60
        assert drain_ns(chain, costs, {}, step_ns) == 0

    def test_of_a_deferred_update_is_its_tail(self) -> None:
        """The update of 70 runs beside the next step's compute of 100; after the last step it runs alone."""
        deferred = graph((COMPUTE, (), ()), (UPDATE, (0,), ()))
        costs = [cost(100), cost(70)]
        assert simulate(deferred, costs, {})[0] == 100
        assert drain_ns(deferred, costs, {}, 100) == 70

    def test_of_a_prefetched_load_is_its_lead(self) -> None:
        """The first load of 30 has no compute of a step before to hide behind."""
        prefetched = graph((H2D, (), ()), (COMPUTE, (0,), ()))
        costs = [cost(30), cost(100)]
        assert simulate(prefetched, costs, {})[0] == 100
        assert drain_ns(prefetched, costs, {}, 100) == 30

    def test_lead_hand_overs_and_tail_add_up(self) -> None:
        """A load of 30, compute of 100, an update of 70, and 5 and 9 until the next lane goes on."""
        whole = graph((H2D, (), ()), (COMPUTE, (0,), ()), (UPDATE, (1,), ()))
        costs = [cost(30), cost(100), cost(70)]
        between = Handoffs(device_to_device_ns=5, device_to_host_ns=9, host_to_device_ns=0)
        assert drain_ns(whole, costs, {}, 100, between) == 30 + 5 + 9 + 70

    def test_contention_is_in_it(self) -> None:
        """Copies both ways take 40 each on a link of their own, and 80 on one that they share."""
        both = graph((COMPUTE, (), ()), (H2D, (0,), ()), (D2H, (0,), ()))
        costs = [cost(100), cost(40, {Resource.PCIE: 100}), cost(40, {Resource.PCIE: 100})]
        shared = {Resource.PCIE: 100}
        assert simulate(both, costs, shared)[0] == 100
        assert drain_ns(both, costs, shared, 100) == 80
        assert drain_ns(both, costs, {Resource.PCIE: 200}, 100) == 40

    @given(priced_graphs(contended=True), handoffs)
    def test_the_simpy_model_finds_the_same(self, priced, between) -> None:
        drawn, costs = tied(priced[0]), priced[1]
        step_ns = lower_bound(drawn, costs, CAPACITIES, between)
        found = drain_ns(drawn, costs, CAPACITIES, step_ns, between)
        assert found == drain_ns(drawn, costs, CAPACITIES, step_ns, between, engine=SimPyEngine)


class TestSlowing:
    def machine(self, dram: int) -> MachineProfile:
        host = msgspec.structs.replace(tiny_machine().host, dram_bytes_per_s=dram)
        return tiny_machine(host=host, ssd=SSD)

    def test_a_step_that_waits_for_host_memory_is_slowed_by_the_share_that_the_drive_takes(self) -> None:
        """An update of 30 GB/s and writes of 2 GB/s on 30 GB/s of memory: both run at 30/32 of their speed."""
        bound = graph((COMPUTE, (), (1,)), (UPDATE, (0,), ()))
        costs = [cost(0), cost(10**6, {Resource.HOST_DRAM: 30 * GB_PER_S})]
        found = slowed_by_writing(bound, costs, self.machine(30 * GB_PER_S), 2 * GB_PER_S, 10**6)
        assert found == pytest.approx(2 / 32, abs=1e-5)
        assert slowed_by_writing(bound, costs, self.machine(32 * GB_PER_S), 2 * GB_PER_S, 10**6) == 0

    def test_a_step_that_computes_is_not(self) -> None:
        computes = graph((COMPUTE, (), ()), (UPDATE, (0,), ()))
        costs = [cost(10**6), cost(10**5, {Resource.HOST_DRAM: 30 * GB_PER_S})]
        assert slowed_by_writing(computes, costs, self.machine(30 * GB_PER_S), 2 * GB_PER_S, 10**6) == 0

    def test_the_simpy_model_finds_the_same(self) -> None:
        mixed = graph((COMPUTE, (), (3,)), (H2D, (), (0,)), (COMPUTE, (1,), ()), (UPDATE, (2,), ()))
        copied = {Resource.PCIE: 10 * GB_PER_S, Resource.HOST_DRAM: 10 * GB_PER_S}
        costs = [cost(100_000), cost(60_000, copied), cost(90_000), cost(200_000, {Resource.HOST_DRAM: 30 * GB_PER_S})]
        machine = self.machine(31 * GB_PER_S)
        step_ns, _ = simulate(mixed, costs, {Resource.PCIE: 16 * GB_PER_S, Resource.HOST_DRAM: 31 * GB_PER_S})
        found = [slowed_by_writing(mixed, costs, machine, 2 * GB_PER_S, step_ns, engine) for engine in ENGINES]
        assert found[0] == found[1] > 0


class TestPrice:
    save = SaveCost(
        checkpoint_bytes=120_000,
        weights_bytes=20_000,
        staging_bytes=30_000,
        drain_ns=500,
        copy_bytes_per_s=10**9,
        write_bytes_per_s=10**8,
        slowed=0.25,
    )

    def test_what_does_not_fit_into_the_ring_is_waited_for(self) -> None:
        assert self.save.write_ns(120_000) == 1_200_000
        assert self.save.pause_ns(120_000) == 500 + 900_000
        assert self.save.pause_ns(20_000) == 500 + 20_000  # all of it is copied aside

    def test_what_is_left_slows_training_while_it_is_written(self) -> None:
        assert self.save.added(120_000, 100, 10_000) == pytest.approx((500 + 900_000 + 0.25 * 300_000) / 10**6)
        assert self.save.added(20_000, 100, 10_000) == pytest.approx((500 + 20_000 + 0.25 * 180_000) / 10**6)

    def test_a_save_that_the_next_one_waits_for_costs_all_its_time(self) -> None:
        """Ten steps of 10,000 are done before the 300,000 that the rest takes to be written: training waits."""
        assert self.save.added(120_000, 10, 10_000) == pytest.approx((500 + 900_000 + 300_000 - 100_000) / 100_000)
        # In 300,000 at three quarters of its speed training does 225,000: just then the two agree.
        assert self.save.added(120_000, 225, 1_000) == pytest.approx((500 + 900_000 + 75_000) / 225_000)

    def test_a_drive_faster_than_copies_leaves_nothing_to_write(self) -> None:
        fast = msgspec.structs.replace(self.save, write_bytes_per_s=10**10)
        assert fast.pause_ns(120_000) == 500 + 120_000
        assert fast.added(120_000, 100, 10_000) == pytest.approx(120_500 / 10**6)

    @given(
        size=st.integers(0, 200_000),
        rooms=st.tuples(st.integers(0, 200_000), st.integers(0, 200_000)).map(sorted),
        copied=st.sampled_from([10**7, 10**8, 10**9]),
        slowed=st.sampled_from([0.0, 0.1, 0.9]),
        every=st.integers(1, 300),
    )
    def test_more_room_never_costs_more(self, size: int, rooms: list[int], copied: int, slowed: float, every: int) -> None:
        tight, roomy = (
            msgspec.structs.replace(self.save, staging_bytes=room, copy_bytes_per_s=copied, slowed=slowed) for room in rooms
        )
        assert roomy.pause_ns(size) <= tight.pause_ns(size)
        assert roomy.added(size, every, 10_000) <= tight.added(size, every, 10_000) + 1e-12

    def test_more_steps_between_saves_never_cost_more(self) -> None:
        found = [self.save.added(120_000, every, 10_000) for every in range(1, 300)]
        assert found == sorted(found, reverse=True)

    def test_without_a_drive_nothing_is_said(self) -> None:
        unknown = msgspec.structs.replace(self.save, write_bytes_per_s=None, slowed=0.0)
        assert (unknown.write_ns(1), unknown.pause_ns(1), unknown.added(1, 1, 1)) == (None, None, None)

    @pytest.mark.parametrize("every", [0, -1])
    def test_saves_are_at_least_a_step_apart(self, every: int) -> None:
        with pytest.raises(ValueError, match=f"save_every is {every}, must be at least 1"):
            self.save.added(1, every, 1)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("drain_ns", -1, "drain_ns is -1, must be zero or more"),
            ("staging_bytes", -1, "staging_bytes is -1, must be zero or more"),
            ("copy_bytes_per_s", 0, "copy_bytes_per_s is 0, must be positive"),
            ("write_bytes_per_s", 0, "write_bytes_per_s is 0, must be positive"),
            ("slowed", 1.0, "slowed is 1.0, must be in 0..1 and below 1"),
            ("slowed", float("nan"), "slowed is nan, must be in 0..1 and below 1"),
        ],
    )
    def test_values_without_sense_are_refused(self, field: str, value: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SaveCost(**msgspec.structs.asdict(self.save) | {field: value})


def at_rate(bytes_per_s: int) -> OptimizerProfile:
    """The tiny machine's optimizer, at another rate."""
    return msgspec.structs.replace(tiny_machine().optimizer, host_bytes_per_s=Spread.exact(bytes_per_s))


class TestPredicted:
    def test_of_a_plan_on_a_machine_with_a_drive(self) -> None:
        """All on the host: a byte is read, written and hashed, at the optimizer's 30 GB/s."""
        model = tiny_model()
        found = predicted(model, tiny_policy(model), tiny_machine(ssd=SSD))
        assert found.checkpoint_bytes == checkpoint_bytes(model, tiny_policy(model))
        assert found.weights_bytes == weights_bytes(model)
        assert found.staging_bytes == LEAST_STAGING_BYTES  # the whole checkpoint takes less
        assert found.write_bytes_per_s == 2 * GB_PER_S
        assert found.copy_bytes_per_s == pytest.approx(10 * GB_PER_S, rel=1e-4)
        assert 0 <= found.slowed < 0.1

    def test_updates_that_run_into_the_next_step_are_drained(self) -> None:
        model = tiny_model()
        deferred = tiny_policy(model, update_order=(5, 4, 3, 0, 1, 2))
        assert (
            predicted(model, deferred, tiny_machine()).drain_ns > predicted(model, tiny_policy(model), tiny_machine()).drain_ns
        )

    def test_what_lies_on_the_gpu_is_copied_as_copies_go(self) -> None:
        model = tiny_model()
        everything = tuple(range(model.units))
        machine = tiny_machine(ssd=SSD, optimizer=at_rate(36 * GB_PER_S))
        on_gpu = predicted(model, tiny_policy(model, resident_state=everything), machine)
        assert on_gpu.copy_bytes_per_s == pytest.approx(10 * GB_PER_S, rel=1e-4)
        # State that passes through the GPU lies on the host, and the weights that it updates on the GPU.
        passing = predicted(model, tiny_policy(model, stream_state=(1, 2, 3, 4)), machine)
        assert 10 * GB_PER_S < passing.copy_bytes_per_s < 12 * GB_PER_S

    def test_threads_hash_no_faster_than_they_can(self) -> None:
        """However fast its memory is. One thread has a file to itself, so the largest file counts too."""
        model = tiny_model(vocabulary=512)
        policy = tiny_policy(model)
        sizes = [unit_optimizer_bytes(model, policy, unit) for unit in range(model.units)]
        alone = checkpoint_bytes(model, policy) / max(sizes)
        assert 4 < alone < MOST_COPIERS

        def copied(cores: int) -> int:
            host = msgspec.structs.replace(tiny_machine().host, cores=cores)
            machine = tiny_machine(ssd=SSD, optimizer=at_rate(1000 * GB_PER_S), host=host)
            return predicted(model, policy, machine).copy_bytes_per_s

        assert copied(4) == pytest.approx(4 * COPIER_BYTES_PER_S, rel=1e-3)
        assert copied(64) == pytest.approx(alone * COPIER_BYTES_PER_S, rel=1e-3)

    def test_large_blocks_say_what_the_drive_writes(self) -> None:
        points = (*flat_curve(GB_PER_S).points, *flat_curve(3 * GB_PER_S, latency_size=16 * MIB).points)
        ssd = msgspec.structs.replace(SSD, write=msgspec.structs.replace(SSD.write, points=points))
        assert predicted(tiny_model(), tiny_policy(tiny_model()), tiny_machine(ssd=ssd)).write_bytes_per_s == 3 * GB_PER_S

    def test_of_a_plan_on_a_machine_without_a_drive(self) -> None:
        found = predicted(tiny_model(), tiny_policy(tiny_model()), tiny_machine())
        assert (found.write_bytes_per_s, found.slowed) == (None, 0.0)
        assert found.pause_ns(found.checkpoint_bytes) is None
        assert found.drain_ns == predicted(tiny_model(), tiny_policy(tiny_model()), tiny_machine(ssd=SSD)).drain_ns

    def test_a_machine_that_hardly_moves_has_a_price_too(self) -> None:
        optimizer = msgspec.structs.replace(tiny_machine().optimizer, host_bytes_per_s=Spread.exact(1))
        link = msgspec.structs.replace(tiny_machine().link, d2h=flat_curve(1))
        ssd = msgspec.structs.replace(SSD, write=flat_curve(1))
        machine = tiny_machine(optimizer=optimizer, link=link, ssd=ssd)
        found = predicted(tiny_model(), tiny_policy(tiny_model()), machine)
        assert (found.copy_bytes_per_s, found.write_bytes_per_s) == (1, 1)
        assert found.added(found.checkpoint_bytes, 1, 10**9) > 0

    def test_nothing_is_said_of_other_systems(self) -> None:
        model = tiny_model()
        policy = tiny_policy(model, step_barrier=True)
        lowered = lower(model, policy, tiny_workload(), footprint(model, policy, 32, tiny_machine()))
        assert predict(lowered, model, policy, tiny_workload(), tiny_machine(), ledger(lowered, tiny_machine())).save is None
