"""Random bits of lossy updates: a hash of run, step, unit and element, so that threads, chunks and tiers do not matter."""

from __future__ import annotations

from typing import NamedTuple

import torch

MASK32 = 0xFFFFFFFF
# Multipliers of two hashes of 32 bits, by Chris Wellons' search ("hash-prospector"), and the golden ratio.
FIRST_FACTORS = (0x7FEB352D, 0x846CA68B)
SECOND_FACTOR = 0x9E3779B1


class Draws(NamedTuple):
    """Where an update's random bits come from.

    salt:  32 bits of the run, the step and the unit
    first: number, in its unit, of the first element that is updated
    """

    salt: int
    first: int = 0

    @classmethod
    def of(cls, seed: int, step: int, unit: int, first: int = 0) -> Draws:
        """Of an update of a unit, at the end of a step, in a run with this seed."""
        salt = 0
        for number in (seed, step, unit):
            salt = _mixed((salt + number) & MASK32) ^ SECOND_FACTOR
        return cls(salt & MASK32, first)

    @property
    def signed_salt(self) -> int:
        """The same bits as an int32, for kernels that take one."""
        return self.salt - (1 << 32) if self.salt >> 31 else self.salt


def _mixed(h: int) -> int:
    h = (h ^ (h >> 16)) * FIRST_FACTORS[0] & MASK32
    h = (h ^ (h >> 15)) * FIRST_FACTORS[1] & MASK32
    return h ^ (h >> 16)


def noise(elements: int, draws: Draws, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bits per element: 32 for its moments, and 16 for its weight. int64 [elements] each."""
    h = (torch.arange(elements, dtype=torch.int64, device=device) + draws.first) & MASK32 ^ draws.salt
    h = (h ^ (h >> 16)) * FIRST_FACTORS[0] & MASK32
    h = (h ^ (h >> 15)) * FIRST_FACTORS[1] & MASK32
    moments = h ^ (h >> 16)
    return moments, (moments * SECOND_FACTOR & MASK32) >> 16


def bf16_at_random(values: torch.Tensor, random: torch.Tensor, into: torch.Tensor) -> None:
    """Write fp32 values as bf16, up or down at random by how near they are. random: int64, 16 bits each."""
    half = torch.where(values.isnan(), 0, random)  # in a NaN the carry would run into the sign: see `split_master.split`
    into.view(torch.int16).copy_(((values.view(torch.int32).to(torch.int64) + half) >> 16).to(torch.int16))
