from __future__ import annotations

import csv
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings

from builders import GB_PER_S, flat_curve, tiny_machine, tiny_model
from planner.catalogue.machines import find_machine
from planner.catalogue.models import MODELS, find_model
from planner.peers import systems as peers
from planner.peers.calibrate import Observation, calibrate, with_rates
from planner.peers.compare import compare_peers, cpu_idle_in_forward_ns, dram_bytes, price_peer, recomputed_flops
from planner.search.best import search
from simulator import capacities, price, simulate
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.graph.replay import replay
from slideplan.graph.tasks import tier_bytes
from slideplan.graph.validate import validate
from slideplan.lowering.lower import lower
from slideplan.machine.profile import Spread
from slideplan.model import UnitRole
from slideplan.placement import Tier
from slideplan.policy import Workload
from slideplan.quantities import GIB
from strategies import Case, foreign_cases

REFERENCE = Path(__file__).parents[1] / "reference"
BY_NAME = {peer.name: peer for peer in peers.PEERS}
SLIDEFORMER = BY_NAME["slideformer"]


def published() -> dict[int, tuple[float, float, float]]:
    """Batch -> step in seconds, GPU and host memory in GiB, of SlideFormer on an RTX 4090."""
    with (REFERENCE / "slideformer_qwen3_8b_rtx4090.csv").open() as file:
        return {
            int(row["batch_size"]): (
                float(row["step_time_s"]), float(row["gpu_allocated_gib"]), float(row["cpu_peak_rss_gib"]),
            )
            for row in csv.DictReader(file)
        }  # fmt: skip


def graph_of(peer: str, model, batch: int = 2, seq_len: int = 32):
    workload = Workload(seq_len=seq_len, global_batch=batch)
    policy = BY_NAME[peer].policy(model, workload)
    return lower(model, policy, workload, peers.footprint(model, policy, workload))


@pytest.mark.parametrize("peer", BY_NAME)
@pytest.mark.parametrize("layers", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("tied", [False, True])
def test_every_policy_lowers_to_a_valid_graph(peer: str, layers: int, tied: bool) -> None:
    validate(graph_of(peer, tiny_model(layers=layers, tied_embeddings=tied)))


@pytest.mark.parametrize("peer", BY_NAME)
def test_every_model_of_the_catalogue_can_be_compared(peer: str) -> None:
    for model in MODELS.values():
        validate(graph_of(peer, msgspec.structs.replace(model, layers=min(model.layers, 6))))


# The derivation in the module's docstring: bytes of host traffic per parameter, and of them for casts.
@pytest.mark.parametrize(("peer", "total", "casts"), [("slideformer", 44, 12), ("zero3-offload", 54, 6), ("megatrain", 39, 4)])
def test_traffic_per_parameter(peer: str, total: int, casts: int) -> None:
    """A little less than stated: what stays in the window at the turn-around is loaded and cast once less."""
    model = tiny_model(layers=64)
    parameters = sum(model.flat_elements(model.role(unit)) for unit in range(model.units))
    moved, cast = (count / parameters for count in dram_bytes(graph_of(peer, model)))
    once_less = 2 if peer == "zero3-offload" else 10 * 2 / 64  # bytes; the window of ZeRO-3 holds every tiny layer
    assert total - once_less <= moved <= total
    assert casts * (1 - 3 / 64) <= cast <= casts


def test_slideformer_waits_at_the_barrier_and_our_order_does_not() -> None:
    machine = tiny_machine()
    model = tiny_model(layers=8)
    found = price_peer(SLIDEFORMER, model, Workload(seq_len=32, global_batch=2), machine)
    graph = graph_of("slideformer", model)
    assert found.prediction is not None
    record = found.prediction.record
    loss = next(number for number, task in enumerate(graph.tasks) if task.kind is TaskKind.LOSS)
    idle_ns = cpu_idle_in_forward_ns(graph, record.spans, record.step_ns)
    assert idle_ns == record.spans[loss].start_ns  # all of forward
    assert any("no CPU update runs in forward" in reason for reason in found.reasons)


def test_updates_that_reach_into_the_next_forward_are_not_idle() -> None:
    model = tiny_model(layers=8)
    workload = Workload(seq_len=32, global_batch=2)
    policy = SLIDEFORMER.policy(model, workload)
    other = msgspec.structs.replace(policy.other, step_barrier=False)
    policy = msgspec.structs.replace(policy, other=other, update_order=tuple(range(model.units)), host_gradient_slots=10)
    graph = lower(model, policy, workload, peers.footprint(model, policy, workload))
    spans = price_peer(peers.Peer(name="x", what="", policy=lambda *_: policy), model, workload, tiny_machine())
    assert spans.prediction is not None
    record = spans.prediction.record
    loss = next(number for number, task in enumerate(graph.tasks) if task.kind is TaskKind.LOSS)
    assert 0 <= cpu_idle_in_forward_ns(graph, record.spans, record.step_ns) < record.spans[loss].start_ns


def test_recompute_share() -> None:
    model = tiny_model(layers=4)
    layer = 4 * (model.matmul_flops(UnitRole.LAYER, 64) + model.attention_flops(64, 32))
    assert recomputed_flops(graph_of("slideformer", model)) == layer
    assert recomputed_flops(graph_of("megatrain", model)) == layer + layer * 3 // 4  # all but a block's last run twice more


def test_what_does_not_fit_says_by_how_much() -> None:
    machine = tiny_machine()
    host = msgspec.structs.replace(machine.host, memory_bytes=1 << 20)
    found = price_peer(
        SLIDEFORMER, tiny_model(), Workload(seq_len=32, global_batch=2), msgspec.structs.replace(machine, host=host)
    )
    assert len(found.lacking) == 1
    assert found.lacking[0].startswith("lacks ")
    assert "HOST memory" in found.lacking[0]


def test_a_comparison_holds_ours_first_and_all_peers() -> None:
    machine, model = tiny_machine(), tiny_model()
    answer = search(model, Workload(seq_len=32, global_batch=2), machine)
    comparison = compare_peers(answer, machine)
    assert [contender.name for contender in comparison.contenders] == ["slideplan", *BY_NAME]
    assert comparison.ours.prediction == answer.prediction


@settings(deadline=None)
@given(foreign_cases())
def test_without_contention_the_engine_takes_the_longest_path_of_any_such_graph(case: Case) -> None:
    graph = case.graph()
    costs = price(graph, case.model, case.policy, case.workload.seq_len, tiny_machine())
    alone = [msgspec.structs.replace(cost, demand={}) for cost in costs]
    durations = [cost.duration_ns for cost in costs]
    assert simulate(graph, alone, {}) == replay(graph, durations)
    contended_ns, _ = simulate(graph, costs, capacities(tiny_machine()))
    assert contended_ns >= replay(graph, durations)[0]


class TestRtx4090:
    """Two rows calibrated on, five predicted: the bounds that the project states."""

    @pytest.fixture(scope="class")
    @classmethod
    def predicted(cls) -> dict[int, tuple[float, float, float]]:
        model, rows = find_model("qwen3-8b"), published()
        observed = [
            Observation(
                workload=Workload(seq_len=1024, global_batch=batch),
                step_ns=round(rows[batch][0] * 1e9),
                host_bytes=round(rows[batch][2] * GIB),
            )
            for batch in (1, 32)
        ]
        machine = calibrate(find_machine("rtx4090-2tib"), SLIDEFORMER, model, *observed).machine
        found = {}
        for batch in rows:
            contender = price_peer(SLIDEFORMER, model, Workload(seq_len=1024, global_batch=batch), machine)
            assert contender.prediction is not None
            gpu, host = (contender.ledger.tiers[tier] for tier in (Tier.GPU, Tier.HOST))
            found[batch] = (
                contender.prediction.record.step_ns / 1e9, (gpu.used_bytes - gpu.fixed_bytes) / GIB, host.used_bytes / GIB,
            )  # fmt: skip
        return found

    @pytest.mark.parametrize(("column", "bound"), [(0, 0.05), (1, 0.03), (2, 0.03)])
    def test_rows_that_were_not_calibrated_on(self, predicted, column: int, bound: float) -> None:
        for batch, measured in published().items():
            assert predicted[batch][column] == pytest.approx(measured[column], rel=bound), batch

    def test_rows_that_were_calibrated_on(self, predicted) -> None:
        for batch in (1, 32):
            assert predicted[batch][0] == pytest.approx(published()[batch][0], rel=0.001)


def test_slideformers_memory_on_the_h100_is_that_of_its_policy() -> None:
    machine = find_machine("h100-80gb-125gib")
    with (REFERENCE / "peers_h100.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["system"] == "slideformer"]
    assert len(rows) == 2
    for row in rows:
        graph = graph_of("slideformer", find_model(row["model"]), int(row["batch"]), int(row["seq"]))
        assert tier_bytes(graph.pools, Tier.GPU) / GIB == pytest.approx(float(row["gpu_alloc_gib"]), rel=0.03)
        host_bytes = tier_bytes(graph.pools, Tier.HOST) + machine.host.process_bytes
        assert host_bytes / GIB == pytest.approx(float(row["host_used_gib"]), rel=0.03)


def test_with_rates_scales_compute_and_keeps_drams_ratio() -> None:
    measured = msgspec.structs.replace(tiny_machine().optimizer, host_by_bytes=flat_curve(7 * GB_PER_S))
    machine = with_rates(tiny_machine(optimizer=measured), 60 * GB_PER_S, 2.0)
    assert machine.optimizer.host_by_bytes is None  # which would be asked first
    assert machine.optimizer.host_bytes_per_s == Spread.exact(60 * GB_PER_S)
    assert machine.host.dram_bytes_per_s == 80 * GB_PER_S
    assert machine.efficiency.attention_flops_per_s == 100 * 10**12


def test_steps_that_no_constant_explains_are_refused() -> None:
    model = tiny_model()
    impossible = Observation(workload=Workload(seq_len=32, global_batch=2), step_ns=1, host_bytes=GIB)
    with pytest.raises(ValueError, match="no CPU pass rate between"):
        calibrate(tiny_machine(), SLIDEFORMER, model, impossible, impossible)


def test_slideformer_keeps_two_units_of_the_largest_module_on_the_gpu() -> None:
    model = find_model("qwen3-8b")
    graph = graph_of("slideformer", model, 1, 1024)
    vocabulary = model.flat_elements(UnitRole.HEAD)
    assert graph.pool["gpu.weights.window"].total_bytes == graph.pool["gpu.gradient.window"].total_bytes == 2 * 2 * vocabulary
    assert graph.pool["host.staging"].total_bytes == graph.pool["host.gradient.window"].total_bytes == 2 * GIB
    assert graph.queue(LaneKind.COPY)
