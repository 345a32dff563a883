"""How a schedule's grid is cut into blocks: as wide as the page allows, and no wider."""

from __future__ import annotations

from itertools import pairwise

import pytest

from builders import tiny_model, tiny_policy, tiny_workload
from slideplan.graph.replay import replay
from slideplan.graph.text import grid, parse_grid
from slideplan.lowering.lower import lower
from strategies import FOOTPRINT

GRAPH = lower(tiny_model(), tiny_policy(tiny_model(), offload_boundaries=True), tiny_workload(), FOOTPRINT)
STEP_NS, SPANS = replay(GRAPH, [10**6 + number for number in range(len(GRAPH.tasks))])


def blocks(width: int) -> list[list[str]]:
    return [block.splitlines() for block in grid(GRAPH, SPANS, STEP_NS, width).split("\n\n")]


@pytest.mark.parametrize("width", [20, *range(55, 131), 10**6])
def test_blocks_take_the_columns_that_fit(width: int) -> None:
    found = blocks(width)
    for block in found:
        assert max(map(len, block)) <= width or all(row.count("|") == 1 for row in block)
    for block, following in pairwise(found):
        rows = [row.split(" | ") for row in block]
        columns = [max(len(row[place].rstrip()) for row in rows if place < len(row)) for place in range(len(rows[0]))]
        taken = sum(columns)
        taken += 3 * (len(columns) - 1)
        added = max(len([*row.split(" | "), ""][1].rstrip()) for row in following)
        assert taken + 3 + added > width


@pytest.mark.parametrize("width", [1, 77, 10**6])
def test_however_wide_it_holds_every_task_once(width: int) -> None:
    text = grid(GRAPH, SPANS, STEP_NS, width)
    assert {lane: len(queue) for lane, queue in parse_grid(text).items()} == {
        lane.name: len(queue) for lane, queue in GRAPH.lanes.items()
    }
    assert parse_grid(text) == parse_grid(grid(GRAPH, SPANS, STEP_NS))


def test_a_column_opens_with_its_compute_task_and_the_time() -> None:
    (block,) = blocks(10**6)
    rows = {row.split(" | ")[0].strip(): [cell.strip() for cell in row.split(" | ")[1:]] for row in block}
    queue = GRAPH.queue(next(lane.kind for lane in GRAPH.lanes if lane.name == "compute"))
    assert rows["ms"] == [f"{SPANS[number].start_ns / 1e6:.2f}" for number in queue]
    assert len(rows["compute"]) == len(queue)
    assert all(rows["compute"])
