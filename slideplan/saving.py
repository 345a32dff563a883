"""What a save writes, what of the host it may take meanwhile, and what it costs a run."""

from __future__ import annotations

from slideplan.codec import Spec
from slideplan.ledger import Ledger
from slideplan.lowering.sizes import WEIGHT_BYTES, state_bytes
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import Policy
from slideplan.quantities import MIB

BLOCK_BYTES = 8 * MIB  # state is copied aside and written in pieces of this size
LEAST_STAGING_BYTES = 64 * MIB  # a ring of eight blocks, so that copies and writes overlap on a full host too

# Copied and hashed by one thread while four others write. On one H100 host with 32 cores 8 threads took 90 GiB in 4.2 s, 16 no
# less: they wait for Python's lock. Without a drive 8 threads took 2.7 s, 24 no less (benchmarks/copying_state.py).
MOST_COPIERS = 8
COPIER_BYTES_PER_S = 2_900_000_000


class SaveCost(Spec, frozen=True):
    """What saves cost a run, as predicted. Sizes are in bytes of state: headers, manifest and tokenizer are not counted.

    A save waits until all lanes are empty. Then state is copied into a ring on the host, and from there it goes to the
    drive. Training goes on once all is copied, and the rest of the ring is written beside it.

    checkpoint_bytes:  of a checkpoint: weights, remainder and moments
    weights_bytes:     of a save of the weights alone
    staging_bytes:     of the ring, which holds what is copied and not yet written
    drain_ns:          what it costs a run to end a step with all lanes empty and to start anew
    copy_bytes_per_s:  into the ring, by where a checkpoint's bytes lie: from the GPU as copies to the host go, on the
                       host as a pass of the optimizer over three times as many; no more than the threads can hash
    write_bytes_per_s: of the drive alone, in large blocks; None where none was measured
    slowed:            part of its speed that training loses while the drive writes beside it, as lanes share bandwidth
                       on this machine; 0 where no drive was measured
    """

    checkpoint_bytes: int
    weights_bytes: int
    staging_bytes: int
    drain_ns: int
    copy_bytes_per_s: int
    write_bytes_per_s: int | None
    slowed: float

    def __post_init__(self) -> None:
        for field in ("checkpoint_bytes", "weights_bytes", "staging_bytes", "drain_ns"):
            if getattr(self, field) < 0:
                raise ValueError(f"save: {field} is {getattr(self, field)}, must be zero or more")
        for field in ("copy_bytes_per_s", "write_bytes_per_s"):
            rate = getattr(self, field)
            if rate is not None and rate < 1:
                raise ValueError(f"save: {field} is {rate}, must be positive")
        if not 0 <= self.slowed < 1:
            raise ValueError(f"save: slowed is {self.slowed}, must be in 0..1 and below 1")

    def write_ns(self, size_bytes: int) -> int | None:
        """How long the drive writes this much; None where none was measured."""
        return None if self.write_bytes_per_s is None else _duration_ns(size_bytes, self.write_bytes_per_s)

    def pause_ns(self, size_bytes: int) -> int | None:
        """For how long training stands while this much is saved: until lanes are empty, and until all is copied.

        A copy needs room in the ring, so all but the ring's size must be written before the last one. None where no
        drive was measured.
        """
        if self.write_bytes_per_s is None:
            return None
        copied_ns = _duration_ns(size_bytes, self.copy_bytes_per_s)
        return self.drain_ns + max(copied_ns, _duration_ns(max(0, size_bytes - self.staging_bytes), self.write_bytes_per_s))

    def added(self, size_bytes: int, save_every: int, step_ns: int) -> float | None:
        """Share of its time without saves that a run takes longer, with this much saved every so many steps.

        In it are the pause, and what training loses while the rest is written beside it. A save that is still being
        written when the next is due holds that one up: training waits. None where no drive was measured. Raises
        ValueError for a number of steps below 1.
        """
        if save_every < 1:
            raise ValueError(f"save_every is {save_every}, must be at least 1")
        pause_ns, write_ns = self.pause_ns(size_bytes), self.write_ns(size_bytes)
        if pause_ns is None or write_ns is None:
            return None
        beside_ns = max(0, write_ns - (pause_ns - self.drain_ns))
        training_ns = save_every * step_ns
        return (pause_ns + max(self.slowed * beside_ns, beside_ns - training_ns)) / training_ns


def copiers(cores: int) -> int:
    """Threads that copy state into the ring. Training stands meanwhile: cores have nothing else to do."""
    return min(MOST_COPIERS, cores)


def _duration_ns(size_bytes: int, bytes_per_s: int) -> int:
    return -(-size_bytes * 1_000_000_000 // bytes_per_s)


def unit_weights_bytes(model: ModelSpec, unit: int) -> int:
    """Of a unit's weights in a save: its parameters, without what lies between them in its buffer."""
    return WEIGHT_BYTES * model.unit_parameter_count(model.role(unit))


def unit_optimizer_bytes(model: ModelSpec, policy: Policy, unit: int) -> int:
    """Of a unit's remainder and moments in a checkpoint: flat as in its buffer, moments as the policy keeps them."""
    return state_bytes(model.flat_elements(model.role(unit)), policy.state)


def weights_bytes(model: ModelSpec) -> int:
    """Of a save of the weights alone; tied weights count once."""
    return sum(unit_weights_bytes(model, unit) for unit in range(model.units))


def checkpoint_bytes(model: ModelSpec, policy: Policy) -> int:
    """Of a checkpoint: weights, remainder and moments of all units."""
    return weights_bytes(model) + sum(unit_optimizer_bytes(model, policy, unit) for unit in range(model.units))


def staging_bytes(memory: Ledger, size_bytes: int) -> int:
    """Of the ring: what the ledger leaves free on the host, at most what is saved, at least LEAST_STAGING_BYTES."""
    return max(LEAST_STAGING_BYTES, min(memory.tiers[Tier.HOST].headroom_bytes, size_bytes))
