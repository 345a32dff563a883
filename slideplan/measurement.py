"""What a run of a plan showed, and how it compares with the prediction."""

from __future__ import annotations

from statistics import median

from slideplan.codec import Document, Spec, digest
from slideplan.graph.lanes import LaneKind
from slideplan.graph.replay import replay
from slideplan.machine.profile import MachineIdentity
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.timeline import StepRecord, step_record


class SaveRecord(Spec, frozen=True):
    """A save of a run.

    step:       steps done; optimizer: whether remainder and moments were saved
    drained_ns: from the end of the last step's compute until all lanes were empty
    paused_ns:  from then until all was copied and training went on, the wait for the save before included
    took_ns:    from then until all was on the drive
    """

    step: int
    optimizer: bool
    size_bytes: int
    drained_ns: int
    paused_ns: int
    took_ns: int


class Measurement(Document, frozen=True, tag="measurement"):
    """One run of a plan.

    record:  the steady step whose time is the median
    first_step: steps that earlier runs of the same folder have done
    steady_steps: numbers of the steps judged by, counted from the very first: neither warm-up nor beside empty lanes
    task_ns: median duration of each task over the steady steps
    rehearsed_ns: a step's updates on the host one after the other, before the first step; None where there are none
    step_ns, losses: every step from the first of this run, warm-up included
    saves:    made by this run; staging_bytes: host memory reserved for them beside the plan's
    """

    version: str
    plan_digest: str
    machine: MachineIdentity
    versions: dict[str, str]
    date: str
    command: str
    steady_steps: tuple[int, ...]
    step_ns: tuple[int, ...]
    losses: tuple[float, ...]
    task_ns: tuple[int, ...]
    record: StepRecord
    rehearsed_ns: int | None = None
    first_step: int = 0
    saves: tuple[SaveRecord, ...] = ()
    staging_bytes: int = 0

    def __post_init__(self) -> None:
        steps = len(self.step_ns)
        numbers = range(self.first_step, self.first_step + steps)
        if len(self.losses) != steps or not self.steady_steps or not set(self.steady_steps) <= set(numbers):
            raise ValueError("steady_steps must name some of the steps, and every step has one time and one loss")
        if min(self.step_ns) < 1 or min(self.task_ns, default=0) < 0 or self.record.step_ns < 1:
            raise ValueError("step times must be positive and task times not negative")
        if self.rehearsed_ns is not None and self.rehearsed_ns < 1:
            raise ValueError(f"rehearsed_ns is {self.rehearsed_ns}, must be positive")
        if len(self.record.spans) != len(self.task_ns):
            raise ValueError("record.spans and task_ns must have one entry per task each")


class ComparisonRow(Spec, frozen=True):
    """One line of the comparison, in the unit of its table. `replayed` is missing where it has no meaning."""

    name: str
    predicted: int
    replayed: int | None
    measured: int

    @property
    def error(self) -> float | None:
        """(predicted - measured) / measured; None where nothing was measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else None


class Comparison(Document, frozen=True, tag="comparison"):
    """Predicted, replayed with measured durations, measured.

    predicted -> replayed is the error of the cost model, replayed -> measured that of the structure; hand-offs
    from lane to lane are replayed as predicted.
    kinds: time per operation in one step. lanes: busy time per lane in one step. memory: peak bytes.
    rehearsed: the step as `expected_step_ns` had it right before the run; None where nothing was rehearsed
    """

    model: str
    machine: str
    step: ComparisonRow
    tokens_per_s: ComparisonRow
    kinds: tuple[ComparisonRow, ...]
    lanes: tuple[ComparisonRow, ...]
    memory: tuple[ComparisonRow, ...]
    cost_model_error: float
    structure_error: float
    step_spread: float  # (p90 - p10) / p50 of the measured steady steps
    rehearsed: ComparisonRow | None = None


def expected_step_ns(plan: Plan, rehearsed_ns: int) -> int:
    """The predicted step with host updates as much longer or shorter as they were in rehearsal than the plan has them.

    How fast a process's memory is depends on where the system has put it: on one virtual machine the host's updates ran
    at 105 to 153 GB/s in processes that followed each other.
    """
    prediction, graph = plan.prediction, plan.graph
    predicted_ns = [span.duration_ns for span in prediction.record.spans]
    scaled_ns = list(predicted_ns)
    for number in graph.queue(LaneKind.HOST_UPDATE):
        scaled_ns[number] = max(1, predicted_ns[number] * rehearsed_ns // prediction.host_updates_ns)
    before_ns, after_ns = (replay(graph, durations, prediction.handoffs)[0] for durations in (predicted_ns, scaled_ns))
    return prediction.record.step_ns * after_ns // before_ns


def compare(plan: Plan, measurement: Measurement, plan_digest: str | None = None) -> Comparison:
    """Hold a run against its plan. Raises ValueError where the run was of another plan.

    `plan_digest`: that of the plan's file, for plans that an earlier version wrote.
    """
    plan_digest = plan_digest or digest(plan)
    if measurement.plan_digest != plan_digest:
        raise ValueError(
            f"the measurement is of plan {measurement.plan_digest}, the plan given is {plan_digest}; "
            "compare a run with the plan it executed"
        )
    if len(measurement.task_ns) != len(plan.graph.tasks) or set(measurement.record.lanes) != {
        lane.name for lane in plan.graph.lanes
    }:
        raise ValueError("the measurement has other tasks or lanes than the plan; run the plan again")
    predicted, measured = plan.prediction.record, measurement.record
    replayed_ns, spans = replay(plan.graph, measurement.task_ns, plan.prediction.handoffs)
    replayed = step_record(plan.graph, plan.workload, replayed_ns, spans, measured.peak_bytes)
    kinds: dict[str, list[int]] = {}
    for number, task in enumerate(plan.graph.tasks):
        row = kinds.setdefault(str(task.operation), [0, 0, 0])
        for column, record in enumerate((predicted, replayed, measured)):
            row[column] += record.spans[number].duration_ns
    expected_ns = None if measurement.rehearsed_ns is None else expected_step_ns(plan, measurement.rehearsed_ns)
    steady = sorted(measurement.step_ns[step - measurement.first_step] for step in measurement.steady_steps)
    middle = median(steady)
    staging_bytes = {Tier.HOST: measurement.staging_bytes}
    return Comparison(
        model=plan.model.name,
        machine=plan.machine.name,
        step=_row("step", predicted.step_ns, replayed_ns, measured.step_ns),
        tokens_per_s=_row("tokens/s", predicted.tokens_per_s, replayed.tokens_per_s, measured.tokens_per_s),
        kinds=tuple(_row(name, *row) for name, row in kinds.items()),
        lanes=tuple(
            _row(lane, use.busy_ns, replayed.lanes[lane].busy_ns, measured.lanes[lane].busy_ns)
            for lane, use in predicted.lanes.items()
        ),
        memory=tuple(
            _row(tier, predicted.peak_bytes[tier] + staging_bytes.get(tier, 0), None, measured.peak_bytes[tier])
            for tier in predicted.peak_bytes
            if tier in measured.peak_bytes  # without a GPU the device's memory cannot be told from the process's
        ),
        cost_model_error=predicted.step_ns / replayed_ns - 1,
        structure_error=replayed_ns / measured.step_ns - 1,
        step_spread=(steady[len(steady) * 9 // 10] - steady[len(steady) // 10]) / middle,
        rehearsed=None if expected_ns is None else _row("step, as rehearsed", expected_ns, replayed_ns, measured.step_ns),
    )


def _row(name: str, predicted: float, replayed: float | None, measured: float) -> ComparisonRow:
    return ComparisonRow(
        name=str(name),
        predicted=round(predicted),
        replayed=None if replayed is None else round(replayed),
        measured=round(measured),
    )
