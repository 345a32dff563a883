"""What a run showed: records its steps and judges the steady ones."""

from __future__ import annotations

import datetime
import gc
import platform
from collections import deque
from statistics import median
from typing import NamedTuple

import numba
import torch
import transformers

from runtime.lanes.executor import Executor
from runtime.machine import identity, peak_resident_bytes, reset_peak_resident, resident_bytes
from runtime.session import Session
from slideplan import __version__
from slideplan.codec import digest
from slideplan.graph.tasks import tier_bytes
from slideplan.measurement import Measurement
from slideplan.placement import Tier
from slideplan.timeline import Span, step_record

# Steps whose spans are kept: medians do not get better beyond, and long runs must not fill the memory.
JUDGED_STEPS = 50


class _StepSpans(NamedTuple):
    step: int
    spans: list[Span]


class Recorder:
    """Losses and origins of all steps of an executor, spans of the last ones."""

    def __init__(self, executor: Executor) -> None:
        self.losses: list[float] = []
        self.origins: list[int] = []
        self.recent: deque[_StepSpans] = deque(maxlen=JUDGED_STEPS + 1)
        self._executor = executor

    def take(self, step: int, loss: float) -> None:
        """A step's compute is over. Its updates may still run; those of the step before are over or nearly so."""
        self.losses.append(loss)
        self._take_spans(step - 1)

    def finish(self) -> None:
        """All steps are over."""
        self._take_spans(self._executor.steps)

    def _take_spans(self, until: int) -> None:
        for step in range(len(self.origins), until):
            origin, spans = self._executor.spans(step)
            self.origins.append(origin)
            self.recent.append(_StepSpans(step, spans))


class PeakMemory:
    """Peak bytes per tier from here on, as far as the backend can tell."""

    def __init__(self, session: Session) -> None:
        self._session = session
        gc.collect()
        reset_peak_resident()
        self._before_bytes = resident_bytes()

    def peak_bytes(self) -> dict[Tier, int]:
        """By tier.

        Without a GPU the device's tensors lie in this process and cannot be told from its own: what the
        process held before the first step, less the device's slots, stands for the host.
        """
        peak_gpu = self._session.backend.peak_gpu_bytes()
        if peak_gpu is None:
            return {Tier.HOST: self._before_bytes - tier_bytes(self._session.buffers.reserved(), Tier.GPU)}
        return {Tier.GPU: peak_gpu, Tier.HOST: peak_resident_bytes()}


def measurement(
    session: Session,
    recorder: Recorder,
    memory: PeakMemory,
    warmup_steps: int,
    command: str,
    rehearsed_ns: int | None,
) -> Measurement:
    """Judge a run by its steady steps: neither the first `warmup_steps` nor the last.

    `memory` was watched since before the first step.
    """
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
        record=step_record(plan.graph, plan.workload, step_ns[middle.step], middle.spans, memory.peak_bytes()),
        rehearsed_ns=rehearsed_ns,
    )
