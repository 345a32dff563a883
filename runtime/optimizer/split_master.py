"""fp32 master weights as a bf16 high half and an int16 remainder.

bits(fp32) = (high << 16) + remainder, with high rounded to nearest, ties away from zero, so that high
*is* the bf16 weight that computes. Four bytes a parameter hold an exact fp32 master, and the half that
crosses PCIe needs no cast. (Idea: `store_param_remainders` of Apex' distributed Adam.)
"""

from __future__ import annotations

import torch


def split(master: torch.Tensor, high: torch.Tensor, remainder: torch.Tensor) -> None:
    """Write a floating-point tensor as its halves, wherever they lie. All three have the same shape.

    On the way this takes about five times the bf16 half's size.
    """
    bits = master.float().view(torch.int32)
    # Adding half of the dropped unit rounds the magnitude up on ties: the sign is a bit of its own.
    # In a NaN the carry would run into the sign and leave a zero: there the half stays off.
    half = torch.bitwise_left_shift((~master.isnan()).to(torch.int32), 15)
    rounded = torch.bitwise_right_shift(bits + half, 16)
    high.view(torch.int16).copy_(rounded.to(torch.int16))
    remainder.copy_((bits - torch.bitwise_left_shift(rounded, 16)).to(torch.int16))


def join(high: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 master of bf16 `high` and int16 `remainder`, as a new tensor where `high` lies."""
    bits = torch.bitwise_left_shift(high.contiguous().view(torch.int16).to(torch.int32), 16)
    return (bits + remainder.to(bits.device, torch.int32)).view(torch.float32)
