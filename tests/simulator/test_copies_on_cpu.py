"""On the "cpu" backend the device's memory is RAM too: a copy there reads and writes host DRAM."""

from __future__ import annotations

import msgspec

from builders import GB_PER_S, tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import Resource, capacities, price, simulate
from slideplan.footprint import Footprint
from slideplan.graph.operations import TaskKind
from slideplan.graph.tasks import TaskGraph
from slideplan.lowering.lower import lower
from slideplan.machine.profile import MachineProfile
from slideplan.quantities import MIB

MODEL = tiny_model()
POLICY = tiny_policy(MODEL, offload_boundaries=True)


def machine(backend: str, dram_bytes_per_s: int = 40 * GB_PER_S) -> MachineProfile:
    at = tiny_machine()
    return msgspec.structs.replace(
        at,
        gpu=msgspec.structs.replace(at.gpu, backend=backend),
        host=msgspec.structs.replace(at.host, dram_bytes_per_s=dram_bytes_per_s),
    )


def graph() -> TaskGraph:
    return lower(MODEL, POLICY, tiny_workload(), Footprint(inner_bytes=MIB, workspace_bytes=MIB))


def test_a_copy_takes_twice_its_bytes_of_host_dram_there_and_once_beside_a_gpu() -> None:
    for backend, passes in (("cuda", 1), ("cpu", 2)):
        lowered = graph()
        costs = price(lowered, MODEL, POLICY, 32, machine(backend))
        copies = [(task, cost) for task, cost in zip(lowered.tasks, costs, strict=True) if task.kind is TaskKind.COPY]
        assert {str(task.operation) for task, _ in copies} == {
            "weights host>gpu", "gradient gpu>host", "boundary gpu>host", "boundary host>gpu",
        }  # fmt: skip
        for task, cost in copies:
            assert cost.duration_ns == -(-task.bytes_moved // 10)  # the link's 10 GB/s
            rate = task.bytes_moved * 10**9 // cost.duration_ns
            assert cost.demand == {Resource.PCIE: rate, Resource.HOST_DRAM: passes * rate}, task.name


def test_where_dram_is_scarce_copies_there_slow_each_other_and_the_update_down() -> None:
    """16 GB/s of DRAM: one copy at 10 GB/s fits beside a GPU, and not where it passes DRAM twice."""
    steps = {}
    for backend in ("cuda", "cpu"):
        at = machine(backend, 16 * GB_PER_S)
        steps[backend], _ = simulate(graph(), price(graph(), MODEL, POLICY, 32, at), capacities(at))
    assert steps["cpu"] > 1.1 * steps["cuda"]
