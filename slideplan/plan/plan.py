"""The plan: a schedule for one model on one machine, with what was predicted of it."""

from __future__ import annotations

from slideplan.plan.codec import Document, Spec, digest
from slideplan.plan.graph import TaskGraph
from slideplan.plan.ledger import Ledger
from slideplan.plan.machine import MachineIdentity, MachineProfile
from slideplan.plan.model import ModelSpec
from slideplan.plan.policy import Policy, Workload
from slideplan.plan.timeline import StepRecord
from slideplan.plan.validate import validate


class Prediction(Spec, frozen=True):
    """What the simulator says of a steady step.

    lower_bound_ns: no steady step of this policy is faster (busiest lane or shared resource, slowest carried cycle)
    critical_ns:    time on the critical path by what holds it: a lane's tasks
    cost_sources:   where the cost of each kind of task comes from, kind -> "measured" or "derived"
    """

    record: StepRecord
    lower_bound_ns: int
    critical_ns: dict[str, int]
    cost_sources: dict[str, str]


class FrontPoint(Spec, frozen=True):
    """A policy that was simulated and that no other one beats in speed, GPU and host memory at once."""

    tokens_per_s: float
    global_batch: int
    gpu_bytes: int
    host_bytes: int
    policy: str  # in words


class Alternative(Spec, frozen=True):
    """The best policy found that sets one knob to another value, all other knobs searched again.

    tokens_per_s, gpu_bytes, host_bytes: of that policy. proven: none considered with another value is faster
    """

    knob: str
    value: str
    other_value: str
    tokens_per_s: float
    gpu_bytes: int
    host_bytes: int
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
    """The machine that a plan was made for, with the digest of the whole profile."""

    name: str
    digest: str
    identity: MachineIdentity
    source: str  # "measured" or "datasheet"

    @classmethod
    def of(cls, machine: MachineProfile) -> MachineReference:
        """Reference to this profile as it stands."""
        return cls(name=machine.name, digest=digest(machine), identity=machine.identity(), source=machine.provenance.source)


class Plan(Document, frozen=True, tag="plan"):
    """Everything `runtime execute` needs."""

    version: str  # of the package that made it
    model: ModelSpec
    model_digest: str
    machine: MachineReference
    workload: Workload
    policy: Policy
    graph: TaskGraph
    ledger: Ledger
    prediction: Prediction
    search: SearchRecord
    offloads: bool  # False: everything fits on the GPU and stays there

    def check(self, where: str) -> None:
        """Raise ValueError where the parts of the plan contradict each other. `where`: the file's name."""
        if digest(self.model) != self.model_digest:
            raise ValueError(f"{where}: `model` was changed after planning (digest differs from `model_digest`); plan again")
        try:
            self.policy.check(self.model, self.workload)
            validate(self.graph)
        except ValueError as error:
            raise ValueError(f"{where}: {error}; plan again") from None
