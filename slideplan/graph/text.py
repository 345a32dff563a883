"""A schedule as text: short names of tasks that parse back, and a grid with lanes down and time across."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from msgspec import UNSET

from slideplan.graph.lanes import Lane, LaneKind
from slideplan.graph.operations import Operation, TaskKind, compute, copy, host_pass, update
from slideplan.graph.tasks import Task, TaskGraph
from slideplan.placement import STATE, TensorClass, Tier
from slideplan.timeline import Span

K = TypeVar("K")

_VERBS = {
    TaskKind.FORWARD: "F",
    TaskKind.FORWARD_KEEP: "K",
    TaskKind.LOSS: "L",
    TaskKind.BACKWARD: "B",
    TaskKind.BACKWARD_RECOMPUTE: "R",
}
_PASSES = {
    TaskKind.UPDATE: "U",
    TaskKind.CAST_WEIGHTS: "C",
    TaskKind.CLIP_GRADIENT: "N",
    TaskKind.REFRESH_WEIGHTS: "M",
}
_TENSORS: dict[tuple[TensorClass, ...], str] = {
    (TensorClass.WEIGHTS,): "w",
    (TensorClass.GRADIENT,): "g",
    (TensorClass.BOUNDARY,): "b",
    (TensorClass.FEED_FORWARD,): "f",
    (TensorClass.MOMENTS,): "m",
    (TensorClass.REMAINDER,): "r",
    STATE: "s",
}
_TIERS = {Tier.GPU: "g", Tier.HOST: "h", Tier.SSD: "s"}
LEGEND = (
    "F forward, K forward that keeps, L loss, B backward, R backward that recomputes, U update.\n"
    "Copies: w weights, g gradient, b boundary, f feed-forward, s state, m moments, r remainder;\n"
    "then from and to: g gpu, h host, s ssd. Then unit, .micro-batch, cchunk, ' for a second pass;\n"
    "+ belongs to the next step, - to the step before."
)

_NAME = re.compile(
    r"(?:(?P<verb>[FKLBR])|(?P<work>[UCNM])(?P<tier>[ghs])|(?P<tensors>[wgbfmrs])(?P<source>[ghs])(?P<target>[ghs]))"
    r"(?P<unit>\d+)(?:\.(?P<micro>\d+))?(?:c(?P<chunk>\d+))?(?P<earlier>'*)(?:@(?P<device>\d+))?(?P<step>\+*|-*)"
)


class Named(NamedTuple):
    """What a short name says.

    earlier: how many tasks of the same step have the same operation, unit, micro-batch and chunk, and come before it
    step:    how many steps later than the others in its column; negative: earlier
    """

    operation: Operation
    unit: int
    micro: int | None
    chunk: int | None
    earlier: int = 0
    device: int = 0
    step: int = 0


def short_name(named: Named) -> str:
    """``F3.1``, ``whg4``, ``Ug2c5``: see LEGEND."""
    operation = named.operation
    if operation.kind is TaskKind.COPY:
        what = _TENSORS[operation.tensors] + _TIERS[operation.source] + _TIERS[operation.target]
    elif operation.kind in _PASSES:
        what = _PASSES[operation.kind] + _TIERS[operation.target]
    else:
        what = _VERBS[operation.kind]
    micro = "" if named.micro is None else f".{named.micro}"
    chunk = "" if named.chunk is None else f"c{named.chunk}"
    device = f"@{named.device}" if named.device else ""
    step = "+" * named.step or "-" * -named.step
    return f"{what}{named.unit}{micro}{chunk}" + "'" * named.earlier + device + step


def parse_name(text: str) -> Named:
    """What `short_name` was given. Raises ValueError."""
    match = _NAME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no short name of a task")
    if match["tensors"]:
        tensors = _key(_TENSORS, match["tensors"])
        operation = copy(_key(_TIERS, match["source"]), _key(_TIERS, match["target"]), *tensors)
    elif match["work"]:
        kind = _key(_PASSES, match["work"])
        operation = update(_key(_TIERS, match["tier"])) if kind is TaskKind.UPDATE else host_pass(kind)
    else:
        operation = compute(_key(_VERBS, match["verb"]))
    return Named(
        operation=operation,
        unit=int(match["unit"]),
        micro=None if match["micro"] is None else int(match["micro"]),
        chunk=None if match["chunk"] is None else int(match["chunk"]),
        earlier=len(match["earlier"]),
        device=int(match["device"] or 0),
        step=match["step"].count("+") - match["step"].count("-"),
    )


def _key(table: dict[K, str], value: str) -> K:
    return next(key for key, letter in table.items() if letter == value)


def names(graph: TaskGraph) -> list[Named]:
    """Every task's, in stored order."""
    made: dict[Named, int] = {}
    return [_counted(made, task) for task in graph.tasks]


def _counted(made: dict[Named, int], task: Task) -> Named:
    named = Named(task.operation, task.unit, task.micro, None if task.chunk is UNSET else task.chunk, device=task.device)
    earlier = made.get(named, 0)
    made[named] = earlier + 1
    return named._replace(earlier=earlier)


def grid(graph: TaskGraph, spans: Sequence[Span], step_ns: int, width: int = 100) -> str:
    """One steady step: a column per compute task of the first device, with what other lanes start while it runs.

    A task that starts before the step's first compute task, or after its last, stands in the column in which the steady
    schedule starts it, marked as of the next step or the step before. Columns are wrapped to `width` characters.
    """
    opener = Lane(LaneKind.COMPUTE)
    columns = sorted(graph.lanes[opener], key=lambda number: spans[number].start_ns)
    starts = [spans[number].start_ns for number in columns]
    named = names(graph)
    cells: dict[Lane, list[list[str]]] = {lane: [[] for _ in columns] for lane in graph.lanes}
    for lane, queue in graph.lanes.items():
        placed = []
        for number in queue:
            later, start_ns = divmod(spans[number].start_ns, max(1, step_ns))
            placed.append((start_ns, number, -later))
        for start_ns, number, step in sorted(placed):
            column = max(0, bisect_right(starts, start_ns) - 1)
            cells[lane][column].append(short_name(named[number]._replace(step=step)))
    times = [[f"{start_ns / 1e6:.2f}"] for start_ns in starts]
    return "\n".join(_wrapped({"ms": times} | {lane.name: row for lane, row in cells.items()}, width))


def _wrapped(rows: dict[str, list[list[str]]], width: int) -> Iterator[str]:
    label = max(len(name) for name in rows)
    texts = {name: [" ".join(cell) for cell in row] for name, row in rows.items()}
    widths = [max(len(row[column]) for row in texts.values()) for column in range(len(next(iter(texts.values()))))]
    first = 0
    while first < len(widths):
        last, taken = first, label + 3 + widths[first]
        while last + 1 < len(widths) and taken + 3 + widths[last + 1] <= width:
            last += 1
            taken += 3 + widths[last]
        if first:
            yield ""
        for name, row in texts.items():
            cells = (row[column].ljust(widths[column]) for column in range(first, last + 1))
            yield f"{name:<{label}} | {' | '.join(cells)}".rstrip()
        first = last + 1


def parse_grid(text: str) -> dict[str, list[Named]]:
    """Tasks of each lane of a grid, in the order of their columns, by the lane's name. Raises ValueError."""
    found: dict[str, list[Named]] = {}
    for line in filter(None, text.splitlines()):
        label, bar, cells = line.partition("|")
        if not bar:
            raise ValueError(f"{line!r} is no row of a grid: a lane's name, then |")
        if label.strip() != "ms":
            found.setdefault(label.strip(), []).extend(parse_name(name) for name in cells.replace("|", " ").split())
    return found
