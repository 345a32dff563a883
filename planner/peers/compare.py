"""Our plan beside other systems' policies on one machine: who is how fast, and what it costs the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from planner.peers import systems as peers
from planner.search.shortfall import DoesNotFit
from simulator import predict
from slideplan import __version__
from slideplan.codec import Document, Spec
from slideplan.graph.lanes import LaneKind
from slideplan.graph.operations import CAST_WEIGHTS, LOAD_WEIGHTS, REFRESH_WEIGHTS, TaskKind
from slideplan.graph.tasks import TaskGraph
from slideplan.graph.validate import validate
from slideplan.ledger import Ledger, ledger
from slideplan.lowering.lower import lower
from slideplan.lowering.sizes import WEIGHT_BYTES
from slideplan.machine.profile import MachineProfile
from slideplan.model import ModelSpec, UnitRole
from slideplan.placement import TensorClass, Tier
from slideplan.plan import MachineReference, Plan, Prediction
from slideplan.policy import Kernels, Policy, Workload
from slideplan.quantities import format_bytes, format_ns
from slideplan.timeline import Span

OURS = "slideplan"
ACTIVATIONS = {TensorClass.BOUNDARY, TensorClass.FEED_FORWARD}
NOTABLE = 0.02  # parts of a step, or of a tier, from which a cause is worth a word


class Contender(Spec, frozen=True):
    """One system on the machine.

    lacking:    which tier is too small and by how much; empty where the system fits
    prediction: of a steady step, also where it does not fit; None for ours without a plan
    binding:    what holds the critical path for longest
    reasons:    in a few words, what the step and its memory go to
    """

    name: str
    what: str
    policy: Policy
    ledger: Ledger
    lacking: tuple[str, ...]
    prediction: Prediction | None
    binding: str
    reasons: tuple[str, ...]


class PeerComparison(Document, frozen=True, tag="peer_comparison"):
    """All systems at one model and workload. Peers are priced at the rates of our own kernels and passes."""

    version: str
    model: ModelSpec
    machine: MachineReference
    workload: Workload
    contenders: tuple[Contender, ...]  # ours first

    @property
    def ours(self) -> Contender:
        return self.contenders[0]


def compare_peers(answer: Plan | DoesNotFit, machine: MachineProfile) -> PeerComparison:
    """The answer of the search on this machine, and every peer's policy priced on it."""
    return PeerComparison(
        version=__version__,
        model=answer.model,
        machine=MachineReference.of(machine),
        workload=answer.workload,
        contenders=(
            _ours(answer),
            *(price_peer(peer, answer.model, answer.workload, machine, answer.policy.kernels) for peer in peers.PEERS),
        ),
    )


def price_peer(
    peer: peers.Peer, model: ModelSpec, workload: Workload, machine: MachineProfile, kernels: Kernels | None = None
) -> Contender:
    """A peer's policy, lowered, validated and simulated; `kernels`: as if it had these.

    Raises ValueError where the model takes no such sequences.
    """
    policy = peer.policy(model, workload)
    if kernels is not None:
        policy = msgspec.structs.replace(policy, kernels=kernels)
    graph = lower(model, policy, workload, peers.footprint(model, policy, workload))
    validate(graph)
    memory = ledger(graph, machine)
    prediction = predict(graph, model, policy, workload, machine, memory)
    return Contender(
        name=peer.name,
        what=peer.what,
        policy=policy,
        ledger=memory,
        lacking=tuple(memory.lacking()),
        prediction=prediction,
        binding=_binding(prediction),
        reasons=tuple(reasons(model, policy, graph, prediction, memory)),
    )


def _ours(answer: Plan | DoesNotFit) -> Contender:
    what = "the plan searched for this machine"
    if isinstance(answer, DoesNotFit):
        return Contender(
            name=OURS, what=what, policy=answer.policy, ledger=answer.ledger, lacking=tuple(answer.ledger.lacking()),
            prediction=None, binding="", reasons=(),
        )  # fmt: skip
    prediction = answer.prediction
    return Contender(
        name=OURS, what=what, policy=answer.policy, ledger=answer.ledger, lacking=(), prediction=prediction,
        binding=_binding(prediction),
        reasons=tuple(reasons(answer.model, answer.policy, answer.graph, prediction, answer.ledger)),
    )  # fmt: skip


def _binding(prediction: Prediction) -> str:
    critical = prediction.critical_ns
    return max(critical, key=lambda lane: critical[lane])


# -- reasons -----------------------------------------------------------------------------------


def reasons(model: ModelSpec, policy: Policy, graph: TaskGraph, prediction: Prediction, memory: Ledger) -> Iterator[str]:
    """What the step's time goes to, then what memory goes to: only what is notable, from the simulated step."""
    record, spans = prediction.record, prediction.record.spans
    notable_ns = NOTABLE * record.step_ns
    traffic, cast = dram_bytes(graph)
    if traffic:
        casts = f", {cast / model.parameter_count:.0f} of them for casts" if cast else ""
        yield f"moves {traffic / model.parameter_count:.0f} B of DRAM traffic per parameter{casts}"
    idle_ns = cpu_idle_in_forward_ns(graph, spans, record.step_ns)
    if policy.system.step_barrier and idle_ns > notable_ns:
        yield f"no CPU update runs in forward, {format_ns(idle_ns)}"
    waiting_ns = record.lanes[LaneKind.COMPUTE].idle_ns
    if policy.system.clipping == "serial" and waiting_ns > notable_ns:
        yield f"clipping, then updates, after backward: the GPU waits {format_ns(waiting_ns)} a step"
    elif waiting_ns > notable_ns:
        yield f"the GPU waits {format_ns(waiting_ns)} a step"
    if policy.system.copy_lanes == "shared":
        share = record.lanes[LaneKind.COPY].busy_ns / record.step_ns
        yield f"copies of both directions share one FIFO, busy {share:.0%}"
    passes = max(_loads_per_unit(graph).values(), default=0)
    if passes > 2:
        yield f"layers are loaded up to {passes} times"
    share = recomputed_flops(graph) / max(1, sum(task.flops for task in graph.tasks))
    if share > NOTABLE:
        yield f"recompute is {share:.0%} of the FLOPs"
    spare = memory.tiers[Tier.GPU]
    if spare.headroom_bytes > spare.capacity_bytes // 4 and traffic:
        yield f"{format_bytes(spare.headroom_bytes)} of GPU memory unused"
    oversized = _oversized_bytes(model, policy, graph)
    if oversized > NOTABLE * spare.capacity_bytes:
        yield f"slots sized for the vocabulary hold {format_bytes(oversized)} more than layers need"


def dram_bytes(graph: TaskGraph) -> tuple[int, int]:
    """Host memory traffic of weights, gradients and state in one step, and the part that makes bf16 weights. Bytes.

    Passes of the CPU over host memory, and what copies read or write there; activations aside.
    """
    casts = (CAST_WEIGHTS, REFRESH_WEIGHTS)
    on_host = [task for task in graph.tasks if Tier.HOST in (task.operation.source, task.operation.target)]
    return (
        sum(task.bytes_moved for task in on_host if not set(task.operation.tensors) & ACTIVATIONS),
        sum(task.bytes_moved for task in on_host if task.operation in casts),
    )


def cpu_idle_in_forward_ns(graph: TaskGraph, spans: Sequence[Span], step_ns: int) -> int:
    """How long the steady step's forward runs without an update on the host, or 0 where the host updates nothing."""
    if not graph.queue(LaneKind.HOST_UPDATE):
        return 0
    loss = next(number for number, task in enumerate(graph.tasks) if task.kind is TaskKind.LOSS)
    forward_ns = spans[loss].start_ns
    busy_ns = sum(
        max(0, min(span.end_ns - shift, forward_ns) - max(span.start_ns - shift, 0))
        for span in (spans[number] for number in graph.queue(LaneKind.HOST_UPDATE))
        for shift in range(0, span.end_ns + 1, max(1, step_ns))  # updates of earlier steps that reach into this one
    )
    return max(0, forward_ns - busy_ns)


def recomputed_flops(graph: TaskGraph) -> int:
    """FLOPs of one step that repeat a forward that was run before."""
    forward: dict[tuple[int, int | None], int] = {}
    repeated = 0
    for task in graph.tasks:
        key = task.unit, task.micro
        if task.kind is TaskKind.BACKWARD_RECOMPUTE or (key in forward and task.kind is TaskKind.FORWARD):
            repeated += forward[key]
        elif task.kind in (TaskKind.FORWARD, TaskKind.FORWARD_KEEP):
            forward[key] = task.flops
    return repeated


def _loads_per_unit(graph: TaskGraph) -> dict[int, int]:
    counts: dict[int, int] = {}
    for task in graph.tasks:
        if task.operation == LOAD_WEIGHTS:
            counts[task.unit] = counts.get(task.unit, 0) + 1
    return counts


def _oversized_bytes(model: ModelSpec, policy: Policy, graph: TaskGraph) -> int:
    """What slots of uniform size take on the GPU beyond what a layer needs."""
    if policy.system.unit_slots == "sized":
        return 0
    layer = model.flat_elements(UnitRole.LAYER)
    need = {TensorClass.WEIGHTS: WEIGHT_BYTES * layer, TensorClass.GRADIENT: policy.gradient_element_bytes * layer}
    shared = (pool for pool in graph.pools if pool.tier is Tier.GPU and pool.name.endswith(".window"))
    return sum(pool.count * (pool.slot_bytes - need[pool.tensor_class]) for pool in shared)
