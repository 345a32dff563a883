"""Which tier an answer says is too small, where either could be enlarged, and in which order it names them."""

from __future__ import annotations

from io import StringIO

import msgspec
import pytest
from rich.console import Console

from builders import SSD, tiny_machine, tiny_model
from planner.reports.answer import print_answer, verdict
from planner.reports.drive import format_drive_bytes
from planner.search.best import search
from planner.search.shortfall import DoesNotFit
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.policy import Workload
from slideplan.quantities import KIB


def answer(gpu_kib: int, host_kib: int) -> DoesNotFit:
    at = tiny_machine()
    at = msgspec.structs.replace(
        at,
        gpu=msgspec.structs.replace(at.gpu, memory_bytes=gpu_kib * KIB),
        host=msgspec.structs.replace(at.host, memory_bytes=host_kib * KIB),
    )
    found = search(tiny_model(), Workload(seq_len=32, global_batch=2), at)
    assert isinstance(found, DoesNotFit)
    return found


@pytest.mark.parametrize(
    ("gpu_kib", "host_kib", "lacks"),
    [
        # Where a policy fits the GPU, the host alone is named, though moving state to the GPU would lack fewer bytes.
        (500, 500, "lacks 1.7 MiB of HOST memory (needs 2.2 MiB, has 500.0 KiB)"),
        (700, 600, "lacks 1.4 MiB of HOST memory (needs 2.0 MiB, has 600.0 KiB)"),
        (100, 100_000, "lacks 361.5 KiB of GPU memory (needs 461.5 KiB, has 100.0 KiB)"),
        (
            400, 1500,
            "lacks 407.1 KiB of GPU memory (needs 807.1 KiB, has 400.0 KiB); "
            "lacks 351.2 KiB of HOST memory (needs 1.8 MiB, has 1.5 MiB)",
        ),
    ],
)  # fmt: skip
def test_the_verdict_names_the_gpu_first_and_alone_only_where_no_policy_fits_it(
    gpu_kib: int, host_kib: int, lacks: str
) -> None:
    found = answer(gpu_kib, host_kib)
    assert verdict(found) == f"does not fit: {lacks}"
    assert list(found.ledger.tiers) == [Tier.GPU, Tier.HOST]


def test_advice_begins_with_the_host_whose_memory_is_the_cheaper_one() -> None:
    found = answer(900, 1000)
    assert list(found.bytes_needed) == [Tier.HOST, Tier.SSD, Tier.GPU]
    out = StringIO()
    print_answer(Console(file=out, width=100), found)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    first = lines.index("What would make it fit") if "What would make it fit" in lines else None
    assert first is not None, out.getvalue()
    said = [" ".join(line.split()) for line in lines[first + 1 :] if line][:3]
    assert said == [
        "host at least 1.8 MiB of RAM beside this GPU",
        f"SSD at least {format_drive_bytes(found.bytes_needed[Tier.SSD] or 0)} of a drive beside this GPU and this host",
        "GPU at least 1.7 MiB of memory beside this host",
    ]


def with_drive(capacity_bytes: int) -> Plan | DoesNotFit:
    """On 900 KiB of GPU memory and 1000 KiB of RAM, which are too small without a drive."""
    at = tiny_machine(ssd=msgspec.structs.replace(SSD, capacity_bytes=capacity_bytes))
    at = msgspec.structs.replace(
        at,
        gpu=msgspec.structs.replace(at.gpu, memory_bytes=900 * KIB),
        host=msgspec.structs.replace(at.host, memory_bytes=1000 * KIB),
    )
    return search(tiny_model(), Workload(seq_len=32, global_batch=2), at)


def test_a_drive_of_the_size_that_is_advised_makes_it_fit_and_a_smaller_one_does_not() -> None:
    """Asked without a drive and with one that is too small, the advice is the same."""
    needed = answer(900, 1000).bytes_needed[Tier.SSD]
    assert needed is not None
    found = with_drive(needed)
    assert isinstance(found, Plan)
    assert found.ledger.tiers[Tier.SSD].headroom_bytes >= 0
    smaller = with_drive(needed - 3)
    assert isinstance(smaller, DoesNotFit)
    assert smaller.bytes_needed[Tier.SSD] == needed


def test_where_weights_do_not_fit_no_drive_helps() -> None:
    assert answer(500, 300).bytes_needed[Tier.SSD] is None
