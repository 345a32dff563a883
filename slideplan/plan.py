"""The plan: a schedule for one model on one machine, with what was predicted of it."""

from __future__ import annotations

from slideplan import __version__
from slideplan.codec import Document, Spec, digest
from slideplan.footprint import Footprint
from slideplan.graph.lanes import LaneKind
from slideplan.graph.tasks import TaskGraph
from slideplan.graph.validate import validate
from slideplan.ledger import Ledger, ledger_items
from slideplan.lowering.lower import lower
from slideplan.machine.handoffs import IMMEDIATE, Handoffs
from slideplan.machine.profile import MachineIdentity, MachineProfile
from slideplan.model import ModelSpec
from slideplan.placement import Tier
from slideplan.policy import Policy, Workload
from slideplan.saving import SaveCost, checkpoint_bytes, staging_bytes, weights_bytes
from slideplan.timeline import StepRecord
from slideplan.wear import DriveWear

# No task of a step runs as many steps before or after it: each waits for some task of the step before.
MOST_STEPS_APART = 64


class Prediction(Spec, frozen=True):
    """What the simulator says of a steady step.

    lower_bound_ns: no steady step of this policy is faster (busiest lane or shared resource, slowest carried cycle)
    critical_ns:    time on the critical path by what holds it: a lane's tasks
    cost_sources:   where the cost of each operation comes from, operation -> "measured", "interpolated",
                    "derived" or "datasheet", the worst of its tasks'
    host_updates_ns: the step's updates on the host one after the other, with nothing beside them
    step_uncertainty_percent: by which the costs' uncertainties may move the step time; None if not stated
    handoffs:       from lane to lane, as simulated
    save:           what saves cost the run; None for the policy of another system, which nothing runs
    drive:          what training does to the drive; None where nothing lies there
    """

    record: StepRecord
    lower_bound_ns: int
    critical_ns: dict[str, int]
    cost_sources: dict[str, str]
    host_updates_ns: int
    step_uncertainty_percent: float | None = None
    handoffs: Handoffs = IMMEDIATE
    save: SaveCost | None = None
    drive: DriveWear | None = None


class FrontPoint(Spec, frozen=True):
    """A policy that was simulated and that no other one beats in speed and in memory of every tier at once."""

    tokens_per_s: float
    global_batch: int
    peak_bytes: dict[Tier, int]
    policy: str  # in words


class Alternative(Spec, frozen=True):
    """The best policy found that sets one knob to another value, all other knobs searched again.

    tokens_per_s, peak_bytes: of that policy. proven: none considered with another value is faster
    """

    knob: str
    value: str
    other_value: str
    tokens_per_s: float
    peak_bytes: dict[Tier, int]
    proven: bool


class SearchRecord(Spec, frozen=True):
    """How the policy was found: counts of policies considered, dropped unpriced, and simulated.

    pruned_by_bound: cannot beat the plan by more than the search's tolerance
    unpriced:        might have, but the search's budget was spent
    bound_ns:        no policy considered has a shorter step than this, at the plan's global batch
    objective:       what was sought, in words
    slowest_ns:      the longest step allowed where memory was sought, 0 where speed was
    bound_host_bytes: no policy considered with such a step takes less host memory; 0 where speed was sought
    batches:         global batches considered
    front:           what can be had for less memory, fastest first
    alternatives:    what the next-best value of each knob would cost
    """

    candidates: int
    pruned_by_capacity: int
    pruned_by_bound: int
    simulated: int
    unpriced: int = 0
    bound_ns: int = 0
    objective: str = "tokens/s"
    slowest_ns: int = 0
    bound_host_bytes: int = 0
    batches: tuple[int, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    alternatives: tuple[Alternative, ...] = ()


class MachineReference(Spec, frozen=True):
    """The machine that a plan was made for, with the digest of the whole profile.

    optimizer_threads: of the host's optimizer, for which the profile's figures hold
    """

    name: str
    digest: str
    identity: MachineIdentity
    source: str  # "measured" or "datasheet"
    optimizer_threads: int

    def __post_init__(self) -> None:
        if not 1 <= self.optimizer_threads <= self.identity.cores:
            threads, cores = self.optimizer_threads, self.identity.cores
            raise ValueError(f"machine {self.name}: optimizer_threads is {threads}, must be in 1..{cores}; plan again")

    @classmethod
    def of(cls, machine: MachineProfile) -> MachineReference:
        """Reference to this profile as it stands."""
        return cls(
            name=machine.name,
            digest=digest(machine),
            identity=machine.identity(),
            source=machine.provenance.source,
            optimizer_threads=machine.optimizer.threads,
        )


class Plan(Document, frozen=True, tag="plan"):
    """Everything `runtime execute` needs."""

    version: str  # of the package that made it
    model: ModelSpec
    model_digest: str
    machine: MachineReference
    workload: Workload
    policy: Policy
    footprint: Footprint  # from the machine profile
    graph: TaskGraph
    ledger: Ledger
    prediction: Prediction
    search: SearchRecord
    offloads: bool  # False: everything fits on the GPU and stays there

    def check(self, where: str) -> None:
        """Raise ValueError where the plan is of another version or its parts contradict each other.

        `where`: the file's name. The graph must be the one that its policy lowers to: a graph that is
        merely free of races may still leave out an update. Of what was predicted, only what a run needs is checked.
        """
        if self.version != __version__:
            raise ValueError(f"{where}: was made by slideplan {self.version}, this is {__version__}; plan again")
        if digest(self.model) != self.model_digest:
            raise ValueError(f"{where}: `model` was changed after planning (digest differs from `model_digest`); plan again")
        try:
            validate(self.graph)
            lowered = lower(self.model, self.policy, self.workload, self.footprint)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; plan again") from None
        if lowered != self.graph:
            raise ValueError(f"{where}: `graph` is not what `policy` lowers to; one of them was changed; plan again")
        if ledger_items(self.graph) != {tier: part.items for tier, part in self.ledger.tiers.items()}:
            raise ValueError(f"{where}: `ledger` does not sum up the pools of `graph`; plan again")
        record = self.prediction.record
        if (len(record.spans), set(record.lanes), set(record.peak_bytes)) != (
            len(self.graph.tasks),
            {lane.name for lane in self.graph.lanes},
            set(self.ledger.tiers),
        ):
            raise ValueError(f"{where}: `prediction` is not of `graph`: tasks, lanes or tiers differ; plan again")
        if (
            record.step_ns < 1
            or self.prediction.host_updates_ns < len(self.graph.queue(LaneKind.HOST_UPDATE))
            or any(span.duration_ns < 0 for span in record.spans)
            or any(max(-span.start_ns, span.end_ns) > MOST_STEPS_APART * record.step_ns for span in record.spans)
        ):
            raise ValueError(
                f"{where}: `prediction` has a step, a task or host updates that take no time, or a task far outside its "
                "step; plan again"
            )
        if not self.ledger.fits:
            raise ValueError(f"{where}: `ledger` {'; '.join(self.ledger.lacking())}; plan again")
        save = self.prediction.save
        if save is None or (save.checkpoint_bytes, save.weights_bytes, save.staging_bytes) != (
            checkpoint_bytes(self.model, self.policy),
            weights_bytes(self.model),
            staging_bytes(self.ledger, save.checkpoint_bytes),
        ):
            raise ValueError(f"{where}: `prediction.save` is not of `policy` and `ledger`; plan again")
