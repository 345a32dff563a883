"""The training loop."""

from __future__ import annotations

import contextlib
import json
import math
import time
from typing import NamedTuple

from runtime.checkpoints.keeper import Keeper
from runtime.checkpoints.manifest import Saving
from runtime.lanes.clock import RunError
from runtime.lanes.executor import Executor
from runtime.measure import Recorder
from runtime.metrics import Metrics
from runtime.session import Session
from slideplan.entry import in_words
from slideplan.progress import Progress, Show


class Stop:
    """A wish to end training, from outside of its loop. `cause`: the signal's exception, raised once the state is saved."""

    cause: KeyboardInterrupt | None = None

    @property
    def asked(self) -> bool:
        return self.cause is not None


class StepResult(NamedTuple):
    """What a step computed. grad_norm: of all gradients; None where the plan does not have it measured."""

    step: int
    loss: float
    grad_norm: float | None


def train(
    session: Session, steps: int, metrics: Metrics, keeper: Keeper | None, saving: Saving, stop: Stop, show: Show
) -> Recorder:
    """Run a session until so many steps are done in all, one line a step into the metrics; what was recorded of them.

    Between steps the state is saved as `saving` says, and at the end; without a keeper nothing is. Once `stop` is asked for,
    the steps that have begun are the last: none, if none had. Raises LaneError if a lane or the device fails, RunError if a
    loss is not finite.
    """
    recorder = Recorder(session.first_step)
    saved, drained_ns = session.first_step, 0
    while (done := session.steps_done) < steps and not stop.asked:
        executor = session.executor(_until_save(done, steps, saving) - done)
        # Closed, the executor has ended its lanes, whatever happens here: memory that they copy is given back next.
        with contextlib.closing(iter(executor)) as running:
            over_ns = 0
            for step in running:  # the lanes walk the graph by themselves; compute of this step is over
                result = result_of(session, executor, step)
                _write(metrics, result, show)
                _require_finite(result, keeper)
                show(Progress("training", result.step + 1, steps, result.loss, result.grad_norm))
                recorder.take(executor, step, result.loss)
                over_ns = time.perf_counter_ns()
                if stop.asked:
                    executor.finish()
        drained_ns = time.perf_counter_ns() - over_ns
        recorder.finish(executor)
        done = session.steps_done
        # Weights first: a run that goes on from the checkpoint saves those of later steps only.
        if keeper is not None and saving.weights_every and done % saving.weights_every == 0:
            keeper.save(done, False, metrics, drained_ns)
            drained_ns = 0  # once is enough
        if keeper is not None and saving.every and done % saving.every == 0:
            keeper.save(done, True, metrics, drained_ns)
            saved = done
    # Here it is known for good that no other step follows: a wish to stop may come at any time.
    if keeper is None:
        metrics.sync()
    elif saved < session.steps_done:
        keeper.save(session.steps_done, True, metrics, drained_ns)
    return recorder


def _until_save(done: int, steps: int, saving: Saving) -> int:
    """The next step, counted from the first of all, after which something is saved."""
    return min([steps, *((done // every + 1) * every for every in (saving.every, saving.weights_every) if every)])


def result_of(session: Session, executor: Executor, step: int) -> StepResult:
    """Loss, and where the plan has it norm of the gradients, of the executor's step whose compute is over."""
    number = executor.first_step + step
    loss, *norm = executor.values(session.compute.results.pop(number), step)
    return StepResult(number, loss, norm[0] if norm else None)


def _write(metrics: Metrics, result: StepResult, show: Show) -> None:
    # JSON has no infinities.
    values = {name: value if math.isfinite(value) else None for name, value in _values(result).items()}
    error = metrics.append(f"{json.dumps({'step': result.step} | values)}\n".encode())
    if error is not None:
        show(Progress("training", note=f"warning: {in_words(error)}: metrics wait in memory until the drive takes them"))


def _require_finite(result: StepResult, keeper: Keeper | None) -> None:
    for name, value in _values(result).items():
        if not math.isfinite(value):
            # The same again would end the same. How a run goes on from the newest checkpoint is added where it ends.
            lower = (
                "resume with --lr X, a smaller rate, and --step S, an earlier checkpoint"
                if keeper is not None and keeper.remedy()
                else "lower --lr"
            )
            raise RunError(f"step {result.step}: the {name} is {value}; look for NaN in weights and data, or {lower}")


def _values(result: StepResult) -> dict[str, float]:
    return {"loss": result.loss} | ({} if result.grad_norm is None else {"grad_norm": result.grad_norm})
