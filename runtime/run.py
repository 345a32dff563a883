"""`runtime execute` and `runtime resume`: from a plan on disk to trained weights and a measurement on disk."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from runtime.checkpoints.contents import Contents, carried, contents_at, contents_of
from runtime.checkpoints.keeper import PHASE, Keeper, Stored, check_room, checkpoints, newest, said_of_saves
from runtime.checkpoints.layout import CHECKPOINTS
from runtime.checkpoints.manifest import Manifest, RunRecord, Saving, StoredFile
from runtime.checkpoints.resuming import Candidate, Resume, clear, leave_newer
from runtime.checkpoints.staging import Staging
from runtime.checks import MARGIN_BYTES, check_machine, check_model, check_numbers, check_plan, staging_bytes
from runtime.drives import find_drives
from runtime.folder import begin_part, open_metrics
from runtime.inputs.data import TokenWindows
from runtime.inputs.prepare import DataRequest, PreparedData, prepare
from runtime.inputs.weights import RandomWeights, SafetensorsWeights, WeightSource
from runtime.lanes.backend import Backend, make_backend
from runtime.lanes.clock import Hung, RunError
from runtime.lanes.threads import set_compute_threads
from runtime.machine import resident_bytes
from runtime.measure import PeakMemory, measurement, versions
from runtime.memory.drive import Drive
from runtime.optimizer.adamw import AdamW, HostUpdate
from runtime.rehearsal import rehearse, rehearse_drive
from runtime.session import Session, Start
from runtime.storage.disk import Disk
from runtime.training import Stop, train
from slideplan import __version__
from slideplan.codec import digest, save
from slideplan.entry import first_stop
from slideplan.graph.tasks import tier_bytes
from slideplan.measurement import Measurement
from slideplan.placement import Tier
from slideplan.plan import Plan
from slideplan.progress import Progress, Show


@dataclass(frozen=True)
class RunRequest:
    """What to run. `data` None: the sources of Python's standard library. `weights` None: random ones.

    out: the run folder, which `folder` has made or opened and locked
    steps: in all, those of earlier runs included
    byte_tokens: bytes are tokens though there are weights that have learned others
    document_end: "auto" (the tokenizer's end-of-text token), "none", or the text of a token
    token_cache: folder of prepared tokens; None: the default one
    saving: None: nothing is kept
    found: checkpoints to go on from, the newest first; none: a new run
    data_changed: the data may be others than those of the checkpoint
    disk: through which everything is written
    ssd: folders, one on each drive, for state that lies there
    """

    plan: Plan
    plan_path: str
    out: Path
    steps: int
    device: str = "auto"
    data: Path | None = None
    weights: Path | None = None
    settings: AdamW = field(default_factory=AdamW)
    seed: int = 0
    byte_tokens: bool = False
    document_end: str = "auto"
    token_cache: Path | None = None
    warmup_steps: int = 2
    command: str = ""
    saving: Saving | None = field(default_factory=Saving)
    found: Sequence[Candidate] = ()
    data_changed: bool = False
    disk: Disk = field(default_factory=Disk)
    ssd: Sequence[Path] = ()

    def resumed(self) -> RunRequest:
        """The same with what its newest checkpoint says that no resume changes."""
        folder, run = self.found[0].folder, self.found[0].manifest.run
        return replace(self, weights=folder, seed=run.seed, byte_tokens=run.byte_tokens, document_end=run.document_end)

    @property
    def done(self) -> int:
        """Steps of earlier runs, by its newest checkpoint."""
        return self.found[0].manifest.step if self.found else 0

    @property
    def record(self) -> RunRecord:
        """What manifests and the run folder say of it."""
        return RunRecord(
            steps=self.steps,
            data=_absolute(self.data),
            byte_tokens=self.byte_tokens or self.weights is None,
            document_end=self.document_end,
            seed=self.seed,
            settings=self.settings,
            saving=self.saving or Saving(),
            ssd=tuple(os.path.abspath(folder) for folder in self.ssd),  # noqa: PTH100 - links are kept
        )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else os.path.abspath(path)  # noqa: PTH100 - links are kept


def check_request(request: RunRequest) -> None:
    """What can be refused before anything is read. Raises ValueError."""
    plan = request.plan
    check_plan(plan, request.plan_path)
    check_numbers(request.steps, request.warmup_steps, request.seed)
    if request.weights is not None:
        option = "" if request.found else "--weights "
        check_model(plan.model, request.weights, plan.workload.seq_len, option)
    if request.found:
        _check_progress(request, request.found[0].manifest)


def _check_progress(request: RunRequest, manifest: Manifest) -> None:
    if request.steps <= manifest.step:
        raise ValueError(
            f"{request.out}: {manifest.step} steps are done, --steps is {request.steps}; name a larger number to go on, "
            f"--step S to make the steps after an earlier checkpoint again, or `runtime export {request.out} -o DIR` to take "
            "the weights"
        )
    planned = request.plan.workload.seq_len
    if manifest.seq_len != planned:
        raise ValueError(
            f"{request.plan_path}: workload.seq_len is {planned}, the run has taken its data in sequences of "
            f"{manifest.seq_len}; plan with --seq-len {manifest.seq_len}"
        )


def _weights(request: RunRequest, backend: Backend, show: Show) -> tuple[WeightSource | None, Contents]:
    """Where a new run begins, none for one that goes on; and what checkpoints hold beside the state."""
    model = request.plan.model
    if request.found:
        candidate = request.found[0]
        return None, contents_at(model, candidate.folder, candidate.files)
    if request.weights is None:
        return RandomWeights(model, request.seed, backend.device), contents_of(model)
    source = SafetensorsWeights(model, request.weights)
    contents, left_out = carried(request.weights, source.names)
    if left_out and request.saving is not None:
        source.notes.append(f"weights: not kept with checkpoints: {', '.join(left_out)}")
    for note in source.notes:
        show(Progress("checking weights", 1, 1, note=note))
    return source, contents


def _prepared(request: RunRequest, show: Show) -> PreparedData:
    """Prepare the data in the memory that the plan's slots take later."""
    plan = request.plan
    wanted = DataRequest(
        data=request.data,
        weights=request.weights,
        vocabulary=plan.model.vocabulary,
        byte_tokens=request.record.byte_tokens,
        document_end=request.document_end,
        cache=request.token_cache,
        host_bytes=tier_bytes(plan.graph.pools, Tier.HOST) + MARGIN_BYTES - resident_bytes(),
    )
    found = prepare(wanted, show)
    if request.found:
        _check_data(request, found.record.digest, request.found[0].manifest)
    return found


def _check_data(request: RunRequest, data_digest: str, manifest: Manifest) -> None:
    """Raise ValueError where a checkpoint has learned from other data, and nobody has said that they have changed."""
    if manifest.data_digest != data_digest and not request.data_changed:
        raise ValueError(
            f"{'the default text' if request.data is None else request.data}: its tokens are not those that the run has had "
            "until now; name the data with --data, or go on with others with --data-changed"
        )


def _windows(request: RunRequest, data: PreparedData) -> TokenWindows:
    workload = request.plan.workload
    try:
        return TokenWindows(data.tokens, workload.seq_len, workload.global_batch, request.seed)
    except ValueError as error:  # more may lie there than was read
        raise ValueError(f"{error}; {data.said_of_files()}") from None


def _host_update(request: RunRequest) -> HostUpdate:
    planned = request.plan.machine.optimizer_threads
    found = HostUpdate(planned)
    if found.threads < planned:
        raise ValueError(
            f"{request.plan_path}: machine.optimizer_threads is {planned}, numba gives this process "
            f"{found.threads}; unset NUMBA_NUM_THREADS, or measure this machine with it and plan again"
        )
    found.compile()  # it may refuse
    return found


def execute(request: RunRequest, show: Show) -> Measurement:
    """Run the plan until all steps are done, and write metrics, checkpoints and measurement into the run folder.

    Raises ValueError for what the user can mend, before memory is reserved; RunError if the run fails; KeyboardInterrupt
    where it was asked to stop, once the state is saved.
    """
    request = request.resumed() if request.found else request
    check_request(request)
    plan = request.plan
    backend = make_backend(request.device)
    check_machine(plan, backend, request.plan_path)
    drives = find_drives(plan, request.ssd, request.disk, request.plan_path, show)
    source, contents = _weights(request, backend, show)
    if request.saving is not None:
        kept = sum(step <= request.done for step, _ in checkpoints(request.out / CHECKPOINTS))
        taken_bytes = 0 if drives is None else drives.taken_bytes(request.out)
        check_room(request.disk, request.out, plan, request.saving, contents, request.done, request.steps, kept, taken_bytes)
    data = _prepared(request, show)
    windows = _windows(request, data)
    for line in (data.said(request.steps - request.done, plan.workload.global_batch, windows.windows), data.said_of_tokens()):
        show(Progress("data", 1, 1, note=line))
    set_compute_threads(backend)
    host_update = _host_update(request)
    if request.found:  # nothing is refused any more: the folder is this run's
        clear(request.out, request.found, request.disk, show)
    on_gpu = plan.ledger.tiers[Tier.GPU]
    backend.limit_gpu_bytes(on_gpu.capacity_bytes, on_gpu.fixed_bytes)
    keeper: Keeper | None = None
    stop = Stop()
    drive = None if drives is None else drives.reserve(request.disk, show)
    try:
        session = Session(plan, backend, windows, request.settings, host_update, show, drive, request.seed)
        rehearsed_ns = rehearse(session, show)
        rehearse_drive(session, show)
        check = partial(_check_data, request, data.record.digest)
        staging = Staging(backend, staging_bytes(plan, request.saving), _updates_on_gpu(plan))
        start: Start = source or Resume(request.found, check, plan.model, request.disk, staging, backend)
        session.begin(start, show)
        # Only now: what fails before, for want of memory say, leaves the run as it was. In this order: stopped in between, it
        # is the run that it was, at an earlier step.
        leave_newer(request.out, session.first_step, request.disk, show)
        begin_part(request.out, plan, None if request.saving is None else request.record, request.disk)
        if request.saving is not None:
            stored = Stored(plan.model, session.states, contents)
            describe = _describe(request, data.record.digest, windows)
            cost = plan.prediction.save
            keep, patience = request.saving.keep, None if drive is None else drive.patience
            keeper = Keeper(request.out, request.disk, stored, staging, backend, describe, keep, cost, show, patience)
            if said := said_of_saves(plan, request.saving):
                show(Progress(PHASE, note=said))
        found = _trained(request, session, keeper, rehearsed_ns, stop, show)
    except BaseException as error:
        _end(error, keeper, backend, drive)
        raise
    if stop.cause is not None:
        raise _with_remedy(stop.cause, request, session.steps_done, keeper is not None)
    assert found is not None
    return found


def _with_remedy(cause: KeyboardInterrupt, request: RunRequest, done: int, saves: bool) -> KeyboardInterrupt:
    """The interrupt of a run that has ended in order, which says what is saved and how to go on."""
    last = newest(request.out)
    if last is not None and saves:
        goes_on, is_over = f"`runtime resume {request.out}` goes on", f"`runtime export {request.out} -o DIR` takes the weights"
        cause.add_note(f"{done} steps are saved in {last}; {goes_on if done < request.steps else is_over}")
    return cause


def _end(error: BaseException, keeper: Keeper | None, backend: Backend, drive: Drive | None) -> None:
    """Give back what a failed or interrupted run holds. Its error says how to go on then.

    Closing may fail too, after a fault of the device, or be interrupted; the error is what the user must see. Raises Hung in
    its place where the drive takes nothing of a save that is still being written.
    """
    failure, hangs, over = error, isinstance(error, Hung), True
    if keeper is not None:
        try:
            # What is copied already is worth its time on the drive. Whoever interrupts is not to wait for it.
            if not isinstance(error, KeyboardInterrupt):
                keeper.wait()
        except Hung as hung:
            if not hangs:
                failure, hangs = Hung(f"{hung}; what failed first: {error}"), True
        except KeyboardInterrupt:
            pass
        over = False
        with contextlib.suppress(Exception, KeyboardInterrupt):
            over = keeper.close()
        for remedy in keeper.remedy():
            failure.add_note(remedy)
    if drive is not None:
        ended = False
        with contextlib.suppress(Exception, KeyboardInterrupt):
            ended = drive.close()
        over = over and ended
    if over and not hangs:  # what hangs is left alone, with its memory
        with contextlib.suppress(Exception, KeyboardInterrupt):
            backend.close()
    if failure is not error:
        raise failure from error


def _trained(
    request: RunRequest, session: Session, keeper: Keeper | None, rehearsed_ns: int | None, stop: Stop, show: Show
) -> Measurement | None:
    """Train and measure; None where the run was asked to stop before its first step."""

    def asked(cause: KeyboardInterrupt) -> None:
        stop.cause = cause
        word = b"" if keeper is None else b", then the state is saved"
        # By the system's call: whatever else prints may be in the midst of it.
        os.write(2, b"\nthe steps that have begun are finished" + word + b"; a second signal stops at once\n")

    memory = PeakMemory(session)
    with open_metrics(request.out, session.first_step, request.disk, show) as log, first_stop(asked):
        recorder = train(session, request.steps, log, keeper, request.saving or Saving(), stop, show)
        if keeper is not None:
            keeper.finish()
    found = None
    if recorder.losses:
        found = measurement(session, recorder, memory, request.warmup_steps, request.command, rehearsed_ns, keeper)
    session.close()
    if found is not None:
        try:
            save(request.out / "measurement.json", found)
        except ValueError as error:  # nothing that was asked for is wrong
            raise RunError(str(error)) from None
    return found


def _updates_on_gpu(plan: Plan) -> bool:
    return any(unit.update is Tier.GPU for unit in plan.policy.units)


def _describe(
    request: RunRequest, data_digest: str, windows: TokenWindows
) -> Callable[[int, bool, tuple[StoredFile, ...]], Manifest]:
    plan = request.plan

    def describe(step: int, optimizer: bool, files: tuple[StoredFile, ...]) -> Manifest:
        return Manifest(
            version=__version__,
            step=step,
            sequences=windows.sequences(step),
            seq_len=plan.workload.seq_len,
            optimizer=optimizer,
            run=request.record,
            model_name=plan.model.name,
            model_digest=digest(plan.model),
            plan_digest=digest(plan),
            data_digest=data_digest,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=versions(),
            files=files,
        )

    return describe
