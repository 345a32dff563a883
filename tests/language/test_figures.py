from __future__ import annotations

import pytest

from builders import GB_PER_S, tiny_machine
from slideplan.machine.figures import Change, changes, figures
from slideplan.machine.profile import Spread


@pytest.mark.parametrize(
    "now, holds",
    [
        ((100, 110, 120), True),
        ((124, 126, 130), True),  # 4 beyond p90, within 3 % of 150
        ((125, 126, 130), True),
        ((165, 170, 175), True),
        ((205, 210, 215), False),
        ((90, 92, 94), False),
        ((60, 150, 400), True),  # noise proves nothing
    ],
)
def test_a_figure_holds_where_ranges_meet_or_nearly_do(now: tuple[int, int, int], holds: bool) -> None:
    assert Change("x", "/s", before=Spread(100, 150, 200), now=Spread(*now)).holds is holds


def test_every_spread_has_a_name_and_only_common_ones_are_compared() -> None:
    before = figures(tiny_machine())
    assert before["AdamW on the host"].spread == Spread.exact(30 * GB_PER_S)
    assert {figure.unit for figure in before.values()} == {"/s"}
    found = changes(before, {"AdamW on the host": Spread.exact(30 * GB_PER_S), "unknown": Spread.exact(1)})
    assert [(change.name, change.holds) for change in found] == [("AdamW on the host", True)]
