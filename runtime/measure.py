"""Runs a session's steps and records what happened."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import math
import platform
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numba
import torch
import transformers

from runtime.lanes.clock import RunError
from runtime.lanes.executor import Executor
from runtime.machine import identity, peak_resident_bytes, reset_peak_resident, resident_bytes
from runtime.session import Progress, Session
from slideplan import __version__
from slideplan.codec import digest
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import tier_bytes
from slideplan.measurement import Measurement, expected_step_ns
from slideplan.placement import Tier
from slideplan.quantities import format_ns
from slideplan.timeline import Span, step_record

# Steps whose spans are kept: medians do not get better beyond, and long runs must not fill the memory.
JUDGED_STEPS = 50
WORTH_SAYING = 0.03  # of the step


class _StepSpans(NamedTuple):
    step: int
    spans: list[Span]


class Recorder:
    """Losses and origins of all steps, spans of the last ones."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.origins: list[int] = []
        self.recent: deque[_StepSpans] = deque(maxlen=JUDGED_STEPS + 1)

    def harvest(self, executor: Executor, until: int) -> None:
        """Take over the steps below `until` that are not recorded yet."""
        for step in range(len(self.origins), until):
            origin, spans = executor.spans(step)
            self.origins.append(origin)
            self.recent.append(_StepSpans(step, spans))


def measure(
    session: Session, steps: int, warmup_steps: int, out: Path, command: str, progress: Callable[[Progress], None]
) -> Measurement:
    """Run `steps` steps, writing metrics.jsonl into `out` as they end, and judge the steady ones.

    Raises LaneError if a lane fails, RunError if the device does where no lane waits for it, or if the loss is not finite.
    """
    gc.collect()
    reset_peak_resident()
    before_bytes = resident_bytes()
    rehearsed_ns = _rehearse(session, progress)
    executor = session.executor(steps)
    recorder = Recorder()
    # Closed, the executor has ended its lanes, whatever happens here: memory that they copy is given back next.
    with (out / "metrics.jsonl").open("w") as metrics, contextlib.closing(iter(executor)) as running:
        for step in running:
            found = _outcome(session, step)
            metrics.write(json.dumps({"step": step} | {name: _finite(value) for name, value in found.items()}) + "\n")
            metrics.flush()
            for name, value in found.items():
                if _finite(value) is None:
                    raise RunError(f"step {step}: the {name} is {value}; lower --lr, or look for NaN in weights and data")
            recorder.losses.append(found["loss"])
            progress(Progress("training", step + 1, steps, found["loss"], found.get("grad_norm")))
            # Updates of the last step may still run; those of the step before are over or nearly so.
            recorder.harvest(executor, step - 1)
    recorder.harvest(executor, steps)
    return _measurement(session, recorder, warmup_steps, command, _peak_bytes(session, before_bytes), rehearsed_ns)


def _outcome(session: Session, step: int) -> dict[str, float]:
    """Loss and, where the plan has it, norm of the gradients."""
    kept = {"loss": session.compute.losses}
    if session.plan.policy.gradient_norms:
        kept["grad_norm"] = session.compute.norms
    try:
        return {name: values.pop(step).item() for name, values in kept.items()}
    except RuntimeError as error:  # whatever has gone wrong on the device shows where something is read from it
        raise RunError(f"step {step}: its loss could not be read: {error}") from error


def _finite(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None


def _rehearse(session: Session, progress: Callable[[Progress], None]) -> int | None:
    """What host updates take in this process's memory; where that is not as planned, what step to expect is said."""
    plan, phase = session.plan, "rehearsing updates"
    if plan.graph.queue(LaneKind.HOST_UPDATE):
        progress(Progress(phase, 0, 1))
    rehearsed_ns = session.rehearse()
    if rehearsed_ns is None:
        return None
    planned_ns, expected_ns = plan.prediction.record.step_ns, expected_step_ns(plan, rehearsed_ns)
    note = ""
    if abs(expected_ns - planned_ns) > WORTH_SAYING * planned_ns:
        note = (
            f"updates on the host take {rehearsed_ns / plan.prediction.host_updates_ns:.0%} of their planned time in this "
            f"process's memory: expect steps of {format_ns(expected_ns)}, planned were {format_ns(planned_ns)}"
        )
    progress(Progress(phase, 1, 1, note=note))
    return rehearsed_ns


def _peak_bytes(session: Session, before_bytes: int) -> dict[Tier, int]:
    """Peak bytes per tier, as far as the backend can tell.

    Without a GPU the device's tensors lie in this process and cannot be told from its own: what the
    process held before the first step, less the device's slots, stands for the host.
    """
    peak_gpu = session.backend.peak_gpu_bytes()
    if peak_gpu is None:
        return {Tier.HOST: before_bytes - tier_bytes(session.buffers.reserved(), Tier.GPU)}
    return {Tier.GPU: peak_gpu, Tier.HOST: peak_resident_bytes()}


def _measurement(
    session: Session,
    recorder: Recorder,
    warmup_steps: int,
    command: str,
    peak_bytes: dict[Tier, int],
    rehearsed_ns: int | None,
) -> Measurement:
    plan, origins = session.plan, recorder.origins
    # A step lasts from its first compute task to that of the next; the last one, to its own last task.
    last = recorder.recent[-1]
    ends = [*origins[1:], origins[-1] + max(span.end_ns for span in last.spans)]
    step_ns = [end - start for start, end in zip(origins, ends, strict=True)]
    # The last step is left out where others are there: no step follows into which it could overlap.
    steady = [entry for entry in recorder.recent if warmup_steps <= entry.step < last.step] or [last]
    # The low median: a step that was made.
    middle = sorted(steady, key=lambda entry: step_ns[entry.step])[(len(steady) - 1) // 2]
    task_ns = tuple(
        round(median(entry.spans[number].duration_ns for entry in steady)) for number in range(len(plan.graph.tasks))
    )
    return Measurement(
        version=__version__,
        plan_digest=digest(plan),
        machine=identity(session.backend),
        versions={
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "numba": numba.__version__,
        },
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        steady_steps=tuple(entry.step for entry in steady),
        step_ns=tuple(step_ns),
        losses=tuple(recorder.losses),
        task_ns=task_ns,
        record=step_record(plan.graph, plan.workload, step_ns[middle.step], middle.spans, peak_bytes),
        rehearsed_ns=rehearsed_ns,
    )
