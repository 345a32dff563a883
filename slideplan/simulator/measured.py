"""Looking up what a machine profile measured."""

from __future__ import annotations

from math import log

from slideplan.plan.graph import TaskKind
from slideplan.plan.machine import ComputeCost, LayerShape, MachineProfile


def nearest(machine: MachineProfile, shape: LayerShape, kind: TaskKind, micro_batch: int, seq_len: int) -> ComputeCost | None:
    """The measurement of this shape and kind at the nearest size; None where there is none at all.

    Distance: |log ratio of tokens| + |log ratio of sequence lengths|, so an exact match is nearest.
    """
    tokens = micro_batch * seq_len

    def distance(cost: ComputeCost) -> tuple[float, int, int]:
        apart = abs(log(cost.micro_batch * cost.seq_len / tokens)) + abs(log(cost.seq_len / seq_len))
        return apart, cost.micro_batch, cost.seq_len

    return min((cost for cost in machine.costs if cost.kind is kind and cost.shape == shape), key=distance, default=None)


def neighbours(
    machine: MachineProfile, shape: LayerShape, kind: TaskKind, micro_batch: int, seq_len: int
) -> tuple[ComputeCost, ComputeCost] | None:
    """Two measurements at this sequence length to draw a line through: around the micro-batch, else the two nearest.

    The smaller micro-batch first; None where fewer than two were measured.
    """
    same = [cost for cost in machine.costs if cost.kind is kind and cost.shape == shape and cost.seq_len == seq_len]
    sizes = {cost.micro_batch: cost for cost in same}
    if len(sizes) < 2:
        return None
    below = sorted(size for size in sizes if size <= micro_batch)
    above = sorted(size for size in sizes if size > micro_batch)
    low, high = (below[-1], above[0]) if below and above else sorted([*below[-2:], *above[:2]])
    return sizes[low], sizes[high]
