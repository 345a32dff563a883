"""The host's update borrows threads of the library that torch counts in too: afterwards torch has as many as before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from runtime.optimizer.adamw import ALONE_ELEMENTS, AdamW, HostUpdate


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def update(elements: int, threads: int) -> None:
    weights, remainder = torch.zeros(elements, dtype=torch.bfloat16), torch.zeros(elements, dtype=torch.int16)
    HostUpdate(threads)(weights, remainder, torch.zeros(2, elements), torch.zeros(elements), AdamW(), step=0)


@pytest.mark.parametrize("of_torch", [1, 3, 5])
@pytest.mark.parametrize("of_update", [1, 2])
@pytest.mark.parametrize("elements", [64, ALONE_ELEMENTS + 1])
def test_an_update_leaves_torch_as_many_threads_as_it_had(of_torch: int, of_update: int, elements: int) -> None:
    torch.set_num_threads(of_torch)
    update(elements, of_update)
    assert torch.get_num_threads() == of_torch


def test_so_do_updates_that_follow_each_other() -> None:
    for of_torch in (3, 1, 2):
        torch.set_num_threads(of_torch)
        for _ in range(2):
            update(ALONE_ELEMENTS + 1, 2)
        assert torch.get_num_threads() == of_torch
