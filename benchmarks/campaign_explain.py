"""Where the error of one run sits: its measured step is replayed with predicted durations put back, a group at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slideplan.codec import Spec
from slideplan.graph.replay import replay
from slideplan.measurement import Measurement
from slideplan.plan import Plan
from slideplan.quantities import format_ns

NAMED = 3  # task kinds and lanes that the sentence names, at most
WORTH_NAMING = 0.1  # of the largest


class Explanation(Spec, frozen=True):
    """Parts of predicted - measured, in nanoseconds of the step.

    costs_ns:     predicted - replayed: task durations
    structure_ns: replayed - measured: what passes between tasks, and how steps vary
    kinds_ns, lanes_ns: by how much the replayed step moves when tasks of one kind or lane take their
                  predicted time and all others their measured time; largest first
    """

    run: str
    predicted_ns: int
    replayed_ns: int
    measured_ns: int
    costs_ns: int
    structure_ns: int
    kinds_ns: dict[str, int]
    lanes_ns: dict[str, int]
    busiest_lane: str
    busiest_share: float
    sentence: str


def explain(run: str, plan: Plan, measurement: Measurement) -> Explanation:
    """Split the error of a run."""
    graph, predicted, measured = plan.graph, plan.prediction.record, measurement.record
    predicted_ns = _predicted_ns(plan)
    replayed_ns = _replayed_ns(plan, measurement.task_ns, predicted_ns, ())

    def moved(numbers: Iterable[int]) -> int:
        return _replayed_ns(plan, measurement.task_ns, predicted_ns, numbers) - replayed_ns

    by_kind: dict[str, list[int]] = {}
    for number, task in enumerate(graph.tasks):
        by_kind.setdefault(str(task.operation), []).append(number)
    kinds_ns = _largest_first({kind: moved(numbers) for kind, numbers in by_kind.items()})
    lanes_ns = _largest_first({str(lane): moved(numbers) for lane, numbers in graph.lanes.items()})
    busiest = max(measured.lanes, key=lambda lane: measured.lanes[lane].busy_ns)
    share = measured.lanes[busiest].busy_ns / measured.step_ns
    steady = [measurement.step_ns[step] for step in measurement.steady_steps]
    costs_ns, structure_ns = predicted.step_ns - replayed_ns, replayed_ns - measured.step_ns
    sentence = (
        f"{run} was predicted at {format_ns(predicted.step_ns)} and measured at {format_ns(measured.step_ns)} "
        f"(steady steps from {format_ns(min(steady))} to {format_ns(max(steady))}), an error of "
        f"{predicted.step_ns / measured.step_ns - 1:+.1%}. Task durations (cost model) hold {_signed(costs_ns)} of the "
        f"difference, what passes between tasks (structure) {_signed(structure_ns)}. Predicted durations put into the "
        f"replayed step, one lane at a time, move it by {_named(lanes_ns)}; one task kind at a time, by {_named(kinds_ns)}. "
        f"The busiest lane is {busiest}, at work in {share:.0%} of the measured step."
    )
    return Explanation(
        run=run, predicted_ns=predicted.step_ns, replayed_ns=replayed_ns, measured_ns=measured.step_ns, costs_ns=costs_ns,
        structure_ns=structure_ns, kinds_ns=kinds_ns, lanes_ns=lanes_ns, busiest_lane=str(busiest), busiest_share=share,
        sentence=sentence,
    )  # fmt: skip


def left_errors(plan: Plan, measurement: Measurement) -> dict[str, float]:
    """What is left of the step time's error where the tasks of one lane take what they were measured to; per lane."""
    predicted_ns, measured_ns = _predicted_ns(plan), measurement.record.step_ns
    return {
        str(lane): _replayed_ns(plan, predicted_ns, measurement.task_ns, numbers) / measured_ns - 1
        for lane, numbers in plan.graph.lanes.items()
    }


def _predicted_ns(plan: Plan) -> list[int]:
    return [span.duration_ns for span in plan.prediction.record.spans]


def _replayed_ns(plan: Plan, durations_ns: Sequence[int], others_ns: Sequence[int], numbers: Iterable[int]) -> int:
    """The step replayed with these durations, but for the tasks of these numbers, which take the other ones."""
    taken = list(durations_ns)
    for number in numbers:
        taken[number] = others_ns[number]
    return replay(plan.graph, taken, plan.prediction.handoffs)[0]


def _largest_first(moves_ns: dict[str, int]) -> dict[str, int]:
    return dict(sorted(moves_ns.items(), key=lambda item: -abs(item[1])))


def _named(moves_ns: dict[str, int]) -> str:
    """The largest few; `moves_ns` comes largest first."""
    largest = abs(next(iter(moves_ns.values())))
    worth = [(name, move) for name, move in moves_ns.items() if move and abs(move) >= WORTH_NAMING * largest][:NAMED]
    return ", ".join(f"{_signed(move)} for {name}" for name, move in worth) or "nothing"


def _signed(duration_ns: int) -> str:
    return f"{'+' if duration_ns > 0 else ''}{format_ns(duration_ns)}"
