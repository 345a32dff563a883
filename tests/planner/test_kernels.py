"""Which kernels a plan takes."""

import msgspec
import pytest

from builders import tiny_machine, tiny_model, tiny_workload
from planner.search.best import search
from planner.search.kernels import check_kernels, faster_kernels, measured_kernels
from planner.search.space import SearchOptions
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import ComputeCost, LaunchCost, LayerShape, MachineProfile, Spread
from slideplan.model import UnitRole

MODEL = tiny_model()
KINDS = (TaskKind.FORWARD, TaskKind.BACKWARD_RECOMPUTE)


def costs(**times_ns: int) -> tuple[ComputeCost, ...]:
    """A layer's forward and backward by each of these kernels, half of the time each."""
    return tuple(
        ComputeCost(
            shape=LayerShape.of(MODEL, UnitRole.LAYER), kind=kind, micro_batch=2, seq_len=32,
            duration_ns=Spread.exact(time_ns // 2), saved_bytes=0, workspace_bytes=0, kernels=kernels,
        )
        for kernels, time_ns in times_ns.items()
        for kind in KINDS
    )  # fmt: skip


def machine(launch_ns: int = 0, **times_ns: int) -> MachineProfile:
    launches = tuple(
        LaunchCost(
            kind=kind, lane=LaneKind.COMPUTE, role=UnitRole.LAYER, duration_ns=Spread.exact(launch_ns // 2), kernels="fused"
        )
        for kind in KINDS
    )
    return tiny_machine(costs=costs(**times_ns), launches=launches)


@pytest.mark.parametrize(
    ("times_ns", "launch_ns", "chosen"),
    [
        ({}, 0, "fused"),
        ({"eager": 900}, 0, "eager"),
        ({"graphed": 900}, 0, "graphed"),
        ({"eager": 900, "fused": 1000}, 0, "eager"),
        ({"eager": 1000, "fused": 900}, 0, "fused"),
        # Captured where launches show, though as fast or faster by the clock; not where they are hidden.
        ({"fused": 900, "graphed": 950}, 400, "graphed"),
        ({"fused": 900, "graphed": 850}, 300, "fused"),
    ],
)
def test_the_fastest_measured_kernels_are_taken(times_ns: dict[str, int], launch_ns: int, chosen: str) -> None:
    assert faster_kernels(MODEL, 2, 32, machine(launch_ns, **times_ns)) == chosen


def test_a_layer_that_was_not_measured_takes_kernels_that_were() -> None:
    wider = tiny_model(ffn=256)
    assert faster_kernels(wider, 2, 32, machine(eager=1000)) == "eager"
    assert faster_kernels(wider, 2, 32, machine(eager=1000, fused=1200)) == "fused"
    assert measured_kernels(machine(eager=1000, fused=1200)) == {"eager", "fused"}


def test_plans_say_their_kernels_and_a_cpu_captures_nothing() -> None:
    at = machine(eager=100_000, fused=90_000)
    assert search(MODEL, tiny_workload(), at).policy.kernels == "fused"
    assert search(MODEL, tiny_workload(), at, SearchOptions(kernels="eager")).policy.kernels == "eager"
    cpu = msgspec.structs.replace(at, gpu=msgspec.structs.replace(at.gpu, backend="cpu"))
    with pytest.raises(ValueError, match="nothing can be captured on a CPU"):
        search(MODEL, tiny_workload(), cpu, SearchOptions(kernels="graphed"))
    check_kernels("graphed", at)
