"""Numbers that searches try: micro-batch sizes, chunks of state, and integers evenly spaced."""

from __future__ import annotations

from math import isqrt

from slideplan.lowering.sizes import state_bytes
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import Tier
from slideplan.policy import BLOCKS, Workload, chunk_elements

# Links are at their best rate from a sixteenth of this on, and every chunk in flight takes as much of the GPU. Layers
# of which that would be small parts are cut into a few larger ones: every chunk is three tasks.
STATE_CHUNK_BYTES, STATE_CHUNKS = 256 << 20, 16


def state_chunks(model: ModelSpec, update: Tier = Tier.GPU) -> int:
    """Into how many chunks a layer's state is cut where it passes through the tier that updates it."""
    elements = model.flat_elements(UnitRole.LAYER)
    wanted = min(STATE_CHUNKS, -(-state_bytes(elements, "exact") // STATE_CHUNK_BYTES))
    return -(-elements // chunk_elements(elements, wanted, BLOCKS[update]))  # fewer where blocks cannot be shared out


def divisors(number: int) -> list[int]:
    """All divisors in ascending order; found up to the root, so that large batches cost nothing."""
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def micro_batch_sizes(workload: Workload, fixed: int | None) -> list[int]:
    """Divisors of the global batch, or the one that the user fixed.

    Raises ValueError where that does not divide the global batch.
    """
    batch = workload.global_batch
    if fixed is None:
        return divisors(batch)
    if fixed < 1 or batch % fixed:
        raise ValueError(
            f"micro-batch {fixed} does not divide the global batch {batch}; take one of {', '.join(map(str, divisors(batch)))}"
        )
    return [fixed]


def evenly(low: int, high: int, count: int) -> list[int]:
    """Up to `count` different integers from low to high, both included, evenly spaced."""
    return sorted({low + (high - low) * place // (count - 1) for place in range(count)})
