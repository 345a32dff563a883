"""Every slot of a task graph as memory: reserved once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod

import torch

from runtime.lanes.backend import Backend
from runtime.memory.drive import Drive
from runtime.memory.parts import MemoryPart, Part
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import SlotPool, TaskGraph
from slideplan.model import Parameter
from slideplan.placement import TensorClass, Tier
from slideplan.policy import GradientDtype

Slot = tuple[str, int]  # pool and number
# Classes whose memory belongs to torch's allocator: autograd's saved tensors and transient results.
DYNAMIC = (TensorClass.INNER, TensorClass.WORKSPACE)


class Buffers:
    """All static slots: flat tensors, and what lies on the drive. `gradient_dtype` is that of the policy."""

    def __init__(
        self,
        graph: TaskGraph,
        backend: Backend,
        gradient_dtype: GradientDtype,
        wanted: Callable[[SlotPool], bool] = lambda pool: True,
        progress: Callable[[SlotPool], None] = lambda pool: None,
        drive: Drive | None = None,
    ) -> None:
        """drive: with the graph's slots on the SSD, where there are any."""
        self.drive = drive
        self._dtypes = {
            TensorClass.WEIGHTS: torch.bfloat16,
            TensorClass.REMAINDER: torch.int16,
            TensorClass.MOMENTS: torch.float32,
            TensorClass.MOMENTS_BF16: torch.bfloat16,
            TensorClass.MOMENTS_8BIT: torch.uint8,
            TensorClass.GRADIENT: torch.float32 if gradient_dtype == "fp32" else torch.bfloat16,
            TensorClass.BOUNDARY: torch.bfloat16,
            TensorClass.FEED_FORWARD: torch.bfloat16,
            TensorClass.NORM: torch.float32,
        }
        self.slots: dict[str, list[torch.Tensor]] = {}
        self._pools = graph.pool
        # What crosses PCIe is page-locked on the host.
        copied = {
            access.pool for task in graph.tasks if task.lane.kind in (LaneKind.H2D, LaneKind.D2H) for access in task.accesses
        }
        # The device first: what does not fit there fails in milliseconds, not after touching all of RAM.
        for pool in sorted(graph.pools, key=lambda pool: pool.tier is not Tier.GPU):
            if pool.tensor_class in DYNAMIC or pool.tier is Tier.SSD or not wanted(pool):
                continue
            arena = backend.allocate(pool.tier, pool.total_bytes, pool.name in copied)
            self.slots[pool.name] = [self._carve(arena, pool, slot) for slot in range(pool.count)]
            progress(pool)

    def _carve(self, arena: torch.Tensor, pool: SlotPool, slot: int) -> torch.Tensor:
        """A slot as a tensor with a version counter of its own.

        Ordinary views share the arena's counter, and autograd would take a write to any slot for a
        write to the one that it saved.
        """
        dtype = self._dtypes[pool.tensor_class]
        elements = pool.slot_bytes // dtype.itemsize
        both = pool.tensor_class in (TensorClass.MOMENTS, TensorClass.MOMENTS_BF16)
        shape = (2, elements // 2) if both else (elements,)
        strides = (elements // 2, 1) if both else (1,)
        offset = slot * pool.slot_bytes // dtype.itemsize
        empty = torch.empty(0, dtype=dtype, device=arena.device)
        return empty.set_(arena.untyped_storage(), offset, shape, strides)

    def __getitem__(self, key: Slot) -> torch.Tensor:
        pool, slot = key
        return self.slots[pool][slot]

    def pool(self, slot: Slot) -> SlotPool:
        """The pool of a slot."""
        return self._pools[slot[0]]

    def part(self, slot: Slot, first_byte: int, size_bytes: int) -> Part:
        """Some bytes of a slot, wherever it is."""
        if self.pool(slot).tier is Tier.SSD:
            assert self.drive is not None, "who reserves a graph with slots on the SSD has a drive"
            return self.drive.part(slot, first_byte, size_bytes)
        return MemoryPart(self[slot].view(-1).view(torch.uint8)[first_byte : first_byte + size_bytes])

    def reserved(self) -> list[SlotPool]:
        """Pools whose memory is reserved here."""
        return [pool for pool in self._pools.values() if pool.name in self.slots]


def parameter_views(flat: torch.Tensor, parameters: Iterable[Parameter]) -> dict[str, torch.Tensor]:
    """Views of a unit's flat buffer, one per parameter, in its shape."""
    return {p.name: flat[p.offset : p.offset + prod(p.shape)].view(p.shape) for p in parameters}


def padding_views(flat: torch.Tensor, parameters: Iterable[Parameter]) -> list[torch.Tensor]:
    """The parts of a unit's flat buffer that belong to no parameter."""
    gaps = []
    end = 0
    for parameter in parameters:
        if parameter.offset > end:
            gaps.append(flat[end : parameter.offset])
        end = parameter.offset + parameter.elements
    if flat.numel() > end:
        gaps.append(flat[end:])
    return gaps
