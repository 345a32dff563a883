from __future__ import annotations

import itertools

import msgspec
import pytest

from builders import GB_PER_S, flat_curve, tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import Resource, TaskCost, capacities, footprint, price
from simulator.formulas import attention_ns, compute_ns
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import GRADIENT_KINDS, UPDATE_GPU, UPDATE_HOST, TaskKind
from slideplan.graph.tasks import TaskGraph
from slideplan.lowering.lower import lower
from slideplan.lowering.sizes import LOSS_CHUNK_BYTES, PRODUCT_BYTES, loss_chunk_tokens
from slideplan.machine.profile import ComputeCost, Curve, Efficiency, LaunchCost, LayerShape, RatePoint, Spread
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import Policy
from slideplan.quantities import MIB

LLAMA_8B = tiny_model(
    name="llama-8b",
    hidden=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    ffn=14336,
    vocabulary=128256,
    max_positions=8192,
)
# Rates of one H100: products of a layer at its sustained clock, eager element-wise passes.
H100 = Efficiency(gemm=flat_curve(740 * 10**12), attention_flops_per_s=400 * 10**12, elementwise_bytes_per_s=2400 * GB_PER_S)


def lowered(model: ModelSpec, **knobs: object) -> TaskGraph:
    return lower(model, tiny_policy(model, **knobs), tiny_workload(), Footprint(inner_bytes=MIB, workspace_bytes=MIB))


def work(micro_batch: int, **knobs: object) -> Policy:
    return tiny_policy(tiny_model(), micro_batch=micro_batch, **{"gradient_dtype": "bf16"} | knobs)


def costs_by_name(graph: TaskGraph, costs: tuple[TaskCost, ...]) -> dict[str, TaskCost]:
    return {task.name: cost for task, cost in zip(graph.tasks, costs, strict=True)}


def measured(model: ModelSpec, kind: TaskKind, micro_batch: int, seq_len: int, ns: int, saved: int = 0, workspace: int = 0):
    role = UnitRole.HEAD if kind is TaskKind.LOSS else UnitRole.LAYER
    return ComputeCost(
        shape=LayerShape.of(model, role), kind=kind, micro_batch=micro_batch, seq_len=seq_len,
        duration_ns=Spread(p10=ns - 1, p50=ns, p90=ns + 1), saved_bytes=saved, workspace_bytes=workspace,
    )  # fmt: skip


class TestCopiesAndUpdates:
    def test_durations_and_demands_come_from_the_profile(self) -> None:
        model, machine = tiny_model(), tiny_machine()
        graph = lowered(model, resident_state=(4,))
        for task, cost in zip(graph.tasks, price(graph, model, work(2), 32, machine), strict=True):
            size = task.bytes_moved
            match task.lane:
                case "h2d" | "d2h":
                    assert cost.duration_ns == -(-size // 10)
                    assert cost.demand == dict.fromkeys((Resource.PCIE, Resource.HOST_DRAM), size * 10**9 // cost.duration_ns)
                case "host_update":
                    duration_ns = -(-size // 30)
                    assert cost == TaskCost(
                        duration_ns=duration_ns, demand={Resource.HOST_DRAM: size * 10**9 // duration_ns}, source="measured",
                        uncertainty_percent=1.0,
                    )  # fmt: skip
                case "gpu_update":
                    assert cost == TaskCost(duration_ns=-(-size // 800), demand={}, source="measured", uncertainty_percent=1.0)
                case "compute":
                    assert cost.demand == {}
                    assert cost.source == "derived"

    def test_on_the_cpu_backend_a_copy_reads_and_writes_dram(self) -> None:
        model, machine = tiny_model(), tiny_machine()
        graph = lowered(model)
        for backend, passes in (("cpu", 2), ("cuda", 1)):
            at = msgspec.structs.replace(machine, gpu=msgspec.structs.replace(machine.gpu, backend=backend))
            copies = [
                cost
                for task, cost in zip(graph.tasks, price(graph, model, work(2), 32, at), strict=True)
                if task.kind is TaskKind.COPY
            ]
            assert len(copies) > 6
            for cost in copies:
                assert cost.demand[Resource.PCIE] > 0
                assert cost.demand[Resource.HOST_DRAM] == passes * cost.demand[Resource.PCIE]

    def test_the_curve_has_a_latency_and_a_last_rate(self) -> None:
        model, machine = tiny_model(), tiny_machine()
        graph = lowered(model)
        sizes = sorted({task.bytes_moved for task in graph.tasks if task.lane.kind is LaneKind.D2H})
        small, large = sizes[0], sizes[-1]
        assert small < large
        curve = Curve(
            points=(
                RatePoint(size=small + 1, rate=Spread.exact(1 * GB_PER_S)),
                RatePoint(size=large - 1, rate=Spread.exact(8 * GB_PER_S)),
            )
        )
        machine = msgspec.structs.replace(machine, link=msgspec.structs.replace(machine.link, d2h=curve))
        for task, cost in zip(graph.tasks, price(graph, model, work(2), 32, machine), strict=True):
            if task.lane.kind is LaneKind.D2H and task.bytes_moved == small:
                assert cost.duration_ns == small + 1  # the time of the smallest size measured
                assert cost.demand[Resource.PCIE] == small * 10**9 // (small + 1)
            if task.lane.kind is LaneKind.D2H and task.bytes_moved == large:
                assert cost.duration_ns == -(-large // 8)

    def test_a_datasheet_measures_nothing(self) -> None:
        model, machine = tiny_model(), tiny_machine()
        machine = msgspec.structs.replace(machine, provenance=msgspec.structs.replace(machine.provenance, source="datasheet"))
        assert {cost.source for cost in price(lowered(model), model, work(2), 32, machine)} == {"datasheet"}

    def test_a_small_update_on_the_gpu_takes_its_launch(self) -> None:
        model = tiny_model()
        graph = lowered(model, resident_state=(4,))
        launch = LaunchCost(kind=TaskKind.UPDATE, lane=LaneKind.GPU_UPDATE, role=None, duration_ns=Spread.exact(10**6))
        for launches, least_ns in (((), 1), ((launch,), 10**6)):
            machine = tiny_machine(launches=launches)
            for task, cost in zip(graph.tasks, price(graph, model, work(2, kernels="fused"), 32, machine), strict=True):
                if task.operation == UPDATE_GPU:
                    assert cost.duration_ns == max(least_ns, -(-task.bytes_moved // 800))

    def test_capacities(self) -> None:
        assert capacities(tiny_machine()) == {Resource.PCIE: 16 * GB_PER_S, Resource.HOST_DRAM: 40 * GB_PER_S}


class TestCompute:
    def test_an_exact_measurement_is_taken_as_it_is(self) -> None:
        model = tiny_model()
        machine = tiny_machine(
            costs=(measured(model, TaskKind.FORWARD, 2, 32, 12_345), measured(model, TaskKind.FORWARD, 2, 64, 99_999))
        )
        graph = lowered(model)
        named = costs_by_name(graph, price(graph, model, work(2), 32, machine))
        layers = [c for t, c in zip(graph.tasks, named.values(), strict=True) if t.kind is TaskKind.FORWARD and t.unit > 0]
        assert layers
        spread_percent = 100 / 12_345  # half of p10 to p90, one nanosecond either way
        assert {(cost.duration_ns, cost.source) for cost in layers} == {(12_345, "measured")}
        assert all(cost.uncertainty_percent == pytest.approx(1 + spread_percent) for cost in layers)

    def test_another_model_of_the_same_shape_shares_it_and_another_shape_does_not(self) -> None:
        machine = tiny_machine(costs=(measured(tiny_model(layers=9, name="deep"), TaskKind.FORWARD, 2, 32, 12_345),))
        for model, expected in ((tiny_model(), "measured"), (tiny_model(ffn=192), "derived")):
            graph = lowered(model)
            priced = zip(graph.tasks, price(graph, model, work(2), 32, machine), strict=True)
            assert {c.source for t, c in priced if t.kind is TaskKind.FORWARD and t.unit > 0} == {expected}

    def test_scaling_passes_through_the_measurement_and_grows_with_size(self) -> None:
        model = tiny_model(hidden=1024, ffn=4096, heads=16, head_dim=64)
        anchor = 40 * compute_ns(
            model, UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE, work(8), 128, False, tiny_machine().efficiency
        )
        machine = tiny_machine(costs=(measured(model, TaskKind.BACKWARD_RECOMPUTE, 8, 128, anchor),))
        graph = lowered(model)
        number = next(n for n, t in enumerate(graph.tasks) if t.kind is TaskKind.BACKWARD_RECOMPUTE)
        found = [price(graph, model, work(8), seq_len, machine)[number] for seq_len in (126, 127, 128, 129, 130)]
        assert [cost.source for cost in found] == ["interpolated"] * 2 + ["measured"] + ["interpolated"] * 2
        durations = [cost.duration_ns for cost in found]
        assert durations[2] == anchor
        assert durations == sorted(durations)
        for low, high in itertools.pairwise(durations):
            assert high - low < anchor / 64  # one token of 128, and no jump

    def test_the_nearest_measurement_is_scaled(self) -> None:
        model = tiny_model()
        near = measured(model, TaskKind.FORWARD, 4, 32, 10**6)
        machine = tiny_machine(costs=(measured(model, TaskKind.FORWARD, 64, 32, 10**9), near))
        graph = lowered(model)
        number = next(n for n, t in enumerate(graph.tasks) if t.kind is TaskKind.FORWARD and t.unit > 0)
        rates = machine.efficiency
        here, there = (compute_ns(model, UnitRole.LAYER, TaskKind.FORWARD, work(micro), 32, False, rates) for micro in (2, 4))
        machine = tiny_machine(costs=(near,))
        found = price(graph, model, work(2), 32, machine)[number]
        assert (found.duration_ns, found.source) == (10**6 * here // there, "interpolated")
        assert found.uncertainty_percent > 10

    @pytest.mark.parametrize(
        "micro_batch, expected",
        [
            (1, 400),  # 100 a sequence, and 300 besides
            (3, 600),  # half way
            (6, 1000),  # of 4 and 8
            (8, 1300),
            (16, 2500),
        ],
    )
    def test_between_sizes_and_beyond_them_cost_is_a_line(self, micro_batch: int, expected: int) -> None:
        model = tiny_model()
        points = ((2, 500), (4, 700), (8, 1300))
        costs = tuple(measured(model, TaskKind.FORWARD, micro, 32, 1000 * ns) for micro, ns in points)
        far = measured(model, TaskKind.FORWARD, 1, 64, 10**9)  # as many tokens as the first, and another sequence length
        machine = tiny_machine(costs=(far, *costs))
        graph = lowered(model)
        number = next(n for n, t in enumerate(graph.tasks) if t.kind is TaskKind.FORWARD and t.unit > 0)
        found = price(graph, model, work(micro_batch), 32, machine)[number]
        assert found.duration_ns == pytest.approx(1000 * expected, abs=2)  # attention is left out and put back, rounded
        assert found.source == ("measured" if micro_batch == 8 else "interpolated")

    def test_other_sequence_lengths_differ_by_attention_alone(self) -> None:
        """Measured times made of 100 ns a token and attention at its rate are found at every size between and beyond."""
        model, machine = tiny_model(), tiny_machine()
        rates = machine.efficiency

        def truth(kind: TaskKind, micro_batch: int, seq_len: int) -> int:
            tokens = micro_batch * seq_len
            return 100 * tokens + round(attention_ns(model, UnitRole.LAYER, kind, tokens, seq_len, rates))

        kinds = (TaskKind.FORWARD, TaskKind.BACKWARD_RECOMPUTE)
        sizes = ((1, 32), (1, 64), (8, 32), (8, 64))
        costs = tuple(measured(model, kind, *size, truth(kind, *size)) for kind in kinds for size in sizes)
        machine = msgspec.structs.replace(machine, costs=costs)
        graph = lowered(model)
        for kind in kinds:
            number = next(n for n, t in enumerate(graph.tasks) if t.kind is kind and t.unit > 0)
            for micro_batch, seq_len in ((2, 32), (4, 64), (1, 128), (1, 48), (16, 64)):
                found = price(graph, model, work(micro_batch), seq_len, machine)[number]
                assert found.duration_ns == pytest.approx(truth(kind, micro_batch, seq_len), abs=2)
                assert found.source == "interpolated"

    def test_what_was_not_measured_takes_no_less_than_its_launch(self) -> None:
        model = tiny_model()
        launch = LaunchCost(kind=TaskKind.FORWARD, lane=LaneKind.COMPUTE, role=UnitRole.LAYER, duration_ns=Spread.exact(10**9))
        graph = lowered(model)
        number = next(n for n, t in enumerate(graph.tasks) if t.kind is TaskKind.FORWARD and t.unit > 0)
        assert price(graph, model, work(2), 32, tiny_machine(launches=(launch,)))[number].duration_ns == 10**9
        scaled = measured(model, TaskKind.FORWARD, 4, 32, 10_000)
        assert price(graph, model, work(2), 32, tiny_machine(launches=(launch,), costs=(scaled,)))[number].duration_ns == 10**9
        # A launch that hid it is in the measurement, and in what lies between two of them.
        for others in (2,), (1, 3):
            costs = tuple(measured(model, TaskKind.FORWARD, micro_batch, 32, 5_000) for micro_batch in others)
            found = price(graph, model, work(2), 32, tiny_machine(launches=(launch,), costs=costs))[number]
            assert found.duration_ns == pytest.approx(5_000, abs=2)
        # Below all of them it shows again, but never beyond what more work was measured to take.
        for launch_ns, expected in ((10**9, 60_000), (50_000, 50_000), (5_000, 20_000)):
            launch = LaunchCost(
                kind=TaskKind.FORWARD, lane=LaneKind.COMPUTE, role=UnitRole.LAYER, duration_ns=Spread.exact(launch_ns)
            )
            costs = tuple(measured(model, TaskKind.FORWARD, size, 32, 10_000 * size) for size in (6, 8))
            found = price(graph, model, work(2), 32, tiny_machine(launches=(launch,), costs=costs))[number]
            assert found.duration_ns == pytest.approx(expected, abs=2)

    def test_an_8b_layer_costs_about_what_was_measured(self) -> None:
        """Eager layer, 16 x 1024 tokens, one H100: forward 13.5 ms, forward and backward 42.7 ms."""
        forward = compute_ns(LLAMA_8B, UnitRole.LAYER, TaskKind.FORWARD, work(16), 1024, False, H100)
        both = compute_ns(LLAMA_8B, UnitRole.LAYER, TaskKind.BACKWARD, work(16), 1024, False, H100) + forward
        assert forward == pytest.approx(13.5e6, rel=0.08)
        assert both == pytest.approx(42.7e6, rel=0.08)
        assert compute_ns(LLAMA_8B, UnitRole.LAYER, TaskKind.BACKWARD_RECOMPUTE, work(16), 1024, False, H100) == pytest.approx(
            both, abs=2
        )
        assert compute_ns(LLAMA_8B, UnitRole.LAYER, TaskKind.FORWARD_KEEP, work(16), 1024, False, H100) == forward

    def test_the_loss_is_three_products_in_chunks_and_passes_over_logits(self) -> None:
        tokens = 16 * 1024
        products = 3 * LLAMA_8B.matmul_flops(UnitRole.HEAD, tokens) / 740e12
        sums = -(-tokens // loss_chunk_tokens(128256, "eager")) - 1
        passes = (24 * tokens + 8 * sums * 4096 + 2 * 4096) * 128256 / 2400e9
        loss = compute_ns(LLAMA_8B, UnitRole.HEAD, TaskKind.LOSS, work(16), 1024, False, H100)
        assert loss == pytest.approx((products + passes) * 1e9, rel=1e-4)
        # Where small products are slow, so are the chunks of a large batch.
        points = tuple(RatePoint(size=size, rate=Spread.exact(rate * 10**12)) for size, rate in ((10**12, 200), (10**14, 740)))
        slow = compute_ns(
            LLAMA_8B,
            UnitRole.HEAD,
            TaskKind.LOSS,
            work(16),
            1024,
            False,
            msgspec.structs.replace(H100, gemm=Curve(points=points)),
        )
        assert slow > 1.5 * loss

    def test_the_embedding_moves_rows_forward_and_clears_its_matrix_backward(self) -> None:
        forward = compute_ns(LLAMA_8B, UnitRole.EMBEDDING, TaskKind.FORWARD, work(16), 1024, False, H100)
        backward = compute_ns(LLAMA_8B, UnitRole.EMBEDDING, TaskKind.BACKWARD, work(16), 1024, False, H100)
        assert forward == pytest.approx(4 * 16384 * 4096 / 2400, abs=1)
        assert backward == pytest.approx((2 * 128256 + 6 * 16384) * 4096 / 2400, abs=1)


class TestGradients:
    """Tasks that write gradients are priced by how they write them."""

    def graph_costs(self, costs: tuple[ComputeCost, ...], **knobs: object) -> dict[str, TaskCost]:
        model = tiny_model()
        graph = lowered(model, **knobs)
        machine = tiny_machine(costs=costs)
        return costs_by_name(graph, price(graph, model, tiny_policy(model, **knobs), 32, machine))

    def test_each_way_has_its_own_measurement(self) -> None:
        ways = [(dtype, adds) for dtype in ("bf16", "fp32") for adds in (False, True)]
        costs = tuple(
            msgspec.structs.replace(
                measured(tiny_model(), TaskKind.BACKWARD_RECOMPUTE, 2, 32, 1000 * (number + 1)),
                gradient_dtype=dtype, accumulate=adds,
            )
            for number, (dtype, adds) in enumerate(ways)
        )  # fmt: skip
        for dtype, first, second in (("bf16", 1000, 2000), ("fp32", 3000, 4000)):
            found = self.graph_costs(costs, gradient_dtype=dtype)
            tasks = [found[f"backward_recompute/layer000/mb{micro}"] for micro in (0, 1)]
            assert [cost.duration_ns for cost in tasks] == [first, second]
            assert {cost.source for cost in tasks} == {"measured"}

    def test_another_way_differs_by_its_traffic_and_says_so(self) -> None:
        model = tiny_model()
        found = self.graph_costs((measured(model, TaskKind.BACKWARD_RECOMPUTE, 2, 32, 10**6),))
        # tiny_machine moves 500 bytes a nanosecond element-wise; bf16 once was measured, fp32 once and twice is asked.
        once = 2 * model.flat_elements(UnitRole.LAYER)
        for micro, more in ((0, once), (1, 3 * once)):
            cost = found[f"backward_recompute/layer000/mb{micro}"]
            assert cost.duration_ns == 10**6 + more * 10**9 // tiny_machine().efficiency.elementwise_bytes_per_s
            assert cost.source == "interpolated"
            assert cost.uncertainty_percent >= 10

    def test_what_writes_no_gradients_is_the_same_for_all(self) -> None:
        forward = measured(tiny_model(), TaskKind.FORWARD, 2, 32, 777)
        for dtype in ("bf16", "fp32"):
            found = self.graph_costs((forward,), gradient_dtype=dtype)["forward/layer000/mb1"]
            assert (found.duration_ns, found.source) == (777, "measured")

    def test_fused_recomputing_leaves_out_the_last_product(self) -> None:
        knobs = work(16, kernels="fused")
        times = {
            kind: compute_ns(LLAMA_8B, UnitRole.LAYER, kind, knobs, 1024, False, H100)
            for kind in (TaskKind.FORWARD, TaskKind.BACKWARD, TaskKind.BACKWARD_RECOMPUTE)
        }
        last = 2 * 16384 * 4096 * 14336 / 740e12 * 1e9 + 6 * 14336 * 16384 / 2400
        whole = times[TaskKind.FORWARD] + times[TaskKind.BACKWARD]
        assert times[TaskKind.BACKWARD_RECOMPUTE] == pytest.approx(whole - last, rel=1e-6)
        # Measured on an H100: 11.2 ms forward, 33.9 ms both, 30.8 ms with recompute.
        assert times[TaskKind.FORWARD] == pytest.approx(11.2e6, rel=0.1)
        assert times[TaskKind.BACKWARD_RECOMPUTE] == pytest.approx(30.8e6, rel=0.1)

    def test_measured_gradients_cost_one_pass_in_the_last_micro_batch(self) -> None:
        model, machine = tiny_model(), tiny_machine()
        graph = lowered(model)
        plain, with_norms = (
            price(graph, model, tiny_policy(model, gradient_norms=norms), 32, machine) for norms in (False, True)
        )
        rate = machine.efficiency.elementwise_bytes_per_s
        for task, before, after in zip(graph.tasks, plain, with_norms, strict=True):
            last = task.kind in GRADIENT_KINDS and task.micro == 1
            pass_ns = 4 * model.flat_elements(model.role(task.unit)) * 10**9 // rate if last else 0
            assert after == msgspec.structs.replace(before, duration_ns=before.duration_ns + pass_ns)

    def test_updates_on_the_host_follow_their_size(self) -> None:
        points = tuple(RatePoint(size=size, rate=Spread.exact(rate * GB_PER_S)) for size, rate in ((10**5, 10), (10**7, 40)))
        optimizer = msgspec.structs.replace(tiny_machine().optimizer, host_by_bytes=Curve(points=points))
        graph, model = lowered(tiny_model()), tiny_model()
        costs = price(graph, model, work(2), 32, tiny_machine(optimizer=optimizer))
        for task, cost in zip(graph.tasks, costs, strict=True):
            if task.operation == UPDATE_HOST:
                assert cost.duration_ns == Curve(points=points).duration_ns(task.bytes_moved)


class TestFootprint:
    def test_formulas_where_nothing_was_measured(self) -> None:
        model = tiny_model()
        found = footprint(model, work(2), 32, tiny_machine())
        backward = 8 * (128 + 64) * 64 + 2 * 128 * 64
        assert found.inner_bytes == model.saved_bytes(64, eager=True)
        assert found.workspace_bytes == 0
        assert found.transient_bytes == {
            "layer/forward": 8 * 128 * 64, "layer/forward_keep": 6 * 64 * 64, "layer/backward": backward,
            "layer/backward_recompute": found.inner_bytes + backward, "head/loss": 16 * 256 * 64 + 2 * 256 * 64,
        }  # fmt: skip

    def test_fused_kernels_keep_less_and_capturing_takes_memory(self) -> None:
        model = tiny_model(qk_norm=True, architecture="qwen3")
        gpu = msgspec.structs.replace(tiny_machine().gpu, capture_bytes=1000)
        machine = tiny_machine(gpu=gpu)
        fused, graphed = (footprint(model, work(2, kernels=kernels), 32, machine) for kernels in ("fused", "graphed"))
        # Per token: factors of two norms; q, k, v, output and log-sum-exp; q and k before their norms with factors; ...
        attention = 2 * (64 + 32 + 32 + 64) + 4 * 4 + 2 * (64 + 32) + 4 * (4 + 2)
        assert fused.inner_bytes == 64 * (8 + attention + 2 * 64 + 2 * 2 * 128)
        assert fused.transient_bytes["layer/backward_recompute"] == fused.inner_bytes + 2 * 128 * 64
        assert graphed == msgspec.structs.replace(fused, workspace_bytes=1000 * 2 * (2 * 4 + 1))

    def test_logits_are_never_whole(self) -> None:
        """Beyond one chunk the need stays: a chunk's logits, a block of the gradient, and its fp32 sum."""
        wide = tiny_model(vocabulary=10**6)
        need, half = (footprint(wide, work(size), 512, tiny_machine()).transient_bytes["head/loss"] for size in (8, 4))
        assert need <= 4 * LOSS_CHUNK_BYTES["eager"] + PRODUCT_BYTES + 4 * 64 * 10**6
        assert need == half
        fp32 = footprint(wide, work(8, gradient_dtype="fp32"), 512, tiny_machine())
        assert need - fp32.transient_bytes["head/loss"] == 4 * 64 * 10**6

    def test_measurements_replace_formulas(self) -> None:
        model = tiny_model()
        machine = tiny_machine(
            costs=(
                measured(model, TaskKind.FORWARD_KEEP, 2, 32, 1, saved=111, workspace=40_000),
                measured(model, TaskKind.BACKWARD_RECOMPUTE, 2, 32, 1, workspace=50_000),
                measured(model, TaskKind.LOSS, 2, 32, 1, workspace=60_000),
            )
        )
        found = footprint(model, work(2), 32, machine)
        assert found.inner_bytes == 111
        measured_here = ("layer/forward_keep", "layer/backward_recompute", "head/loss")
        assert [found.transient_bytes[key] for key in measured_here] == [40_000, 50_000, 60_000]
        # At another size the workspace moves by what the formula of the task differs by.
        moved = [
            40_000 + 6 * 64 * 32,
            50_000 + model.saved_bytes(32, eager=True) + 8 * (128 + 64) * 32,
            60_000 + 16 * 256 * 32,
        ]
        found = footprint(model, work(3), 32, machine)
        assert found.inner_bytes == -(-111 * 3 // 2)
        assert [found.transient_bytes[key] for key in measured_here] == moved

    def test_workspace_is_what_tasks_need_beyond_activations_that_are_kept_then(self) -> None:
        needs = {
            "layer/forward": 50, "layer/forward_keep": 5, "layer/backward": 20, "layer/backward_recompute": 90,
            "head/loss": 10, "embedding/forward": 1,
        }  # fmt: skip
        taken = Footprint(inner_bytes=30, workspace_bytes=7, transient_bytes=needs)
        assert taken.workspace_beside([0] * 4) == 7 + 90
        # One layer keeps 30: recomputing works where it lay, and takes 60 beside.
        assert taken.workspace_beside([0, 0, 0, 30]) == 7 + 90 - 30
        # Three keep 90: what is left beside them is the last layer's own backward.
        assert taken.workspace_beside([0, 30, 30, 30]) == 7 + 20
        assert taken.workspace_beside([0, 120, 120, 120]) == 7 + 20
        # Kept by the first layers, they are there while the others recompute.
        assert taken.workspace_beside([30, 30, 30, 0]) == 7 + 90
        assert taken.workspace_beside([30, 0, 0, 30]) == 7 + 90 + 30 - 60

    def test_a_backend_that_cannot_tell_leaves_the_formulas(self) -> None:
        model = tiny_model()
        cost = msgspec.structs.replace(measured(model, TaskKind.FORWARD_KEEP, 2, 32, 1), saved_bytes=None, workspace_bytes=None)
        assert footprint(model, work(2), 32, tiny_machine(costs=(cost,))) == footprint(model, work(2), 32, tiny_machine())
