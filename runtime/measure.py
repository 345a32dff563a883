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

from runtime.checkpoints.keeper import Keeper
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
    """Spans of a step; `steady` unless lanes were empty before it or after it."""

    step: int
    spans: list[Span]
    steady: bool


class Recorder:
    """Losses and times of all steps of a run, spans of the last ones. Executors follow each other: saves lie between them."""

    def __init__(self, first_step: int) -> None:
        self.first_step = first_step
        self.losses: list[float] = []
        self.step_ns: list[int] = []
        self.recent: deque[_StepSpans] = deque(maxlen=JUDGED_STEPS + 1)
        self._origins: list[int] = []  # of the executor that runs

    def take(self, executor: Executor, step: int, loss: float) -> None:
        """The executor's step's compute is over. Its updates may still run; those of the step before are over or nearly so."""
        self.losses.append(loss)
        self._take_spans(executor, step)

    def finish(self, executor: Executor) -> None:
        """All steps of the executor are over."""
        self._take_spans(executor, executor.steps)
        # A step lasts from its first compute task to that of the next; the last one, to its own last task.
        ends = [*self._origins[1:], self._origins[-1] + max(span.end_ns for span in self.recent[-1].spans)]
        self.step_ns += [end - start for start, end in zip(self._origins, ends, strict=True)]
        self._origins = []

    def _take_spans(self, executor: Executor, until: int) -> None:
        for step in range(len(self._origins), until):
            origin, spans = executor.spans(step)
            self._origins.append(origin)
            self.recent.append(_StepSpans(executor.first_step + step, spans, 0 < step < executor.steps - 1))


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


def versions() -> dict[str, str]:
    """Of what a run's figures and weights depend on."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "numba": numba.__version__,
    }


def measurement(
    session: Session,
    recorder: Recorder,
    memory: PeakMemory,
    warmup_steps: int,
    command: str,
    rehearsed_ns: int | None,
    keeper: Keeper | None = None,
) -> Measurement:
    """Judge a run by its steady steps: not the first `warmup_steps`, and none beside which lanes were empty.

    `memory` was watched since before the first step. keeper: of a run that saves.
    """
    plan, step_ns, first = session.plan, recorder.step_ns, recorder.first_step
    # Steps after which or before which lanes are empty are left out where others are there.
    recent = [entry for entry in recorder.recent if entry.step >= first + warmup_steps]
    steady = [entry for entry in recent if entry.steady] or recent[:-1] or [recorder.recent[-1]]
    # The low median: a step that was made.
    middle = sorted(steady, key=lambda entry: step_ns[entry.step - first])[(len(steady) - 1) // 2]
    task_ns = tuple(
        round(median(entry.spans[number].duration_ns for entry in steady)) for number in range(len(plan.graph.tasks))
    )
    return Measurement(
        version=__version__,
        plan_digest=digest(plan),
        machine=identity(session.backend),
        versions=versions(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        steady_steps=tuple(entry.step for entry in steady),
        first_step=first,
        step_ns=tuple(step_ns),
        losses=tuple(recorder.losses),
        task_ns=task_ns,
        record=step_record(plan.graph, plan.workload, step_ns[middle.step - first], middle.spans, memory.peak_bytes()),
        rehearsed_ns=rehearsed_ns,
        saves=() if keeper is None else tuple(keeper.records),
        staging_bytes=0 if keeper is None else keeper.staging.size_bytes,
    )
