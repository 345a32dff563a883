"""What a model of contention may hold."""

import re

import pytest

from slideplan.graph.lanes import LaneKind
from slideplan.machine.sharing import Resource, Sharing

GOOD = {
    "capacities": {Resource.PCIE: 100},
    "usage": {LaneKind.H2D: {Resource.PCIE: 1.0}},
    "shares": {LaneKind.H2D: {Resource.PCIE: 1.0}},
}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"capacities": {Resource.PCIE: 0}}, "capacities.pcie is 0, must be positive"),
        ({"capacities": {}}, "usage.h2d names pcie, which has no entry in capacities"),
        ({"shares": {LaneKind.H2D: {Resource.PCIE: 0.0}}}, "shares.h2d.pcie is 0.0, must be in 1e-09..1e+09"),
        ({"shares": {LaneKind.H2D: {Resource.PCIE: float("inf")}}}, "shares.h2d.pcie is inf, must be in"),
        ({"usage": {LaneKind.H2D: {Resource.PCIE: -1.0}}}, "usage.h2d.pcie is -1.0, must be in 0..1e+09"),
        ({"usage": {LaneKind.H2D: {Resource.PCIE: float("nan")}}}, "usage.h2d.pcie is nan"),
    ],
)
def test_refusals_name_the_field(fields: dict, message: str) -> None:
    Sharing(**GOOD)
    with pytest.raises(ValueError, match=re.escape(message) + r"(?!\d)"):
        Sharing(**GOOD | fields)
