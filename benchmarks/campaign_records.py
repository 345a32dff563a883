"""What a validation campaign keeps: which runs it has, what became of each, and the files of its folder."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Literal

import msgspec

from slideplan.codec import D, Document, Spec, load, write_atomic
from slideplan.machine.profile import MachineProfile
from slideplan.measurement import Comparison, Measurement
from slideplan.plan import Plan
from slideplan.policy import Policy, Workload
from slideplan.quantities import GIB, MIB

Choice = Literal["random", "planned"]


class Configuration(Spec, frozen=True):
    """What is asked of a policy. `gpu_memory_bytes`: how much of the GPU may be planned for; None is all of it."""

    model: str
    workload: Workload
    gpu_memory_bytes: int | None

    @property
    def name(self) -> str:
        memory, planned = "", self.gpu_memory_bytes
        if planned is not None:
            memory = f"-gpu{planned // GIB}gib" if planned % GIB == 0 else f"-gpu{planned / MIB:g}mib"
        return f"{self.model}-s{self.workload.seq_len}-b{self.workload.global_batch}{memory}"


class Entry(Spec, frozen=True):
    """One run: a configuration under one policy, drawn at random or chosen by the planner.

    predicted_ns:   step time by the simulator, before anything ran
    reserved_bytes: slots of both tiers, which the run touches before its first step
    """

    configuration: Configuration
    choice: Choice
    number: int  # among the runs of the configuration
    policy: Policy
    predicted_ns: int
    reserved_bytes: int

    @property
    def name(self) -> str:
        return f"{self.configuration.name}-{self.choice}" + (str(self.number) if self.choice == "random" else "")


class Manifest(Document, frozen=True, tag="campaign"):
    """The runs of a campaign in the order in which they are taken, all drawn before the first one starts.

    ssd: folder on the drive that runs use; "" where none does
    """

    seed: int
    device: str
    command: str
    profile_digest: str
    entries: tuple[Entry, ...]
    ssd: str = ""


class Outcome(Document, frozen=True, tag="campaign_run"):
    """What became of a run. `started` without an end: the campaign was stopped from outside meanwhile.

    wall_s: whole run, start of the process and reserving memory included
    error:  last lines that a failed run left
    """

    status: Literal["started", "done", "failed"]
    attempts: int
    estimated_s: float
    wall_s: float = 0.0
    error: str = ""


class CampaignFolder:
    """profile.json, manifest.json and one folder per run under runs/.

    Plans and measurements of a campaign are tens of megabytes of JSON; the folder is to travel, so they
    are kept compressed, and what follows from them (trace, picture of the lanes) is not kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def profile_file(self) -> Path:
        return self.path / "profile.json"

    @property
    def manifest_file(self) -> Path:
        return self.path / "manifest.json"

    def profile(self) -> MachineProfile:
        return load(self.profile_file, MachineProfile)

    def manifest(self) -> Manifest:
        if not self.manifest_file.is_file():
            raise ValueError(f"{self.path}: holds no campaign (no manifest.json); start one with `-o {self.path}`")
        return load(self.manifest_file, Manifest)

    def run_folder(self, entry: Entry) -> Path:
        return self.path / "runs" / entry.name

    def outcome(self, entry: Entry) -> Outcome | None:
        """None where the run has not been tried."""
        file = self.run_folder(entry) / "outcome.json"
        return load(file, Outcome) if file.is_file() else None

    def comparison(self, entry: Entry) -> Comparison:
        return load(self.run_folder(entry) / "comparison.json", Comparison)

    def plan(self, entry: Entry) -> Plan:
        return _unpack(self.run_folder(entry) / "plan.json.gz", Plan)

    def measurement(self, entry: Entry) -> Measurement:
        return _unpack(self.run_folder(entry) / "measurement.json.gz", Measurement)

    def pack(self, entry: Entry) -> None:
        """Compress what a finished run left, and drop what can be made from it."""
        run = self.run_folder(entry)
        for name in ("plan.json", "measurement.json"):
            # Without a time stamp equal contents make equal files.
            write_atomic(run / f"{name}.gz", gzip.compress((run / name).read_bytes(), mtime=0))
            (run / name).unlink()
        for name in ("trace.json", "lanes.png", "metrics.jsonl"):
            (run / name).unlink(missing_ok=True)


def _unpack(file: Path, kind: type[D]) -> D:
    try:
        return msgspec.json.decode(gzip.decompress(file.read_bytes()), type=kind)
    except (OSError, EOFError, msgspec.DecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {error}; run it again: remove its folder and --resume") from None
