"""How far costs may be off that nobody measured."""

from __future__ import annotations

import msgspec

from builders import tiny_machine, tiny_model, tiny_policy, tiny_workload
from simulator import footprint, predict, price
from slideplan.ledger import ledger
from slideplan.lowering.lower import lower

MODEL = tiny_model()
POLICY = tiny_policy(MODEL)
MEASURED = tiny_machine()
DATASHEET = msgspec.structs.replace(MEASURED, provenance=msgspec.structs.replace(MEASURED.provenance, source="datasheet"))


def test_every_cost_of_a_datasheet_may_be_off_by_half() -> None:
    graph = lower(MODEL, POLICY, tiny_workload(), footprint(MODEL, POLICY, 32, DATASHEET))
    costs = price(graph, MODEL, POLICY, 32, DATASHEET)
    assert {(cost.source, cost.uncertainty_percent) for cost in costs} == {("datasheet", 50.0)}
    measured = price(graph, MODEL, POLICY, 32, MEASURED)
    assert {cost.source for cost in measured} == {"measured", "derived"}
    # The figures are the same, only less is known of them.
    assert [cost.duration_ns for cost in costs] == [cost.duration_ns for cost in measured]
    assert max(cost.uncertainty_percent for cost in measured) == 45.0


def test_so_may_the_step() -> None:
    uncertain = {}
    for at in (MEASURED, DATASHEET):
        graph = lower(MODEL, POLICY, tiny_workload(), footprint(MODEL, POLICY, 32, at))
        found = predict(graph, MODEL, POLICY, tiny_workload(), at, ledger(graph, at))
        uncertain[at.provenance.source] = found.step_uncertainty_percent
    assert uncertain["datasheet"] == 50.0
    assert 0 < uncertain["measured"] < 45.0
