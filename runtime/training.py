"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from runtime.folder import METRICS
from runtime.lanes.clock import RunError
from runtime.measure import Recorder
from runtime.session import Session
from slideplan.progress import Progress, Show


class StepResult(NamedTuple):
    """What a step computed. grad_norm: of all gradients; None where the plan does not have it measured."""

    step: int
    loss: float
    grad_norm: float | None


def train(session: Session, steps: int, out: Path, show: Show) -> Recorder:
    """Run the next steps of a session, one line a step into metrics.jsonl of `out`; what was recorded of them.

    Raises LaneError if a lane fails, RunError if the device does where no lane waits for it, or if a loss is not finite.
    """
    executor = session.executor(steps)
    recorder = Recorder(executor)
    # Closed, the executor has ended its lanes, whatever happens here: memory that they copy is given back next.
    with (out / METRICS).open("wb", buffering=0) as metrics, contextlib.closing(iter(executor)) as running:
        for step in running:  # the lanes walk the graph by themselves; compute of this step is over
            result = result_of(session, step)
            _log(metrics, result)
            _require_finite(result)
            show(Progress("training", step + 1, steps, result.loss, result.grad_norm))
            recorder.take(step, result.loss)
    recorder.finish()
    return recorder


def result_of(session: Session, step: int) -> StepResult:
    """Loss, and where the plan has it norm of the gradients, of a step whose compute is over."""
    compute = session.compute
    try:
        loss = compute.losses.pop(step).item()
        norm = compute.norms.pop(step).item() if session.plan.policy.gradient_norms else None
    except RuntimeError as error:  # whatever has gone wrong on the device shows where something is read from it
        raise RunError(f"step {step}: its loss could not be read: {error}") from error
    return StepResult(step, loss, norm)


def _log(metrics: FileIO, result: StepResult) -> None:
    # JSON has no infinities.
    values = {name: value if math.isfinite(value) else None for name, value in _values(result).items()}
    line = f"{json.dumps({'step': result.step} | values)}\n".encode()
    try:
        while line:
            line = line[metrics.write(line) :]
    except OSError as error:  # which does not say of which file
        raise OSError(error.errno, error.strerror, str(metrics.name)) from None


def _require_finite(result: StepResult) -> None:
    for name, value in _values(result).items():
        if not math.isfinite(value):
            raise RunError(f"step {result.step}: the {name} is {value}; lower --lr, or look for NaN in weights and data")


def _values(result: StepResult) -> dict[str, float]:
    return {"loss": result.loss} | ({} if result.grad_norm is None else {"grad_norm": result.grad_norm})
