"""A profile of a machine that nobody profiled, from two published steps of a known system on it.

Three constants are found, each from the figure that it decides:

    CPU pass rate    from a step bound by the CPU (smallest batch): bytes per second of optimizer and casts.
                     DRAM's capacity keeps the ratio to it that the given profile has.
    compute factor   from a step bound by compute (large batch): one factor on the rates of matrix products,
                     attention and element-wise passes
    process bytes    what the first step's host memory holds beside its slots

Each step hardly depends on the other's constant, so solving for them in turn converges at once. Links,
latencies and memory sizes stay what the given profile says.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from planner.peers import systems as peers
from planner.peers.compare import price_peer
from slideplan.codec import Spec
from slideplan.graph.tasks import tier_bytes
from slideplan.lowering.lower import lower
from slideplan.machine.profile import Curve, Efficiency, MachineProfile, RatePoint, Spread
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import Workload

ROUNDS = 3
HALVINGS = 24
RATE_RANGE = 5 * 10**9, 1000 * 10**9  # bytes/s of a CPU's passes over RAM
FACTOR_RANGE = 0.2, 5.0


class Observation(Spec, frozen=True):
    """One published step."""

    workload: Workload
    step_ns: int
    host_bytes: int


class Calibration(Spec, frozen=True):
    """The profile, and what was found on the way to it."""

    machine: MachineProfile
    host_bytes_per_s: int
    compute_factor: float
    process_bytes: int


def calibrate(
    machine: MachineProfile, peer: peers.Peer, model: ModelSpec, cpu_bound: Observation, compute_bound: Observation
) -> Calibration:
    """Constants with which the peer's policy takes the observed times.

    Raises ValueError where no constant in the ranges above does.
    """
    rate, factor = machine.optimizer.host_bytes_per_s.p50, 1.0

    def step_ns(observed: Observation, rate: float, factor: float) -> int:
        prediction = price_peer(peer, model, observed.workload, with_rates(machine, round(rate), factor)).prediction
        assert prediction is not None
        return prediction.record.step_ns

    def cpu_bound_ns(guess: float) -> int:
        return step_ns(cpu_bound, guess, factor)

    def compute_bound_ns(guess: float) -> int:
        return step_ns(compute_bound, rate, guess)

    for _ in range(ROUNDS):
        rate = round(_solve(cpu_bound_ns, *RATE_RANGE, cpu_bound.step_ns, "CPU pass rate"))
        factor = _solve(compute_bound_ns, *FACTOR_RANGE, compute_bound.step_ns, "compute factor")
    policy = peer.policy(model, cpu_bound.workload)
    graph = lower(model, policy, cpu_bound.workload, peers.footprint(model, policy, cpu_bound.workload))
    process_bytes = cpu_bound.host_bytes - tier_bytes(graph.pools, Tier.HOST)
    if process_bytes < 0:
        raise ValueError(f"{peer.name}: its slots alone take more host memory than was observed")
    found = with_rates(machine, rate, factor)
    host = msgspec.structs.replace(found.host, process_bytes=process_bytes)
    return Calibration(
        machine=msgspec.structs.replace(found, host=host),
        host_bytes_per_s=rate,
        compute_factor=factor,
        process_bytes=process_bytes,
    )


def with_rates(machine: MachineProfile, host_bytes_per_s: int, compute_factor: float) -> MachineProfile:
    """The machine with another CPU pass rate, at every size (DRAM's capacity in proportion), and faster or slower compute."""
    efficiency, before = machine.efficiency, machine.optimizer.host_bytes_per_s.p50
    gemm = tuple(
        RatePoint(size=point.size, rate=Spread.exact(round(point.rate.p50 * compute_factor)))
        for point in efficiency.gemm.points
    )
    return msgspec.structs.replace(
        machine,
        host=msgspec.structs.replace(
            machine.host, dram_bytes_per_s=machine.host.dram_bytes_per_s * host_bytes_per_s // before
        ),
        optimizer=msgspec.structs.replace(
            machine.optimizer, host_bytes_per_s=Spread.exact(host_bytes_per_s), host_by_bytes=None
        ),
        efficiency=Efficiency(
            gemm=Curve(points=gemm),
            attention_flops_per_s=round(efficiency.attention_flops_per_s * compute_factor),
            elementwise_bytes_per_s=round(efficiency.elementwise_bytes_per_s * compute_factor),
        ),
    )  # fmt: skip


def _solve(step_ns: Callable[[float], int], low: float, high: float, target_ns: int, what: str) -> float:
    """Where a falling function passes the target, by bisection."""
    if not step_ns(high) <= target_ns <= step_ns(low):
        raise ValueError(f"no {what} between {low:g} and {high:g} gives a step of {target_ns / 1e9:.3f} s")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if step_ns(middle) > target_ns else (low, middle)
    return (low + high) / 2
