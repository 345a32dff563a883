"""Looking up what a machine profile measured."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import msgspec

from simulator.formulas import gradient_bytes
from slideplan.graph.operations import TaskKind
from slideplan.machine.profile import ComputeCost, LayerShape, MachineProfile, Spread, cost_key
from slideplan.model import ModelSpec, UnitRole
from slideplan.policy import ComputePolicy, GradientDtype

# How gradients are written, by how likely it was measured.
_WAYS: tuple[tuple[GradientDtype, bool], ...] = (("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True))


class Measured(NamedTuple):
    """What was measured of a kind of task, at any size. `converted`: with another way of writing gradients."""

    costs: tuple[ComputeCost, ...]
    converted: bool = False


def measurements(
    model: ModelSpec, role: UnitRole, kind: TaskKind, knobs: ComputePolicy, accumulate: bool, machine: MachineProfile
) -> Measured:
    """What was measured of this kind of task by these kernels.

    Where only other ways of writing gradients were measured, those times, less the traffic of theirs and
    with that of this one at the rate of element-wise passes; a quarter is left of them at least.
    """
    shape = LayerShape.of(model, role)
    exact = machine.cost_index.get(cost_key(shape, kind, knobs.kernels, knobs.gradient_dtype, accumulate))
    if exact is not None:
        return Measured(exact)
    wanted = gradient_bytes(model, role, kind, knobs.gradient_dtype, accumulate)
    for dtype, adds in _WAYS:
        found = machine.cost_index.get(cost_key(shape, kind, knobs.kernels, dtype, adds))
        if found is not None:
            more = wanted - gradient_bytes(model, role, kind, dtype, adds)
            more_ns = more * 1_000_000_000 // machine.efficiency.elementwise_bytes_per_s
            longer = (msgspec.structs.replace(cost, duration_ns=_longer(cost.duration_ns, more_ns)) for cost in found)
            return Measured(tuple(longer), converted=True)
    return Measured(())


def _longer(spread: Spread, by_ns: int) -> Spread:
    return Spread(*(max(1, value // 4, value + by_ns) for value in (spread.p10, spread.p50, spread.p90)))


def nearest(costs: Sequence[ComputeCost], micro_batch: int, seq_len: int) -> ComputeCost | None:
    """The measurement at the nearest size; None where there is none at all.

    Distance: |log ratio of tokens| + |log ratio of sequence lengths|, so an exact match is nearest.
    """
    tokens = micro_batch * seq_len

    def distance(cost: ComputeCost) -> tuple[float, int, int]:
        apart = abs(log(cost.micro_batch * cost.seq_len / tokens)) + abs(log(cost.seq_len / seq_len))
        return apart, cost.micro_batch, cost.seq_len

    return min(costs, key=distance, default=None)


def neighbours(costs: Sequence[ComputeCost], micro_batch: int, seq_len: int) -> tuple[ComputeCost, ComputeCost] | None:
    """Two measurements to draw a line through: those around this number of tokens, else the two nearest to it.

    The one of fewer tokens first; None where all were measured with as many tokens. Of measurements with
    equal tokens the one nearest in sequence length stands for all.
    """
    tokens = micro_batch * seq_len
    sizes: dict[int, ComputeCost] = {}
    for cost in sorted(costs, key=lambda cost: (-abs(log(cost.seq_len / seq_len)), cost.seq_len)):
        sizes[cost.micro_batch * cost.seq_len] = cost
    if len(sizes) < 2:
        return None
    below = sorted(size for size in sizes if size <= tokens)
    above = sorted(size for size in sizes if size > tokens)
    low, high = (below[-1], above[0]) if below and above else sorted([*below[-2:], *above[:2]])
    return sizes[low], sizes[high]
