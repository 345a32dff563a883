"""What a plan says of the drive that state lies on, and what RAM in its place would gain."""

from __future__ import annotations

import json
from io import StringIO

import msgspec
import pytest
from rich.console import Console

from builders import SSD, tiny_machine, tiny_model
from planner.reports.answer import print_answer
from planner.search.best import search
from planner.search.shortfall import DoesNotFit
from planner.search.space import SearchOptions
from slideplan import codec
from slideplan.graph.lanes import LaneKind
from slideplan.machine.profile import MachineProfile, SsdProfile
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.policy import Workload
from slideplan.quantities import KIB, format_bytes
from slideplan.wear import DAY_NS

CAPACITY, ENDURANCE = 10**8, 6 * 10**10
DRIVE = msgspec.structs.replace(SSD, capacity_bytes=CAPACITY, endurance_bytes=ENDURANCE)


def machine(ssd: SsdProfile | None = DRIVE, host_kib: int = 1000) -> MachineProfile:
    at = tiny_machine(ssd=ssd)
    gpu = msgspec.structs.replace(at.gpu, memory_bytes=900 * KIB)
    return msgspec.structs.replace(at, gpu=gpu, host=msgspec.structs.replace(at.host, memory_bytes=host_kib * KIB))


def planned(at: MachineProfile, options: SearchOptions | None = None) -> Plan:
    found = search(tiny_model(), Workload(seq_len=32, global_batch=2), at, options)
    assert isinstance(found, Plan)
    return found


def printed(plan: Plan) -> str:
    out = StringIO()
    print_answer(Console(file=out, width=100), plan)
    return " ".join(out.getvalue().split())


def test_wear_follows_from_what_the_plan_copies_and_from_its_step() -> None:
    plan = planned(machine())
    wear, step_ns = plan.prediction.drive, plan.prediction.record.step_ns
    assert wear is not None
    copied = {lane: sum(plan.graph.tasks[n].bytes_moved for n in plan.graph.queue(lane)) for lane in LaneKind}
    assert (wear.read_bytes, wear.write_bytes) == (copied[LaneKind.SSD_READ], copied[LaneKind.SSD_WRITE])
    assert wear.written_bytes_per_day == wear.write_bytes * DAY_NS // step_ns > 0
    assert wear.capacity_bytes == CAPACITY
    assert wear.writes_per_day == pytest.approx(wear.write_bytes / CAPACITY * DAY_NS / step_ns)
    assert wear.endurance_days == pytest.approx(ENDURANCE / wear.write_bytes * step_ns / DAY_NS)


def test_all_that_lies_on_the_drive_is_read_and_written_once_a_step() -> None:
    plan = planned(machine())
    wear = plan.prediction.drive
    assert wear is not None
    assert wear.read_bytes == wear.write_bytes == sum(plan.ledger.tiers[Tier.SSD].items.values())


def on_drive(host_kib: int) -> dict[str, int]:
    """How many units of eight layers and two ends have what there, at this much host memory."""
    found = search(tiny_model(layers=8), Workload(seq_len=32, global_batch=2), machine(host_kib=host_kib))
    assert isinstance(found, Plan)
    fields = ("moments", "remainder", "weights", "boundary")
    return {field: sum(getattr(unit, field) is Tier.SSD for unit in found.policy.units) for field in fields}


def test_weights_go_there_where_the_host_does_not_hold_them_beside_no_state_at_all() -> None:
    """And only there: with more memory, state alone does."""
    small, more, much = on_drive(650), on_drive(1500), on_drive(2500)
    assert small["weights"] > 0
    assert small["moments"] == small["remainder"] >= 8
    assert more["weights"] == more["boundary"] == 0 < more["moments"]
    assert much["weights"] == much["boundary"] == 0 < much["moments"] <= more["moments"]


def test_the_host_memory_asked_for_counts_on_weights_there_too() -> None:
    workload, model = Workload(seq_len=32, global_batch=2), tiny_model(layers=8)
    answer = search(model, workload, machine(host_kib=100))
    assert isinstance(answer, DoesNotFit)
    needed = answer.bytes_needed[Tier.HOST]
    assert needed is not None
    at = machine(host_kib=100)
    enough, short = (
        msgspec.structs.replace(at, host=msgspec.structs.replace(at.host, memory_bytes=size)) for size in (needed, needed - 3)
    )
    plan = search(model, workload, enough)
    assert isinstance(plan, Plan)
    assert sum(unit.weights is Tier.SSD for unit in plan.policy.units) == 8
    assert isinstance(search(model, workload, short), DoesNotFit)


def test_the_report_and_the_file_say_it() -> None:
    plan = planned(machine())
    wear = plan.prediction.drive
    assert wear is not None
    said = printed(plan)
    assert f"{wear.writes_per_day:,.2f} times its 100.0 MB" in said
    assert f"lasts {wear.endurance_days:,.1f} days of that, until a new drive has written the 60.0 GB of its warranty" in said
    assert json.loads(codec.encoded(plan))["prediction"]["drive"] == msgspec.to_builtins(wear)


def test_without_a_warranty_nobody_knows_how_long_it_lasts() -> None:
    plan = planned(machine(msgspec.structs.replace(DRIVE, endurance_bytes=None)))
    wear = plan.prediction.drive
    assert wear is not None
    assert wear.endurance_days is None
    assert "lasts not known: the profile does not say how much may be written to the drive" in printed(plan)


@pytest.mark.parametrize("ssd", [None, DRIVE])
def test_nothing_is_said_where_nothing_lies_on_a_drive(ssd: SsdProfile | None) -> None:
    plan = planned(machine(ssd, host_kib=100_000), SearchOptions(explain=True))
    assert plan.prediction.drive is None
    assert "times its" not in printed(plan)
    assert "RAM in place of the drive" not in {other.knob for other in plan.search.alternatives}


def test_explained_plans_say_what_ram_in_place_of_the_drive_gains() -> None:
    plan = planned(machine(), SearchOptions(explain=True))
    other = plan.search.alternatives[-1]
    assert (other.knob, other.value) == ("RAM in place of the drive", format_bytes(1000 * KIB))
    assert other.tokens_per_s > plan.prediction.record.tokens_per_s
    assert other.peak_bytes[Tier.SSD] == 0
    assert other.peak_bytes[Tier.HOST] > plan.prediction.record.peak_bytes[Tier.HOST]
    assert "RAM in place of the drive" in printed(plan)
